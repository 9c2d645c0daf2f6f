"""Runs of several processes that lose one, are preempted, hang, or go on with another number of hosts."""

import contextlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from lcjax.train.supervise import free_port
from tests.faults.runs import PATIENCE, QUICK, ROOT, TinyRun, wait_until, write_corpus

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder):
    """One process with two devices: the mesh of two processes with one each."""
    run = TinyRun(folder, "unbroken", "DataSpec.shards = 4")
    run.finish(XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count=2")
    return run


@pytest.fixture
def many(folder):
    """Makes a run of several processes, of which none outlives its test."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(contextlib.closing(ManyRun(folder, name, "DataSpec.shards = 4")))


class ManyRun(TinyRun):
    """One run of several processes on this host."""

    def start_all(self, count, *bindings):
        port = free_port()
        where = [f"--coordinator=localhost:{port}", f"--processes={count}"]
        return [self.start(*bindings, flags=[*where, f"--process={n}"]) for n in range(count)]

    def launch(self, count, *options):
        """Start the parent, which starts the processes."""
        script = [sys.executable, str(ROOT / "launch.py"), f"--processes={count}", "--wait=0", *options, "--"]
        return self.start(command=[*script, *self.command()[2:]])


def children(parent: subprocess.Popen) -> list[int]:
    """Process ids of the parent's processes, in the order they were started."""
    with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as file:
        return sorted(int(pid) for pid in file.read().split())


def assert_same_losses(run, unbroken):
    got, expected = ({m["step"]: m["loss"] for m in r.metrics} for r in (run, unbroken))
    assert got.keys() == expected.keys()
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def kill_one(run, count, victim):
    parent = run.launch(count)
    wait_until(lambda: len(run.metrics) >= 12 and run.steps, parent, run.log)  # a step is saved by then
    subprocess.run(["kill", "-KILL", str(children(parent)[victim])], check=True)
    assert parent.wait(PATIENCE) == 0, run.log.read_text()
    said = run.log.read_text()
    assert f"process {victim} was killed by SIGKILL; stopping the other {count - 1}" in said
    assert "resumed at step " in said
    return run


def test_a_killed_process_is_replaced_and_the_losses_are_those_of_the_unbroken_run(many, unbroken):
    assert_same_losses(kill_one(many("lost-1-of-2"), 2, victim=1), unbroken)


@pytest.mark.slow
def test_a_lost_coordinator(many, unbroken):
    assert_same_losses(kill_one(many("lost-0-of-2"), 2, victim=0), unbroken)


@pytest.mark.slow
def test_a_killed_process_of_four(many, unbroken):
    assert_same_losses(kill_one(many("lost-2-of-4"), 4, victim=2), unbroken)


@pytest.mark.slow
def test_a_notice_to_one_process_stops_all_at_one_step_and_other_hosts_go_on(many, unbroken):
    run = many("preempted")
    processes = run.start_all(4)
    wait_until(lambda: len(run.metrics) >= 10, processes[0], run.log)
    processes[2].send_signal(signal.SIGTERM)
    statuses = [process.wait(PATIENCE) for process in processes]
    assert statuses == [128 + signal.SIGTERM] * 4, run.log.read_text()
    assert run.steps[-1] == run.metrics[-1]["step"] < STEPS

    processes = run.start_all(2)
    assert [process.wait(PATIENCE) for process in processes] == [0, 0], run.log.read_text()
    assert_same_losses(run, unbroken)


@pytest.mark.slow
def test_a_process_that_stands_still_is_named_with_the_lines_of_all(many):
    run = many("hung")
    processes = run.start_all(2, "Reports.hang_seconds = 8.0", "train.steps = 100000")
    wait_until(lambda: len(run.metrics) >= 5, processes[0], run.log)
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(PATIENCE) == 75, run.log.read_text()
    processes[1].kill()
    processes[1].wait(PATIENCE)
    said = run.log.read_text()
    assert "process 0: no step was finished for 8 s" in said
    assert "process-0: step" in said
    assert "process-1: step" in said
    assert "loop.py:" in said


@pytest.mark.slow
def test_processes_with_different_configurations_all_stop(many):
    run = many("different")
    port = free_port()
    where = [f"--coordinator=localhost:{port}", "--processes=2"]
    processes = [run.start(f"train.seed = {n}", flags=[*where, f"--process={n}"]) for n in range(2)]
    assert [process.wait(PATIENCE) for process in processes] == [2, 2], run.log.read_text()
    assert "'train.seed = 0' on process 0, 'train.seed = 1' on process 1" in run.log.read_text()


@pytest.mark.slow
def test_a_sample_is_decoded_by_all_processes_where_the_parameters_lie(many, unbroken):
    """Of scanned layers, whose weights lie stacked until then. The corpus is prepared by the unbroken run."""
    run = many("sampled")
    sample = ("train.sample = @Sample()", "Sample.prompts = ('Document',)", "Sample.max_new_tokens = 4")
    scan = ("ModelSpec.num_layers = 2", "train.options = @StepOptions()", "StepOptions.scan = True")
    processes = run.start_all(2, "train.steps = 8", *sample, *scan)
    assert [process.wait(PATIENCE) for process in processes] == [0, 0], run.log.read_text()
    assert run.log.read_text().count("--- Document") == 1, "process 0 tells"


@pytest.mark.slow
def test_two_processes_answer_together_as_one_does(folder, many, unbroken):
    """The prompt is that of process 0, which alone tells; the model is a run's, with a process's share on each."""
    run = many("answers")
    bound = (f"pretrained.source = '{unbroken.output}'", "generate.chat = False", "generate.max_new_tokens = 8")
    mesh = ("generate.mesh = @Mesh()", "generate.engine = @Engine()", "Engine.batch = 2", "Engine.chunk = 16")
    command = [sys.executable, str(ROOT / "decode.py"), f"--gin_file={ROOT / 'configs/decode/smollm2.gin'}"]

    def start(name, *flags, bindings=(*bound, *mesh)):
        bindings = [f"--gin_bindings={binding}" for binding in bindings]
        return run.start(command=[*command, *bindings, f"--output={folder / name}", *flags])

    assert start("alone", "--prompt=Document").wait(PATIENCE) == 0, run.log.read_text()
    where = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    together = [start(f"answers-{n}", f"--prompt={'Document' * (n == 0)}", *where, f"--process={n}") for n in range(2)]
    assert [process.wait(PATIENCE) for process in together] == [0, 0], run.log.read_text()
    told = [folder / name / "answers.txt" for name in ("alone", "answers-0", "answers-1")]
    assert told[0].read_text() == told[1].read_text()
    assert len(told[0].read_text()) > 1
    assert not told[2].exists()
    where = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    apart = [start("apart", "--prompt=x", *where, f"--process={n}", bindings=bound) for n in range(2)]
    assert [process.wait(PATIENCE) for process in apart] == [2, 2], run.log.read_text()
    assert "generate.mesh is not set, and 2 processes answer together" in run.log.read_text()


@pytest.mark.slow
def test_two_processes_train_in_stages_and_keep_moments(many):
    """The second stage reads the first's parameters and moments on both processes."""
    run = many("stages")
    stages = ("train.stages = (@one/Stage(), @two/Stage())", "one/Stage.name = 'one'", "two/Stage.name = 'two'")
    moments = ("two/Stage.keep_moments = True", "train.steps = 8")
    processes = run.start_all(2, *stages, *moments)
    assert [process.wait(PATIENCE) for process in processes] == [0, 0], run.log.read_text()
    assert (run.output / "two" / "checkpoints" / "00000008").is_dir()
