"""The loop in this process, on eight virtual devices: what a mesh, remat, scan and micro-batches must not change."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lcjax import settings
from lcjax.checkpoint.run import load_run
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention
from lcjax.train import loop
from lcjax.train.job import MeshSpec, Reports, Sample
from lcjax.train.optimizers import Cosine
from lcjax.train.preempt import Preemption
from lcjax.train.step import StepOptions
from tests.faults.runs import TINY, TinyRun, write_corpus


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    write_corpus(folder / "corpus")
    job, _ = settings.load("train", [TINY], TinyRun(folder, "run").bindings)
    mixers = (Attention(window=8, sink=2), GatedLinear())
    model = dataclasses.replace(job.model, vocab_size=264, num_kv_heads=2, pattern=mixers, num_layers=4)
    optimizer = dataclasses.replace(job.optimizer, schedule=Cosine(0.01, warmup=1))
    return dataclasses.replace(job, batch=8, steps=4, model=model, optimizer=optimizer)


def run(job, output):
    assert loop.train(loop.prepare(job, output, "# resolved\n"), Preemption()) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(job, folder):
    return run(job, folder)


def test_metrics_of_a_run(plain):
    assert [line["step"] for line in plain] == [1, 2, 3, 4]
    assert plain[0]["loss"] == pytest.approx(np.log(264), rel=0.05)
    assert plain[-1]["loss"] < plain[0]["loss"]
    assert {"tokens_per_second", "grad_norm", "learning_rate", "memory_gib", "data_share", "skipped"} <= plain[0].keys()


def test_mesh_remat_scan_and_micro_batches_change_no_number(job, plain, folder, tmp_path, capsys):
    other = dataclasses.replace(
        job,
        mesh=MeshSpec(data=2, fsdp=2, tensor=2),
        options=StepOptions(accumulate=2, remat="full", scan=True),
        reports=Reports(every=1, tensorboard=True, profile_start=2, profile_steps=1),
        sample=Sample(prompts=("word",), max_new_tokens=8),
    )
    metrics = run(other, tmp_path)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([m[name] for m in metrics], [m[name] for m in plain], rtol=2e-4)
    saved, expected = (load_run(output, dtype="float32").params for output in (tmp_path, folder))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), saved, expected)  # layer by layer
    assert list((tmp_path / "profile").rglob("*.xplane.pb")), "the profile window leaves a trace"
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert (tmp_path / "config.gin").read_text() == "# resolved\n"
    said = capsys.readouterr().out
    assert "MFLOP per token (2 FLOPs a multiply-add" in said
    assert "--- word" in said
