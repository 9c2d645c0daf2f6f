"""A run that is killed, anywhere, and started again ends bit for bit as the run that never was."""

import random
import signal

import numpy as np
import pytest

from lcjax import settings
from lcjax.data import build_pipeline, load_tokenizer
from tests.faults.runs import PATIENCE, TINY, TinyRun, wait_until, write_corpus

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder):
    run = TinyRun(folder, "unbroken")
    run.finish()
    return run


def test_killed_at_a_random_step_during_a_save_and_by_sigterm(folder, unbroken, record_property):
    """One run through three faults; what it lost each time is at most the steps since its last checkpoint."""
    moment = random.Random().randint(8, 18)
    record_property("killed_at", moment)
    run = TinyRun(folder, "broken")

    process = run.start()
    wait_until(lambda: len(run.metrics) >= moment, process, run.log)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL

    process = run.start()
    leftovers = {p.name for p in (run.output / "checkpoints").iterdir()}
    saving = lambda: {p.name for p in (run.output / "checkpoints").glob(".saving-*")} - leftovers
    wait_until(saving, process, run.log, poll=0.0005)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    before = run.steps

    process = run.start()
    resumed = before[-1] if before else 0
    wait_until(lambda: run.metrics and run.metrics[-1]["step"] >= max(resumed, 20) + 2, process, run.log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM, run.log.read_text()
    assert run.steps[-1] == run.metrics[-1]["step"], "SIGTERM saves the step it stops at"

    stopped = run.steps[-1]
    assert f"resumed at step {stopped} of {STEPS}" in run.finish()
    assert_same_end(run, unbroken, moment)


def assert_same_end(run, unbroken, moment):
    arrays, data_state = run.checkpoint(STEPS)
    expected, expected_data_state = unbroken.checkpoint(STEPS)
    assert arrays.keys() == expected.keys()
    assert any("params" in name for name in arrays)
    assert any("opt_state" in name for name in arrays)
    assert "key" in arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=f"{name} differs (killed at {moment})")
    assert data_state == expected_data_state
    assert [(m["step"], m["loss"], m["grad_norm"]) for m in run.metrics] == [
        (m["step"], m["loss"], m["grad_norm"]) for m in unbroken.metrics
    ]


def test_the_next_batches_are_those_of_the_unbroken_stream(unbroken):
    job, _ = settings.load("train", [TINY], unbroken.bindings)
    stream = lambda: build_pipeline(job.data, load_tokenizer("bytes"), batch=job.batch, length=job.length)
    fresh, restored = stream(), stream()
    for _ in range(STEPS):
        next(fresh)
    restored.set_state(unbroken.checkpoint(STEPS)[1])
    for _ in range(20):
        batch = next(restored)
        for name, array in next(fresh).items():
            np.testing.assert_array_equal(array, batch[name])


def test_a_finished_run_says_so_and_trains_no_further(unbroken):
    said = unbroken.finish()
    assert "already finished at step 40" in said
    assert unbroken.metrics[-1]["step"] == STEPS


def test_another_configuration_is_refused_with_what_differs(unbroken):
    said = unbroken.finish("AdamW.b2 = 0.99", status=2)
    assert "optimizer.b2: 0.95 -> 0.99" in said
    assert "Traceback" not in said
