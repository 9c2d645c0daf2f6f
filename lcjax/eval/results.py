"""results.json: `{task: {length: value}, "_run": {schema, commit, device, versions, config}}`.

Under `_run` an evaluation adds `seconds`, one for each of its tasks with compilation, and `peak_device_bytes`.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

SCHEMA = 1
PACKAGES = ("lcjax", "jax", "jaxlib", "flax", "numpy")


def describe_run(config: str) -> dict[str, Any]:
    """What is needed to say exactly what ran."""
    return {
        "schema": SCHEMA,
        "commit": commit(),
        "device": describe_device(),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "config": config,
    }


def describe_device() -> str:
    """Such as '1 x NVIDIA H100 80GB HBM3', or 'cpu (2 cores)'."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu ({len(os.sched_getaffinity(0))} cores)"
    return f"{len(devices)} x {devices[0].device_kind}"


def peak_device_bytes() -> int | None:
    """The most bytes that this process has held on one of its devices; None where the platform does not say (CPU)."""
    found = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if stats and "peak_bytes_in_use" in stats]
    return max(peaks, default=None)


def commit() -> str | None:
    """The commit of the source tree, with '+' where it has changes; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    git = lambda *words: subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write_results(output: Path, tables: Mapping[str, Mapping[str, float]], run: Mapping[str, Any]) -> Path:
    """Write `results.json` whole or not at all."""
    if "_run" in tables:
        raise ValueError("results: a task cannot be named '_run', which describes the run; rename it")
    path = output / "results.json"
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps({**tables, "_run": run}, indent=2) + "\n", encoding="utf-8")
    return draft.replace(path)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
