"""What is measured about a kernel on the device at hand: its tiles, and where it is faster than the library's.

A file of `tuned/` is named after JAX's device kind and holds, per kernel and head dim, the tiles and the timings that
chose them; without it there is a documented heuristic. `python -m benchmarks.attention --search` measures and writes
one. Those of TPUs were chosen by the compiler's schedules and not on a device: `python -m benchmarks.tpu_schedule
--tune`. An entry with `faster_from` in place of tiles is written by hand, from the table of `python -m
benchmarks.attention`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from importlib import resources
from typing import Any

import jax

from pallas_kernels.op import interpreter, platform

# Hopper, where nothing was measured: the largest tiles whose buffers fit 227 KiB of shared memory with two steps in
# flight (keys and values of 128 x D, then queries and output), and 64-row backward tiles, as two 64 x 128 accumulators
# and two 64 x 64 score tiles fill the registers of a warpgroup.
HEURISTIC: dict[str, dict[int, dict[str, Any]]] = {
    "attention_forward": {
        64: {"block_k": 128, "stages": 4},
        128: {"block_k": 128, "stages": 2},
        256: {"block_k": 64, "stages": 2},
    },
    "attention_backward": {
        64: {"dq_stages": 4, "dkv_stages": 4},
        128: {"dq_stages": 2, "dkv_stages": 2},
        256: {"dq_stages": 2, "dkv_stages": 2},
    },
    # TPU: 1024 x 1024 tiles, whose work hides their copies and their turns of the loop, and products of 512 keys, whose
    # scores are what the registers can spill. Heads of 256 take half the tile, as both products double. Longer tiles
    # gain a few per cent on dense masks and lose more on sparse ones.
    "attention_tpu": {
        128: {"block_q": 1024, "block_k": 1024, "compute_k": 512},
        256: {"block_q": 512, "block_k": 512, "compute_k": 512},
    },
}


def file_name(device_kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def tiles(kernel: str, *, dim: int) -> dict[str, Any]:
    """Keyword arguments of the kernel's tile record for head dim `dim`, rounded up to a known one."""
    return dict(_tiles(kernel, dim, _device_kind()))


def faster_from(kernel: str, *, dim: int) -> float:
    """Tokens a row from which on the kernel is measured to be faster than the library's, both ways; else infinite."""
    return _faster_from(kernel, dim, _device_kind())


def _device_kind() -> str | None:
    """The kind of device that code is traced for, also where it is only compiled for one."""
    if platform() == "cpu" or interpreter() is not None:
        return None
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None:
        return target.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == platform() else None


@functools.cache
def _tiles(kernel: str, dim: int, device_kind: str | None) -> dict[str, Any]:
    choices = dict(HEURISTIC[kernel])
    for entry in measured(device_kind) if device_kind else ():
        if entry["kernel"] == kernel:
            choices[entry["dim"]] = entry["tiles"]
    return choices[min((d for d in choices if d >= dim), default=max(choices))]


@functools.cache
def _faster_from(kernel: str, dim: int, device_kind: str | None) -> float:
    entries = measured(device_kind) if device_kind else []
    found = (float(entry["faster_from"]) for entry in entries if (entry["kernel"], entry["dim"]) == (kernel, dim))
    return next(found, math.inf)


def measured(device_kind: str) -> list[dict[str, Any]]:
    """Entries of the device's file, or nothing."""
    path = resources.files("pallas_kernels") / "tuned" / file_name(device_kind)
    return json.loads(path.read_text())["entries"] if path.is_file() else []
