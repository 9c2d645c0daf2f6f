"""The parent of training processes: it reports which one died, and how, and starts all of them again.

When a process is lost, JAX's runtime aborts the others from C++, so none of them can tell what happened; a parent that
never touches a device can. A process that ends by its own decision (bad input, a finished or stopped run) is not
started again.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
STOPS = (signal.SIGTERM, signal.SIGINT)
STOPPED = tuple(128 + number for number in STOPS)
"""Statuses of a process that a signal stopped after it saved: the run is not started again."""
REFUSED = 2
"""Status of a process that will not run what it was given."""


@dataclass(frozen=True)
class Policy:
    """How often a run is started again, and after how many seconds.

    grace: seconds that survivors of a loss may take to end. saving: those that the processes of a run that is stopped
    may take to save their last step and end.
    """

    restarts: int = 3
    wait: float = 5.0
    grace: float = 30.0
    saving: float = 600.0


def supervise(start: Callable[[int], Sequence[subprocess.Popen]], policy: Policy, say: Callable[[str], None]) -> int:
    """Run the processes of `start(attempt)` until all end well or by decision; returns the exit status."""
    attempt = 0
    while True:
        processes = start(attempt)
        asked: list[float] = []  # when, by the monotonic clock
        previous = {number: signal.signal(number, _pass_on(processes, asked)) for number in STOPS}
        try:
            late = lambda asked=asked: bool(asked) and time.monotonic() > asked[0] + policy.saving
            index, status = _first_failure(processes, late)
            if status in STOPPED:
                asked.append(time.monotonic())  # the others are saving the same step
            if asked and _killed(processes, late):
                status = -signal.SIGKILL
                say(
                    f"stopped, but not all processes had ended after {policy.saving:g} s (--saving): killed them; "
                    "the checkpoint before the stop is intact"
                )
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if asked or index is None:
            return status if status >= 0 else 128 - status
        if status == REFUSED:
            _stop(processes, policy.grace)
            return status
        say(f"process {index} {cause(status)}; stopping the other {len(processes) - 1}")
        _stop(processes, policy.grace)
        if attempt == policy.restarts:
            say(f"gave up after {attempt + 1} starts")
            return status if status > 0 else 128 - status
        attempt += 1
        say(f"start {attempt + 1} of {policy.restarts + 1} in {policy.wait:g} s; the run goes on from its checkpoint")
        time.sleep(policy.wait)


def cause(status: int) -> str:
    """What an exit status says."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _pass_on(processes: Sequence[subprocess.Popen], asked: list[float]) -> Callable[..., None]:
    def handler(signum: int, frame: object) -> None:
        asked.append(time.monotonic())
        for process in processes:
            process.send_signal(signum)

    return handler


def _first_failure(processes: Sequence[subprocess.Popen], late: Callable[[], bool]) -> tuple[int | None, int]:
    """(which process failed first, its status), or (None, 0) when all ended well or it is late."""
    while not late():
        statuses = [process.poll() for process in processes]
        if failed := [(n, status) for n, status in enumerate(statuses) if status]:
            # A process that was killed tells more than the ones that its loss aborted within the same moment.
            return min(failed, key=lambda one: one[1] != -signal.SIGKILL)
        if all(status == 0 for status in statuses):
            break
        time.sleep(0.05)
    return None, 0


def _killed(processes: Sequence[subprocess.Popen], late: Callable[[], bool]) -> bool:
    """Wait for processes that save and end; whether it got late and the rest were killed."""
    while any(process.poll() is None for process in processes):
        if late():
            for process in processes:
                process.kill()
                process.wait()
            return True
        time.sleep(0.05)
    return False


def _stop(processes: Sequence[subprocess.Popen], grace: float) -> None:
    deadline = time.monotonic() + grace
    for process in processes:
        if process.poll() is None:
            process.kill()  # without its peer it can neither step nor save
    for process in processes:
        process.wait(max(0.1, deadline - time.monotonic()))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `launch.py`."""
    parser = argparse.ArgumentParser(description="Run train.py in processes that are started again when one dies.")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes on this host (default 1)")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="starts after the first (default 3)")
    parser.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="before a restart (default 5)")
    parser.add_argument(
        "--saving", type=float, default=600.0, metavar="SECONDS", help="for a stopped run (default 600)"
    )
    parser.add_argument("rest", nargs="*", metavar="-- FLAGS", help="flags of train.py")
    args = parser.parse_args(argv)
    for name, least in (("processes", 1), ("restarts", 0), ("wait", 0), ("saving", 0)):
        if (number := getattr(args, name)) < least:
            parser.error(f"--{name}={number:g} must be at least {least}")

    def start(attempt: int) -> list[subprocess.Popen]:
        flags: list[list[str]] = [[]]
        if args.processes > 1:
            common = [f"--coordinator=localhost:{free_port()}", f"--processes={args.processes}"]
            flags = [[*common, f"--process={n}"] for n in range(args.processes)]
        command = [sys.executable, str(TRAIN), *args.rest]
        return [subprocess.Popen([*command, *own], env=dict(os.environ)) for own in flags]

    say = lambda text: print(f"launch.py: {text}", file=sys.stderr, flush=True)
    return supervise(start, Policy(args.restarts, args.wait, saving=args.saving), say)
