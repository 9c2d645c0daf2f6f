"""What benchmarks share: a timed run behind a correctness gate, the record of where it ran, JSON and tables."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = Path(__file__).parent / "results"
REST = 1.0
FLOP_CONVENTION = (
    "forward: 4 x D x H x B x visible query-key pairs (causal counted half); backward: 2.5 x forward; recomputation,"
    " masked parts of tiles and sums over head groups are not counted"
)


class GateError(Exception):
    """A result is too far from its reference to be worth timing."""


def relative_error(actual: Any, wanted: Any) -> float:
    """||actual - wanted|| / ||wanted|| in float64; infinite if anything is not finite."""
    actual, wanted = (np.asarray(x, np.float64) for x in (actual, wanted))
    if not np.isfinite(actual).all():
        return float("inf")
    return float(np.linalg.norm(actual - wanted) / max(np.linalg.norm(wanted), 1e-30))


def gate(name: str, actual: Any, wanted: Any, limit: float) -> dict[str, float]:
    """Relative error of each array of a pytree; GateError names the first beyond `limit`."""
    errors = {}
    for (path, a), w in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
        where = name + jax.tree_util.keystr(path)
        errors[where] = relative_error(a, w)
        if not errors[where] <= limit:
            raise GateError(f"{where}: relative error {errors[where]:.2e} exceeds {limit:.0e}")
    return errors


@contextlib.contextmanager
def exclusive() -> Generator[None]:
    """One timing at a time on this machine: benchmark processes compile side by side and take turns on the device."""
    with open(Path(tempfile.gettempdir()) / "lcjax_benchmark.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def milliseconds(run: Any, *args: Any, target: float = 0.15, repeats: int = 5) -> dict[str, float]:
    """Median and spread of the time of one call, each sample a batch of calls of about `target` seconds.

    A jitted `run` is compiled before the device is taken; then the chip rests for `REST` seconds, as its clock falls
    under load and what is timed next should not pay for it.
    """
    if hasattr(run, "lower"):
        run = run.lower(*args).compile()
    with exclusive():
        time.sleep(REST)
        jax.block_until_ready(run(*args))
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        once = max(time.perf_counter() - start, 1e-6)
        calls = max(1, int(target / once))
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                out = run(*args)
            jax.block_until_ready(out)
            samples.append((time.perf_counter() - start) / calls * 1e3)
    return {"ms": float(np.median(samples)), "min_ms": min(samples), "max_ms": max(samples)}


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes read and written in a second by adding one to an array of `size` bytes in place."""
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add_one(jnp.zeros(size // 4, jnp.int32)))
    samples = []
    with exclusive():
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(10):
                x = add_one(x)
            jax.block_until_ready(x)
            samples.append((time.perf_counter() - start) / 10)
    return 2 * size / float(np.median(samples))


def compile_all[K](jobs: Mapping[K, tuple[Callable, Sequence[Any]]]) -> dict[K, Any]:
    """Each (function, shapes) compiled, several at a time; where a call is declined, the reason instead."""

    def one(job):
        run, shapes = job
        try:
            return jax.jit(run).lower(*shapes).compile()
        except Exception as reason:  # a rival may fail in any way
            return f"{type(reason).__name__}: {next(iter(str(reason).splitlines()), '')[:200]}"

    with concurrent.futures.ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        return dict(zip(jobs, pool.map(one, jobs.values()), strict=True))


def tflops(flops: float, ms: float) -> float:
    return flops / ms / 1e9


def environment(commit: str | None = None) -> dict[str, Any]:
    """Device, versions, commit and date of a run. `commit` is for runs outside of the repository."""
    packages = {}
    for name in (
        "jax",
        "jaxlib",
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "tokamax",
        "torch",
        "triton",
        "flash-linear-attention",
        "libtpu",
    ):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "versions": packages,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "flop_convention": FLOP_CONVENTION,
    }


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"


def write(path: str | Path, record: dict[str, Any]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; floats get three significant figures, absent cells a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)

    grid = [list(columns), *([cell(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[n]) for line in grid) for n in range(len(columns))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in grid)
