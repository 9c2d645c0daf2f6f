"""Perplexity through the cache against plain cross-entropy."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.eval.perplexity import BLOCK, Perplexity, intervals, score
from lcjax.models.spec import Attention
from lcjax.positions import DynamicLinear, Linear
from lcjax.serve.source import Pretrained, random_model
from tests.serve.toy import SPEC, TOKENIZER, toy

TEXT = "The quick brown fox jumps over the lazy dog, and Grüße from afar. " * 4
SMOLLM2 = Path(os.environ.get("LCJAX_SMOLLM2", "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
BOOK = Path(os.environ.get("LCJAX_BOOKS", "models/books")) / "jane-austen--pride-and-prejudice.txt"


@pytest.fixture(scope="module")
def model():
    return toy()


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def plain(model):
    """rows `[B,N+1]` -> negative log-likelihood `[B,N]` of each next token, from one pass without caches."""

    @jax.jit
    def losses(params, tokens):
        logits = nnx.merge(model.graphdef, params)(tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]

    def one(row):
        padded = np.pad(row, (0, 129 - len(row)))  # causal: padding on the right changes nothing; one compilation
        return np.asarray(losses(model.params, padded[None].astype(np.int32)))[0, : len(row) - 1]

    return lambda rows: np.stack([one(row) for row in rows])


def test_chunks_equal_one_pass(model, plain):
    rows = np.array([TOKENIZER.encode(TEXT)[:100], TOKENIZER.encode(TEXT)[30:130]], np.int32)
    want = plain(rows)
    np.testing.assert_allclose(score(model, rows, 32), want, atol=2e-5)
    np.testing.assert_allclose(score(model, rows, 32, last=20), want[:, -20:], atol=2e-5)


def test_laws_that_follow_the_length_see_the_whole_row():
    """As interpolation by one factor; in a text that grows, each chunk by the factor of what was read so far."""
    rows = np.array([TOKENIZER.encode(TEXT)[:97]], np.int32)
    under = lambda law: random_model(
        dataclasses.replace(SPEC, pattern=(Attention(rope=law),), num_layers=2), TOKENIZER, seed=3
    )
    found = under(DynamicLinear(original_length=32, max_factor=4))
    want = score(under(Linear(factor=3.0)), rows, 32)
    np.testing.assert_allclose(score(found, rows, 32), want, atol=2e-5)
    grows = score(found, rows, 32, grows=True)
    np.testing.assert_allclose(grows[:, :32], score(under(Linear()), rows[:, :33], 32), atol=2e-5)
    assert np.abs(grows - want)[:, 32:].max() > 1e-4


def test_lengths_and_positions(model, plain, text, tmp_path):
    found = Perplexity(text, start=5, lengths=(40, 96), window=32, chunk=32).run(model, tmp_path)
    ids = np.array(TOKENIZER.encode(TEXT)[5:102], np.int32)[None]
    nll = plain(ids)[0]
    assert found["perplexity"].keys() == {"40", "96"}
    np.testing.assert_allclose(found["perplexity"]["40"], np.exp(nll[:40].mean()), rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"]["96"], np.exp(nll.mean()), rtol=1e-5)
    windows = found["perplexity_by_position"]
    np.testing.assert_allclose(
        [windows[end] for end in ("32", "64", "96")], np.exp(nll.reshape(3, 32).mean(1)), rtol=1e-5
    )
    lines = [json.loads(line) for line in (tmp_path / "perplexity.jsonl").read_text().splitlines()]
    assert [(line["begin"], line["end"]) for line in lines] == [(0, 32), (32, 64), (64, 96)]
    assert (tmp_path / "perplexity.png").read_bytes()[:4] == b"\x89PNG"


def test_intervals_draw_stretches():
    nll = np.repeat(np.random.default_rng(0).normal(3, 0.1, 40), BLOCK)
    found = intervals("text", {"short": nll[: 7 * BLOCK], "long": nll})
    assert found.keys() == {"text_low", "text_high"}
    assert found["text_low"].keys() == {"long"}
    mean, half = np.exp(nll.mean()), 1.96 * 0.1 / 40**0.5
    np.testing.assert_allclose(found["text_low"]["long"], mean * np.exp(-half), rtol=0.01)
    np.testing.assert_allclose(found["text_high"]["long"], mean * np.exp(half), rtol=0.01)


def test_sliding_context(model, plain, text):
    """Contexts of 32 that advance by 16: the first is scored whole, then the second half of each."""
    measure = Perplexity(text, lengths=(70,), context=32, chunk=32, batch=2)
    tokens = measure.tokens(model)
    got = measure.losses(model, tokens)
    want = plain(tokens[None, :33])[0]
    for begin in (16, 32, 38):
        new = plain(tokens[None, begin : begin + 33])[0]
        want = np.concatenate([want, new[len(want) - begin :]])
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_same_targets_by_context(model, plain, text, tmp_path):
    measure = Perplexity(text, lengths=(32, 64), targets=16, chunk=32)
    found = measure.run(model, tmp_path)["perplexity"]
    tokens = measure.tokens(model)[None]
    for n in (32, 64):
        np.testing.assert_allclose(found[str(n)], np.exp(plain(tokens[:, -n - 1 :])[0, -16:].mean()), rtol=1e-5)


def test_several_files_are_one_text(model, tmp_path):
    """Up to max_chars characters of all files together; the first missing one is named."""
    for name, part in (("a", TEXT[:90]), ("b", TEXT[90:150]), ("c", "not read")):
        (tmp_path / name).write_text(part, encoding="utf-8")
    files = tuple(str(tmp_path / name) for name in "abc")
    joined = Perplexity(files, lengths=(140,), max_chars=150)
    np.testing.assert_array_equal(joined.tokens(model), np.array(TOKENIZER.encode(TEXT[:150])[:141], np.int32))
    assert joined.title == "a and 2 more, windows of 2,048 tokens"
    with pytest.raises(FileNotFoundError, match=r"perplexity.text names 'no.txt', which is not a file"):
        Perplexity((files[0], "no.txt")).check()
    with pytest.raises(ValueError, match=r"perplexity.text is empty"):
        Perplexity(())


def test_bad_input_is_named(model, text, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"perplexity.text names 'no/book.txt', which is not a file"):
        Perplexity("no/book.txt").check()
    with pytest.raises(ValueError, match=r"has \d+ tokens .* start 0 and length 4096 need 4097"):
        Perplexity(text).tokens(model)
    with pytest.raises(ValueError, match=r"lengths .* must be positive"):
        Perplexity(text, lengths=(0,))
    with pytest.raises(ValueError, match=r"perplexity.targets is 64; it must lie in 1\.\.32"):
        Perplexity(text, lengths=(32, 64), targets=64)
    with pytest.raises(ValueError, match="two different comparisons"):
        Perplexity(text, lengths=(32,), targets=8, context=16)
    with pytest.raises(ValueError, match="no beginning-of-text token"):
        Perplexity(text, lengths=(32,), add_bos=True).losses(
            model._replace(tokenizer=type("NoBos", (), {"bos_id": None})), np.zeros(33, np.int32)
        )


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2.is_file() and BOOK.is_file()), reason="needs LCJAX_SMOLLM2 and LCJAX_BOOKS")
def test_smollm2_reference_value(tmp_path):
    measure = Perplexity(str(BOOK), start=20_000, lengths=(4096,))
    assert measure.run(Pretrained(str(SMOLLM2)).load(), tmp_path)["perplexity"]["4096"] == pytest.approx(
        28.08, abs=0.03
    )
