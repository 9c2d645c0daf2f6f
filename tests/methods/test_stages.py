"""A job in stages, through the training loop: each starts from the one before, and the last is a model to load."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lcjax import settings
from lcjax.checkpoint.manager import CheckpointError
from lcjax.eval.passkey_texts import PasskeyTexts
from lcjax.methods import Lawcat, Lora
from lcjax.models.recurrent import Linearized
from lcjax.models.spec import Attention
from lcjax.serve.source import Pretrained
from lcjax.train import loop
from lcjax.train.job import Stage
from lcjax.train.optimizers import Cosine
from lcjax.train.preempt import Preemption
from lcjax.train.progress import Progress
from lcjax.train.transfer import AttentionTransfer
from tests.faults.runs import TINY, TinyRun, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_corpus(folder / "corpus")
    job, _ = settings.load("train", [TINY], TinyRun(folder, "run").bindings)
    optimizer = dataclasses.replace(job.optimizer, schedule=Cosine(0.02), weight_decay=0.0)
    stages = (
        Stage("teacher", steps=2),
        Stage("transfer", methods=(Lawcat(),), loss=AttentionTransfer()),
        Stage("finetune", methods=(Lora(rank=2),), steps=2, length=16),
    )
    return dataclasses.replace(job, optimizer=optimizer, steps=8, batch=8, stages=stages)


def weights(folder):
    read = Pretrained(str(folder)).read()
    return read.spec, dict(nnx.to_flat_state(read.params))


def test_distillation_in_three_stages(job, tmp_path):
    for stage, folder in job.runs(tmp_path):
        assert loop.train(loop.prepare(stage, folder, "# resolved\n"), Preemption()) == 0
    metrics = [json.loads(line) for line in (tmp_path / "transfer" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 8
    assert metrics[-1]["mse_0"] < metrics[0]["mse_0"]
    before, teacher = weights(tmp_path / "teacher")
    middle, student = weights(tmp_path / "transfer")
    after, tuned = weights(tmp_path / "finetune")
    assert before.layers == (Attention(),)
    assert middle.layers == after.layers == (Linearized(),)
    for path, variable in teacher.items():
        np.testing.assert_array_equal(student[path].get_value(), variable.get_value())
    changed = {path for path in student if not np.array_equal(student[path].get_value(), tuned[path].get_value())}
    assert changed == {("layers", 0, "mixer", name, "kernel") for name in ("query", "key", "value", "out")}
    steps = (tmp_path / "transfer" / "metrics.jsonl").read_text()
    for stage, folder in job.runs(tmp_path):  # the same command again finds all stages finished
        assert loop.train(loop.prepare(stage, folder, "# resolved\n"), Preemption()) == 0
    assert (tmp_path / "transfer" / "metrics.jsonl").read_text() == steps


def arrays(folder, step):
    """A checkpoint's arrays by path."""
    with ocp.StandardCheckpointer() as reader:
        return {k: np.asarray(v) for k, v in reader.restore(folder / "checkpoints" / f"{step:08d}" / "state").items()}


def step(run, compiled):
    """To the run's end, with a step that was compiled for the same shapes."""
    parts = contextlib.closing(run.manager), contextlib.closing(run.batches)
    with parts[0], parts[1], Progress(run.job.steps, run.step, visible=False) as progress:
        loop.steps(run, compiled, Preemption(), progress)


def test_moments_kept_over_stages_and_over_an_interruption(job, tmp_path):
    """The second stage of ProLong (arXiv 2410.02660) starts from the first's optimiser state, with a new schedule."""
    model = dataclasses.replace(job.model, dtype="bfloat16")  # parameters are not rounded on the way either
    stages = (Stage("short"), Stage("long", keep_moments=True), Stage("new"))
    every = dataclasses.replace(job.checkpoints, every=1)
    job = dataclasses.replace(job, model=model, steps=2, stages=stages, checkpoints=every)
    (short, first), (long, second), (new, _) = job.runs(tmp_path)
    assert (short.moments, long.moments, new.moments) == (None, str(first), None)
    run = loop.prepare(short, first, "# resolved\n")
    compiled = loop.compile_step(run)
    step(run, compiled)

    run = loop.prepare(long, second, "# resolved\n")
    before = arrays(first, 2)
    leaves = jax.tree_util.tree_flatten_with_path({"params": run.state.params, "opt_state": run.state.opt_state})[0]
    handed = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    (place,) = (name for name, leaf in handed.items() if not np.array_equal(leaf, before[name]))
    assert (before[place], handed[place], int(run.state.step)) == (2, 0, 0), "only the place in the schedule is new"
    assert any(leaf.any() for name, leaf in handed.items() if "/mu/" in name)
    assert before.keys() - handed.keys() == {"key", "skipped", "skipped_in_row", "step"}

    step(run, compiled)
    unbroken = arrays(second, 2)
    shutil.rmtree(second / "checkpoints" / "00000002")  # as a run leaves it that was killed in step 2
    resumed = loop.prepare(long, second, "# resolved\n")
    assert resumed.step == 1
    step(resumed, compiled)
    for name, array in arrays(second, 2).items():
        np.testing.assert_array_equal(array, unbroken[name], err_msg=name)


def test_moments_of_other_runs_are_refused(job, tmp_path):
    stages = (Stage("short"), Stage("long", keep_moments=True))
    (short, first), (long, second) = dataclasses.replace(job, stages=stages).runs(tmp_path)
    run = loop.prepare(short, first, "# resolved\n")
    loop.save(run)
    run.manager.close()
    run.batches.close()
    some = dataclasses.replace(long, trainable=("mlp",))
    with pytest.raises(
        CheckpointError, match=r"moments cannot be kept: opt_state/\S* is .* and missing in what is to be"
    ):
        loop.prepare(some, second, "# resolved\n")
    nowhere = dataclasses.replace(long, moments="runs/nowhere")
    with pytest.raises(CheckpointError, match=r"train\.moments: runs/nowhere is not the folder of a training run"):
        loop.prepare(nowhere, second, "# resolved\n")


def test_bad_stages(job):
    with pytest.raises(ValueError, match=r"stage 'a' keeps moments, and none comes before it"):
        dataclasses.replace(job, stages=(Stage("a", keep_moments=True),))
    with pytest.raises(ValueError, match=r"stages are named \['a', 'a'\]"):
        dataclasses.replace(job, stages=(Stage("a"), Stage("a")))
    with pytest.raises(ValueError, match=r"call Train\.resolve first"):
        _ = dataclasses.replace(job, model=Pretrained("somewhere")).spec


def test_longrecipe_spreads_positions_in_its_first_stage_only(tmp_path):
    job, _ = settings.load("train", [ROOT / "configs/run/extend/longrecipe.gin"])
    (spread, _), (anneal, folder) = job.runs(tmp_path)
    assert spread.positions.target == spread.methods[0].max_length == 32768
    assert (anneal.positions, anneal.methods) == (None, ())
    assert anneal.model.source == str(tmp_path / "spread")
    assert folder == tmp_path / "anneal"
    assert (spread.steps, anneal.steps) == (90, 30)
    assert anneal.optimizer.schedule.peak == pytest.approx(spread.optimizer.schedule.peak / 10)


def test_passkey_texts_are_the_tests_questions_with_answers():
    corpus = PasskeyTexts(count=50, least=1, most=4).open("")
    texts = [corpus[i] for i in range(len(corpus))]
    assert texts == [corpus[i] for i in range(50)]
    assert len(set(texts)) == 50
    for text in texts:
        key = text.removesuffix(".").split()[-1]
        assert text.endswith(f"What is the pass key?\nThe pass key is {key}.")
        assert text.count(key) == 3
        assert 1 <= text.count("The grass is green.") <= 4
    np.testing.assert_array_equal(corpus.sizes(), [len(text) for text in texts])
    with pytest.raises(IndexError, match="text 50 of 50"):
        corpus[50]
    with pytest.raises(ValueError, match="5 <= 4 lines"):
        PasskeyTexts(least=5, most=4)
