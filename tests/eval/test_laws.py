"""Several laws in one evaluation: the same targets, a sliding baseline, one report, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest

from lcjax.eval.laws import CompareLaws, Law, ratios
from lcjax.eval.perplexity import BLOCK, Perplexity
from lcjax.eval.runner import Suite
from lcjax.eval.tasks.passkey import Passkey
from lcjax.models.spec import Attention
from lcjax.positions import DualChunk, DynamicYaRN
from lcjax.serve.engine import Engine
from lcjax.serve.source import random_model
from tests.serve.toy import SPEC, TOKENIZER

LAWS = (
    Law("plain"),
    Law("dual chunk", remap=DualChunk(size=96, local=16)),
    Law("dynamic YaRN", DynamicYaRN(original_length=96, max_factor=4)),
)


@pytest.fixture(scope="module")
def model():
    return random_model(dataclasses.replace(SPEC, num_layers=1, pattern=(Attention(),)), TOKENIZER, seed=3)


def test_laws_are_compared_on_the_same_targets(model, tmp_path):
    (tmp_path / "text.txt").write_text("A stitch in time saves nine, so they say. " * 20, encoding="utf-8")
    text = Perplexity(str(tmp_path / "text.txt"), lengths=(80, 256), window=64, chunk=32)
    tables = CompareLaws(LAWS, (text,)).run(model, tmp_path)
    short = {law.name: tables[f"perplexity/{law.name}"]["80"] for law in LAWS}
    assert short == pytest.approx(dict.fromkeys(short, short["plain"]), rel=1e-5)  # within the trained length
    whole = {law.name: tables[f"perplexity/{law.name}"]["256"] for law in LAWS}
    assert whole["dual chunk"] != pytest.approx(whole["plain"], rel=1e-5)
    assert whole["dynamic YaRN"] != pytest.approx(whole["plain"], rel=1e-5)
    sliding = tables["perplexity/sliding context"]["256"]
    assert tables["perplexity/plain/ratio"]["256"] == pytest.approx(whole["plain"] / sliding)
    windows = tables["perplexity/dual chunk/by_position"]
    assert windows.keys() == {"64", "128", "192", "256"}
    assert math.prod(windows.values()) == pytest.approx(whole["dual chunk"] ** 4, rel=1e-5)
    assert tables["perplexity/dual chunk/seconds"].keys() == {"256"}
    assert "by_position" not in (tmp_path / "laws.txt").read_text()
    for name in ("laws.txt", "laws_perplexity.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_ratios_have_intervals():
    """The interval is that of stretches, each an independent sample; equal losses have one without width."""
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, 40 * BLOCK)
    worse = base + np.repeat(rng.normal(0.1, 0.2, 40), BLOCK)
    found = ratios("text/law", worse, base, (7 * BLOCK, 40 * BLOCK))
    (ratio, low, high) = (found[f"text/law/{name}"][str(40 * BLOCK)] for name in ("ratio", "ratio_low", "ratio_high"))
    assert low < ratio < high
    assert math.log(ratio) == pytest.approx(float(np.mean(worse - base)))
    spread = float(np.std((worse - base)[::BLOCK]))
    assert math.log(high / low) == pytest.approx(2 * 1.96 * spread / 40**0.5, rel=0.1)
    assert found["text/law/ratio_low"].keys() == {str(40 * BLOCK)}, "a few stretches have no interval"
    same = ratios("text/law", base, base, (8 * BLOCK,))
    assert [table[str(8 * BLOCK)] for table in same.values()] == [1.0, 1.0, 1.0]


def test_a_suite_runs_under_a_law_beyond_the_trained_length(model, tmp_path):
    suite = Suite(Passkey(num_examples=2, depths=(0.0, 1.0)), lengths=(420,), engine=Engine(batch=2, chunk=512))
    tables = CompareLaws(LAWS[1:2], suite=suite).run(model, tmp_path)
    assert set(tables) == {"passkey/dual chunk"}
    assert set(tables["passkey/dual chunk"]) == {"420"}
    for name in ("laws_scores.png", "laws_depths.png", "laws.html", "dual chunk/suite.jsonl"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompareLaws((Law("a"), Law("a")), (Perplexity("x"),)), "different names"),
        (lambda: CompareLaws(LAWS), "nothing to measure"),
        (lambda: CompareLaws(LAWS, (Perplexity("x", context=8),)), "sets context or targets"),
    ],
)
def test_bad_comparisons(make, message):
    with pytest.raises(ValueError, match=message):
        make()
