"""Block-sparse attention against cuDNN, tokamax and FlexAttention, on the same inputs.

    python -m benchmarks.attention            # gate, then times: benchmarks/results/attention_<device>.json and a plot
    python -m benchmarks.attention --search   # measures tiles and writes pallas_kernels/tuned/<device>.json

Rivals that are not installed, or cannot run a pattern, are left out. FlexAttention runs in a process of its own, where
PyTorch is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from pallas_kernels import Unsupported, block_sparse_attention, tuning
from pallas_kernels.masks import Causal, Mask, Sink, Stride, Window

PATTERNS: dict[str, Mask] = {
    "causal": Causal(),
    "window_4096": Causal() & Window(4096),
    "sink_128_window_4096": Causal() & (Sink(128) | Window(4096)),
    "sink_64_window_2048_stride_64x64": Causal() & (Sink(64) | Window(2048) | Stride(block=64, every=64)),
}
GATES: dict[str, Mask] = {  # the same rules at sizes that bite at a length the reference can take
    "causal": Causal(),
    "window_4096": Causal() & Window(500),
    "sink_128_window_4096": Causal() & (Sink(100) | Window(300)),
    "sink_64_window_2048_stride_64x64": Causal() & (Sink(64) | Window(200) | Stride(block=64, every=4)),
}
GATE_LENGTH, GATE_LIMIT = 2048 + 7, 1e-2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shape of a run."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    batch: int = 1

    def inputs(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """q, k, v, do in bfloat16."""

        def make():
            heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
            keys = jax.random.split(jax.random.key(seed), 4)
            shapes = [(self.batch, self.length, h, self.dim) for h in heads]
            return tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))

        return jax.jit(make)()

    def flops(self, mask: Mask, backward: bool) -> float:
        return (3.5 if backward else 1.0) * 4 * self.dim * self.heads * self.batch * visible_pairs(mask, self.length)


def visible_pairs(mask: Mask, length: int) -> float:
    """Query-key pairs of causal self-attention under a mask without second intervals."""
    plan = mask.plan(1, length, length, 64, 64)
    key = np.arange(length, dtype=np.int64)
    sink, window = (int(np.asarray(x)[0]) for x in (plan.sink, plan.window))
    end = np.where(key < sink, length, key + max(window, 0))
    if plan.expiry is not None:
        end = np.maximum(end, np.asarray(plan.expiry, np.int64)[0][key // plan.block_k])
    rows = np.clip(np.minimum(end, length) - key, 0, None)
    return float(rows.sum() - length / 2) if sink >= length else float(rows.sum())


def ours(mask: Mask, implementation: str | None) -> Callable:
    return lambda q, k, v: block_sparse_attention(q, k, v, mask, implementation=implementation)


def rivals(name: str) -> dict[str, Callable]:
    """JAX functions of (q, k, v) that compute the pattern."""
    window = {"causal": None, "window_4096": (4095, 0)}
    if name not in window:
        return {}
    found = {
        "cudnn": functools.partial(
            jax.nn.dot_product_attention, is_causal=True, local_window_size=window[name], implementation="cudnn"
        )
    }
    if importlib.util.find_spec("tokamax") is not None:
        tokamax = importlib.import_module("tokamax")
        found["tokamax"] = functools.partial(
            tokamax.dot_product_attention, is_causal=True, local_window_size=window[name], implementation="mosaic_gpu"
        )
    return found


def with_gradient(attend: Callable) -> Callable:
    def run(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, vjp(do)

    return run


def check(names: list[str], implementation: str | None, dim: int) -> dict[str, float]:
    """Errors against the float32 reference, forward and gradients, for each pattern scaled to a short length."""
    q, k, v, do = Sizes(GATE_LENGTH, heads=4, kv_heads=2, dim=dim).inputs()
    wide = [x.astype(jnp.float32) for x in (q, k, v, do)]
    errors = {}
    for name in names:
        mask = GATES[name]
        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(with_gradient(ours(mask, "reference")))(*wide)
        actual = jax.jit(with_gradient(ours(mask, implementation)))(q, k, v, do)
        errors |= common.gate(name, actual, wanted, GATE_LIMIT)
    return errors


def measure(name: str, sizes: Sizes, runners: dict[str, Callable]) -> list[dict[str, Any]]:
    mask, (q, k, v, do) = PATTERNS[name], sizes.inputs()
    rows = []
    for (who, attend), backward in itertools.product(runners.items(), (False, True)):
        row: dict[str, Any] = {
            "pattern": name,
            "length": sizes.length,
            "what": who,
            "pass": "fwd+bwd" if backward else "fwd",
        }
        try:
            run = jax.jit(with_gradient(attend) if backward else attend)
            row |= common.milliseconds(run, q, k, v, *((do,) if backward else ()))
            row["tflops"] = common.tflops(sizes.flops(mask, backward), row["ms"])
        except (Unsupported, NotImplementedError, ValueError, RuntimeError) as reason:
            row["refused"] = str(reason).splitlines()[0][:200]
        rows.append(row)
    return rows


def density(sizes: Sizes, implementation: str | None) -> list[dict[str, Any]]:
    """Forward time of windows from 1/64 of the length to all of it, and the share of the causal pairs they see."""
    q, k, v, _ = sizes.inputs()
    whole = visible_pairs(Causal(), sizes.length)
    rows = []
    for part in (64, 32, 16, 8, 4, 2, 1):
        mask = Causal() & Window(sizes.length // part)
        time = common.milliseconds(jax.jit(ours(mask, implementation)), q, k, v)
        rows.append({"length": sizes.length, "density": visible_pairs(mask, sizes.length) / whole, **time})
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    x, y = [r["density"] for r in rows], [r["ms"] for r in rows]
    axes.loglog(x, y, "o-", label="forward")
    axes.loglog(x, [y[-1] * d for d in x], "--", label="dense time x density")
    axes.set(xlabel="share of causal pairs", ylabel="ms", title=f"T = {rows[0]['length']}")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=150)


def flex(names: list[str], lengths: list[int], heads: int, kv_heads: int, dim: int) -> list[dict[str, Any]]:
    """FlexAttention's rows, from a process that has PyTorch; none where it is absent."""
    if importlib.util.find_spec("torch") is None:
        return []
    script = Path(__file__).with_name("flex_attention.py")
    command = [sys.executable, str(script), ",".join(names), *map(str, (heads, kv_heads, dim, *lengths))]
    with common.exclusive():
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return [{"what": "flex", "refused": done.stderr.strip().splitlines()[-1][:300]}]
    return json.loads(done.stdout.splitlines()[-1])


def search(sizes: Sizes, candidates: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The fastest tiles of each kernel for the head dim, on the sink and window pattern, with all timings."""
    from pallas_kernels.attention import mosaic_gpu
    from pallas_kernels.attention.mosaic_gpu_bwd import BackwardTiles
    from pallas_kernels.attention.mosaic_gpu_fwd import ForwardTiles

    mask, (q, k, v, do) = PATTERNS["sink_128_window_4096"], sizes.inputs()
    entries = []
    for kernel, record, argument, backward in (
        ("attention_forward", ForwardTiles, "forward_tiles", False),
        ("attention_backward", BackwardTiles, "backward_tiles", True),
    ):
        timings = []
        for tiles in candidates[kernel]:
            attend = mosaic_gpu.with_tiles(mask, **{argument: record(**tiles)})
            run = jax.jit(with_gradient(attend) if backward else attend)
            args = (q, k, v, do) if backward else (q, k, v)
            timings.append({"tiles": tiles, **common.milliseconds(run, *args)})
        best = min(timings, key=lambda t: t["ms"])
        entries.append({"kernel": kernel, "dim": sizes.dim, "tiles": best["tiles"], "timings": timings})
    return {**common.environment(), "sizes": dataclasses.asdict(sizes), "entries": entries}


CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "attention_forward": [
        {"block_k": b, "stages": s, "persistent": p} for b, s in ((128, 2), (64, 4)) for p in (False, True)
    ],
    "attention_backward": [
        {"dq_stages": a, "dkv_stages": b, "group_inside": g} for a, b in ((2, 2), (3, 3)) for g in (True, False)
    ],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--implementation", default=None, help="forced backend of ours; default: what the op picks")
    parser.add_argument("--no_density", action="store_true")
    parser.add_argument("--no_flex", action="store_true")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--output", default=None)
    args = parser.parse_args(argv)
    del sys.argv[1:]  # tokamax would read them as its own flags
    kind = tuning.file_name(jax.devices()[0].device_kind).removesuffix(".json")
    sizes = [Sizes(n, args.heads, args.kv_heads, args.dim) for n in args.lengths]
    if args.search:
        folder = Path(tuning.__file__).parent / "tuned"
        print(common.write(args.output or folder / f"{kind}.json", search(sizes[-1], CANDIDATES)))
        return
    output = Path(args.output or common.RESULTS / f"attention_{kind}.json")
    record: dict[str, Any] = {
        **common.environment(),
        "gate": check(args.patterns, args.implementation, args.dim),
        "sizes": vars(args),
        "rows": [],
    }
    for name, size in itertools.product(args.patterns, sizes):
        record["rows"] += measure(name, size, {"ours": ours(PATTERNS[name], args.implementation), **rivals(name)})
    if not args.no_flex:
        record["rows"] += flex(args.patterns, args.lengths, args.heads, args.kv_heads, args.dim)
    if not args.no_density:
        record["density"] = density(sizes[min(1, len(sizes) - 1)], args.implementation)
        plot(record["density"], output.with_suffix(".png"))
    common.write(output, record)
    print(common.table(record["rows"], ("pattern", "length", "what", "pass", "ms", "tflops", "refused")))
    if "density" in record:
        print(common.table(record["density"], ("length", "density", "ms")))
    print(output)


if __name__ == "__main__":
    main()
