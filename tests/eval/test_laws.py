"""Several laws in one evaluation: the same targets, a sliding baseline, one report, and what is refused."""

import json

import pytest

from lcjax.eval.laws import CompareLaws, Law
from lcjax.eval.perplexity import Perplexity
from lcjax.eval.runner import Suite
from lcjax.eval.tasks.passkey import Passkey
from lcjax.positions import DualChunk, DynamicYaRN, SelfExtend
from lcjax.serve.engine import Engine
from tests.serve.toy import toy

LAWS = (
    Law("plain"),
    Law("dual chunk", remap=DualChunk(size=96, local=16)),
    Law("self-extend", remap=SelfExtend(group=1, window=32)),
    Law("dynamic YaRN", DynamicYaRN(original_length=96, max_factor=4)),
)


def test_laws_are_compared_on_the_same_targets(tmp_path):
    (tmp_path / "text.txt").write_text("A stitch in time saves nine, so they say. " * 20, encoding="utf-8")
    model = toy()
    text = Perplexity(str(tmp_path / "text.txt"), lengths=(80, 256), window=64, chunk=32)
    suite = Suite(Passkey(num_examples=2, depths=(0.0, 1.0)), lengths=(420,), engine=Engine(batch=2, chunk=64))
    tables = CompareLaws(LAWS, (text,), suite).run(model, tmp_path)
    short = {law.name: tables[f"perplexity/{law.name}"]["80"] for law in LAWS}
    assert short == pytest.approx(dict.fromkeys(short, short["plain"]), rel=1e-5)  # within the trained length
    whole = {law.name: tables[f"perplexity/{law.name}"]["256"] for law in LAWS}
    assert whole["self-extend"] == pytest.approx(whole["plain"], rel=1e-5)
    assert whole["dual chunk"] != pytest.approx(whole["plain"], rel=1e-5)
    assert whole["dynamic YaRN"] != pytest.approx(whole["plain"], rel=1e-5)
    sliding = tables["perplexity/sliding context"]["256"]
    assert tables["perplexity/plain/ratio"]["256"] == pytest.approx(whole["plain"] / sliding)
    assert {f"passkey/{law.name}" for law in LAWS} <= tables.keys()
    for name in ("laws.txt", "laws_perplexity.png", "laws_scores.png", "laws_depths.png", "laws.html"):
        assert (tmp_path / name).stat().st_size > 0
    rows = (tmp_path / "dual chunk" / "suite.jsonl").read_text().splitlines()
    assert len([json.loads(row) for row in rows]) >= 2


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
