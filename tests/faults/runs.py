"""Training runs as processes of their own, to be killed at will."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "faults" / "tiny.gin"
PATIENCE = 240  # seconds for a step of a test that takes a few; the machine may be busy
QUICK = "--xla_backend_optimization_level=0"  # compiling is most of these runs


def write_corpus(folder: Path) -> Path:
    """A few documents of different lengths; returns the file pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        words = " ".join(f"word{(i * j) % 17} and number {j}" for j in range(5 + 11 * i))
        (folder / f"{i:02d}.txt").write_text(f"Document {i}. {words}.\n")
    return folder / "*.txt"


class TinyRun:
    """One output folder and the command that trains into it."""

    def __init__(self, folder: Path, name: str, *bindings: str):
        self.output = folder / name
        self.started: list[subprocess.Popen] = []
        self.cache = folder / "compiled"
        self.bindings = (
            f"TextFiles.paths = ('{folder / 'corpus' / '*.txt'}',)",
            f"DataSpec.data_dir = '{folder / 'prepared'}'",
            *bindings,
        )

    def command(self, *bindings: str, flags: Sequence[str] = ()) -> list[str]:
        bound = [f"--gin_bindings={binding}" for binding in (*self.bindings, *bindings)]
        files = [f"--gin_file={TINY}", f"--output={self.output}"]
        return [sys.executable, str(ROOT / "train.py"), *files, *bound, *flags]

    def start(
        self,
        *bindings: str,
        cache: bool = True,
        flags: Sequence[str] = (),
        command: list[str] | None = None,
        **environment: str,
    ) -> subprocess.Popen:
        """Start training, or `command` in its place; its console goes to `log` next to the output folder."""
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "COLUMNS": "200", **environment}
        if cache:
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        with open(self.log, "ab") as log:
            command = command or self.command(*bindings, flags=flags)
            where = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
            self.started.append(subprocess.Popen(command, start_new_session=True, **where))
        return self.started[-1]

    def close(self) -> None:
        """Leave no process behind, nor what it started itself, whatever failed."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def finish(self, *bindings: str, status: int = 0, **options) -> str:
        """Train to the end; returns what this process printed."""
        before = self.log.stat().st_size if self.log.exists() else 0
        process = self.start(*bindings, **options)
        code = process.wait(timeout=PATIENCE)
        said = self.log.read_text()[before:]
        assert code == status, said
        return said

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    @property
    def metrics(self) -> list[dict]:
        path = self.output / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def steps(self) -> list[int]:
        """Committed checkpoints."""
        return sorted(int(p.name) for p in (self.output / "checkpoints").glob("[0-9]*"))

    def checkpoint(self, step: int) -> tuple[dict[str, np.ndarray], dict]:
        """(arrays by path, data state) of a checkpoint."""
        folder = self.output / "checkpoints" / f"{step:08d}"
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder / "state")
        return {k: np.asarray(v) for k, v in arrays.items()}, json.loads((folder / "data.json").read_text())


def wait_until(condition, process: subprocess.Popen, log: Path, poll: float = 0.005) -> None:
    """Poll until `condition()`; fail with the log when the process ends or time is up before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before the fault:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no sign of the awaited moment:\n{log.read_text()}"
        time.sleep(poll)
