"""The parent of a run's processes and the watchdog inside them, on processes that only pretend to train."""

import signal
import subprocess
import sys
import threading
import time

from lcjax.train.supervise import Policy, supervise
from lcjax.train.watchdog import STATUS, Watchdog

QUICK = Policy(restarts=1, wait=0.0, grace=10.0)


def processes(*codes):
    return [subprocess.Popen([sys.executable, "-c", code]) for code in codes]


SLEEPS, ENDS, REFUSES = "import time; time.sleep(60)", "pass", "raise SystemExit(2)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def test_a_killed_process_is_named_and_all_are_started_again():
    said, started = [], []

    def start(attempt):
        started.append(processes(*((SLEEPS, KILLED, SLEEPS) if attempt == 0 else (ENDS, ENDS, ENDS))))
        return started[-1]

    assert supervise(start, QUICK, said.append) == 0
    assert said[0] == "process 1 was killed by SIGKILL; stopping the other 2"
    assert "start 2 of 2" in said[1]
    assert [p.returncode for p in started[0]] == [-signal.SIGKILL] * 3, "no survivor is left behind"


def test_a_run_that_dies_each_time_is_given_up():
    said = []
    assert supervise(lambda attempt: processes(KILLED), QUICK, said.append) == 128 + signal.SIGKILL
    assert said[-1] == "gave up after 2 starts"


def test_a_refusal_is_not_repeated():
    starts = []
    assert supervise(lambda attempt: starts.append(attempt) or processes(REFUSES), QUICK, print) == 2
    assert starts == [0]


def test_a_signal_reaches_every_process_and_ends_the_run():
    started = processes(SLEEPS, SLEEPS)
    threading.Timer(1.0, signal.raise_signal, [signal.SIGTERM]).start()
    started_handler = signal.getsignal(signal.SIGTERM)
    assert supervise(lambda attempt: started, QUICK, print) == 128 + signal.SIGTERM, "and is not started again"
    assert [p.wait() for p in started] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) is started_handler


def test_a_stopped_run_that_does_not_end_is_killed():
    """One process has saved and ended, the other waits for it forever."""
    said, codes = [], (f"raise SystemExit({128 + signal.SIGTERM})", SLEEPS)
    status = supervise(lambda attempt: processes(*codes), Policy(saving=0.5), said.append)
    assert status == 128 + signal.SIGKILL
    assert said == [
        "stopped, but not all processes had ended after 0.5 s (--saving): killed them; "
        "the checkpoint before the stop is intact"
    ]


def test_a_signal_that_no_process_heeds():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    started = [subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)]
    assert started[0].stdout.readline(), "deaf from here on"
    threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM]).start()
    assert supervise(lambda attempt: started, Policy(saving=0.5), print) == 128 + signal.SIGKILL
    started[0].stdout.close()


def test_the_watchdog_names_where_each_process_stands(tmp_path, capsys):
    ended = []
    (tmp_path / "process-1.json").write_text('{"step": 6, "line": "loop.py:9 in steps: pass", "time": 0}')
    with Watchdog(tmp_path, 0, patience=0.3, end=ended.append) as watchdog:
        watchdog.beat(7)
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ended == [STATUS]
    said = capsys.readouterr().err
    assert "process 0: no step was finished for 0.3 s after step 7" in said
    assert "process-0: step 7, at test_parent.py:" in said
    assert "process-1: step 6, at loop.py:9 in steps: pass" in said


def test_a_watchdog_that_is_fed_stays_quiet(tmp_path):
    ended = []
    with Watchdog(tmp_path, 0, patience=0.4, end=ended.append) as watchdog:
        for step in range(20):
            watchdog.beat(step)
            time.sleep(0.05)
    assert not ended
    assert list(tmp_path.iterdir()) == [], "its note goes with it"
