"""The copy-recall probe: chunks through a cache score as one pass does, with sight of the passage and without."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.eval.copy_recall import CopyRecallProbe
from lcjax.eval.tasks.copy_recall import SCORED, plants
from lcjax.models.decoder import abstract
from lcjax.models.spec import Attention
from lcjax.serve.source import random_model
from tests.serve.toy import SPEC, TOKENIZER

LENGTH, SINK, WINDOW = 300, 4, 20


@pytest.fixture(scope="module")
def model():
    found = random_model(replace(SPEC, num_layers=1, pattern=(Attention(),), max_length=512), TOKENIZER, seed=3)
    return found._replace(params=jax.tree.map(lambda x: 3 * x, found.params))


def in_one_pass(model, spec, rows):
    """(loss, top-1) of the last tokens of each row."""
    logits = nnx.merge(abstract(spec)[0], model.params)(jnp.asarray(rows[:, :-1]))[:, -SCORED:]
    targets = rows[:, -SCORED:]
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[..., 0]
    return nll.mean(axis=1), (np.argmax(np.asarray(logits), axis=-1) == targets).mean(axis=1)


def test_chunks_through_a_cache_score_as_one_pass(model, tmp_path):
    texts = {"filler": tmp_path / "a.txt", "passages": tmp_path / "b.txt"}
    texts["filler"].write_text("Of seas and ships and whales. " * 60)
    texts["passages"].write_text("\n\n".join(f"A single man, number {i}. " * 4 for i in range(60)))
    texts = {name: str(path) for name, path in texts.items()}
    size = {"lengths": (LENGTH,), "count": 3, "batch": 2, "chunk": 64}
    probe = CopyRecallProbe(**texts, **size, lost_sink=SINK, lost_window=WINDOW)
    tables = probe.run(model, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "copy_recall.jsonl").read_text().splitlines()]
    found = {(line["form"], line["kind"]): line for line in lines}
    rows = plants(TOKENIZER, LENGTH, count=3, **texts)
    near = replace(model.spec, pattern=(Attention(window=WINDOW, sink=SINK),))
    for form, spec in (("", model.spec), ("_lost", near)):
        for kind, wanted in zip(("nll", "top1"), in_one_pass(model, spec, rows), strict=True):
            line = found[form, kind]
            np.testing.assert_allclose(line["plants"], wanted, rtol=1e-4)
            assert tables[f"copy_recall{form}_{kind}"] == {str(LENGTH): pytest.approx(wanted.mean(), rel=1e-4)}
            assert line["low"] <= line["mean"] <= line["high"]
    assert found["", "nll"]["mean"] != pytest.approx(found["_lost", "nll"]["mean"], rel=1e-3)
