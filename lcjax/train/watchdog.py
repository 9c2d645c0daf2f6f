"""A watch over a run's progress: when steps stop coming, it says where every process stands, and may end the run.

Every process notes its step and the line that it is at in a small file beside the checkpoints. The note is written by a
thread, since a process that hangs, in a collective whose partner is gone or in a slow disk, runs no other code.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

STATUS = 75  # as sysexits.h has it: a temporary failure, start again


class Watchdog:
    """Between `with`, `beat(step)` has to be called at least every `patience` seconds from the thread that entered.

    folder: shared by the processes. patience: None never barks. end: called with the exit status after the report.
    """

    def __init__(self, folder: Path, process: int, patience: float | None, end: Callable[[int], None] = os._exit):
        self._note = folder / f"process-{process}.json"
        self._process, self._patience, self._end = process, patience, end
        self._watched = threading.get_ident()
        self._step, self._beaten = 0, time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._patience is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()
            self._note.unlink(missing_ok=True)

    def beat(self, step: int) -> None:
        """A step was finished."""
        self._step, self._beaten = step, time.monotonic()

    def _watch(self) -> None:
        assert self._patience is not None
        self._write()  # at once: a process that stops dead soon has told where it was
        while not self._left.wait(min(self._patience / 4, 10.0)):
            self._write()
            if time.monotonic() - self._beaten > self._patience:
                print(self.report(), file=sys.stderr, flush=True)
                self._end(STATUS)
                return

    def _write(self) -> None:
        line = last_line(sys._current_frames().get(self._watched))
        draft = self._note.with_suffix(".part")
        draft.write_text(json.dumps({"step": self._step, "line": line, "time": time.time()}))
        draft.rename(self._note)

    def report(self) -> str:
        """What hangs, and the last line of every process that left a note."""
        told = [f"process {self._process}: no step was finished for {self._patience:g} s after step {self._step}"]
        for note in sorted(self._note.parent.glob("process-*.json")):
            found = json.loads(note.read_text())
            age = max(0.0, time.time() - found["time"])
            told.append(f"  {note.stem}: step {found['step']}, at {found['line']} ({age:.0f} s ago)")
        return "\n".join(told)


def last_line(frame: FrameType | None) -> str:
    """The innermost line of this project in a stack, and what it calls."""
    if frame is None:
        return "the end of its thread"
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if f"{os.sep}lcjax{os.sep}" in entry.filename] or stack
    place = own[-1]
    return f"{Path(place.filename).name}:{place.lineno} in {place.name}: {place.line}"
