"""SIGTERM and SIGINT are acted on in time, wherever the run is."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from lcjax.train.preempt import Interrupted, Preemption
from tests.faults.runs import PATIENCE, ROOT, TinyRun, wait_until, write_corpus


def test_sigint_during_the_compile_ends_the_run_within_five_seconds(tmp_path):
    write_corpus(tmp_path / "corpus")
    run = TinyRun(tmp_path, "compiling", "ModelSpec.num_layers = 12")
    process = run.start(cache=False)
    wait_until(lambda: "compiling" in run.log.read_text(), process, run.log)
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 128 + signal.SIGINT, run.log.read_text()
    assert time.monotonic() - sent < 5
    assert "stopped by SIGINT during compilation" in run.log.read_text()
    assert run.steps == []


STUCK = """
import threading
from lcjax.train.preempt import Preemption
with Preemption() as stop:
    print("ready", flush=True)
    stop.interruptible("decoding", threading.Event().wait)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_never_returns_is_left_at_once(signum):
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    sent = time.monotonic()
    process.send_signal(signum)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signum
    assert time.monotonic() - sent < 5
    assert f"stopped by {signal.Signals(signum).name} during decoding".encode() in said


def test_interruptible_gives_results_and_failures_of_the_call():
    stop = Preemption()
    assert stop.interruptible("work", lambda: threading.current_thread().name) == "work"
    with pytest.raises(ZeroDivisionError):
        stop.interruptible("work", lambda: 1 // 0)


def test_a_signal_is_noted_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Interrupted, match="SIGTERM during work"):
            stop.interruptible("work", lambda: time.sleep(1))
    assert signal.getsignal(signal.SIGTERM) is before
