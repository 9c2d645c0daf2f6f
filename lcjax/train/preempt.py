"""SIGTERM and SIGINT: noted at once, acted on at the next safe point.

Python runs a signal handler between two bytecodes of the main thread, so a compile or a decode on the main thread
would hold a signal back until it returns. Long calls into the runtime therefore go to a worker thread (`interruptible`)
while the main thread waits for either of the two.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A stop was asked for during a stage that has nothing to save. Not an Exception: nothing may swallow it."""

    def __init__(self, signum: int, stage: str):
        super().__init__(f"{signal.Signals(signum).name} during {stage}")
        self.signum = signum


class Preemption:
    """A context in which SIGTERM and SIGINT set `signum` instead of killing; a second SIGINT kills as usual.

    Leaving it by Interrupted ends the process with status 128 + signal number, as a shell reports a signal.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._arrived = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if isinstance(error, Interrupted):
            print(f"stopped by {error}; checkpoints are as they were", file=sys.stderr)
            # The worker is still inside the runtime; an orderly exit would wait for it or crash under it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + error.signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signum = signum
        self._arrived.set()

    @property
    def requested(self) -> bool:
        """True once a stop was asked for."""
        return self._arrived.is_set()

    def interruptible[T](self, stage: str, call: Callable[[], T]) -> T:
        """Run `call` in a worker thread and return its result; raise Interrupted as soon as a signal arrives.

        The worker cannot be stopped from outside: it dies with the process, when the context is left.
        """
        outcome: list[T] = []
        failure: list[BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                outcome.append(call())
            # Every failure, a KeyboardInterrupt in a library included, belongs to the caller's thread.
            except BaseException as error:
                failure.append(error)
            finally:
                done.set()

        threading.Thread(target=work, name=stage, daemon=True).start()
        while not done.wait(timeout=0.05):
            if self.signum is not None:
                raise Interrupted(self.signum, stage)
        if failure:
            raise failure[0]
        return outcome[0]
