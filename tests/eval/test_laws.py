"""Several laws in one evaluation: the same targets, a sliding baseline, one report, and what is refused."""

import dataclasses
import math

import pytest

from lcjax.eval.laws import CompareLaws, Law
from lcjax.eval.perplexity import Perplexity
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
