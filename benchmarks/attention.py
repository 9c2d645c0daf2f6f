"""Block-sparse attention against cuDNN, tokamax and FlexAttention, on the same inputs.

    python -m benchmarks.attention            # gate, then times: benchmarks/results/attention_<device>.json and a plot
    python -m benchmarks.attention --search   # measures tiles and writes pallas_kernels/tuned/<device>.json (--dim 64
                                              # and others add their entries)

Rivals that are not installed, or cannot run a pattern, are left out. FlexAttention runs in a process of its own, where
PyTorch is installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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
LIBRARY_PATTERNS = ("causal",)  # the op may give them to a library: our kernel is timed beside its choice
TILE = 128
DENSITY_WINDOWS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 102_400)  # of 128K: to 5 % sparsity


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


def ours(mask: Mask, implementation: str | None, deterministic: bool = False) -> Callable:
    return lambda q, k, v: block_sparse_attention(
        q, k, v, mask, implementation=implementation, deterministic=deterministic
    )


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
    inputs = Sizes(GATE_LENGTH, heads=4, kv_heads=2, dim=dim).inputs()
    wide = tuple(x.astype(jnp.float32) for x in inputs)
    jobs = {name: (with_gradient(ours(GATES[name], implementation)), inputs) for name in names}
    with jax.default_matmul_precision("highest"):
        jobs |= {f"{name} wanted": (with_gradient(ours(GATES[name], "reference")), wide) for name in names}
        compiled = common.compile_all(jobs)
    errors = {}
    for name in names:
        if isinstance(compiled[name], str):
            raise Unsupported(compiled[name])
        errors |= common.gate(name, compiled[name](*inputs), compiled[f"{name} wanted"](*wide), GATE_LIMIT)
    return errors


def measure(names: list[str], sizes: list[Sizes], implementation: str | None) -> list[dict[str, Any]]:
    """Times of ours and its rivals for every pattern and size; all are compiled before the first is timed."""
    rows, jobs = [], {}
    for name, size in itertools.product(names, sizes):
        runners = {"ours": ours(PATTERNS[name], implementation), **rivals(name)}
        if name in LIBRARY_PATTERNS and implementation is None:
            runners["ours, mosaic_gpu"] = ours(PATTERNS[name], "mosaic_gpu")
        runners["ours, deterministic"] = ours(PATTERNS[name], "mosaic_gpu", deterministic=True)
        shapes = jax.eval_shape(size.inputs)
        for (who, attend), backward in itertools.product(runners.items(), (False, True)):
            if who == "ours, deterministic" and not backward:
                continue  # only gradients differ
            key = f"{name} {size.length} {who} {'fwd+bwd' if backward else 'fwd'}"
            jobs[key] = (with_gradient(attend), shapes) if backward else (attend, shapes[:3])
            rows.append((key, name, size, who, backward))
    compiled = common.compile_all(jobs)
    return [_timed(compiled[key], name, size, who, backward) for key, name, size, who, backward in rows]


def _timed(run: Any, name: str, size: Sizes, who: str, backward: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "pattern": name,
        "length": size.length,
        "what": who,
        "pass": "fwd+bwd" if backward else "fwd",
    }
    if isinstance(run, str):
        return {**row, "refused": run}
    inputs = size.inputs()
    row |= common.milliseconds(run, *(inputs if backward else inputs[:3]))
    return {**row, "tflops": common.tflops(size.flops(PATTERNS[name], backward), row["ms"])}


def density(size: Sizes, implementation: str | None) -> list[dict[str, Any]]:
    """Forward time of causal windows beside the time of all keys x share of visited tiles.

    `tiles` counts the 128 x 128 tiles that a row of tiles visits, on average.
    """
    windows = [w for w in DENSITY_WINDOWS if w < size.length] + [size.length]
    inputs = size.inputs()[:3]
    jobs: dict[int, Any] = {n: (ours(Causal() & Window(n), implementation or "mosaic_gpu"), inputs) for n in windows}
    compiled = common.compile_all(jobs | {0: (ours(Causal(), implementation or "mosaic_gpu"), inputs)})
    if refused := [x for x in compiled.values() if isinstance(x, str)]:
        raise Unsupported(refused[0])
    dense = common.milliseconds(compiled[0], *inputs)["ms"]
    last = np.arange(-(-size.length // TILE))
    whole, pairs = (last + 1).sum(), visible_pairs(Causal(), size.length)
    rows = []
    for window in windows:
        visited = (last + 1 - np.maximum(last * TILE - window + 1, 0) // TILE).sum()
        ms = common.milliseconds(compiled[window], *inputs)["ms"]
        rows.append(
            {
                "length": size.length,
                "window": window,
                "density": visible_pairs(Causal() & Window(window), size.length) / pairs,
                "tiles": visited / len(last),
                "ms": ms,
                "of_dense": ms / (dense * visited / whole),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    x, y = [r["density"] for r in rows], [r["ms"] for r in rows]
    axes.loglog(x, y, "o-", label="forward")
    axes.loglog(x, [r["ms"] / r["of_dense"] for r in rows], "--", label="dense time x share of visited tiles")
    axes.set(xlabel="share of causal pairs", ylabel="ms", title=f"T = {rows[0]['length']}")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=150)


def flex(names: list[str], lengths: list[int], size: Sizes) -> list[dict[str, Any]]:
    """FlexAttention's rows, from a process that has PyTorch; none where it is absent."""
    if importlib.util.find_spec("torch") is None or not names:
        return []
    script = Path(__file__).with_name("flex_attention.py")
    command = [sys.executable, str(script), ",".join(names), *map(str, (size.heads, size.kv_heads, size.dim, *lengths))]
    with common.exclusive():  # its compilation runs beside ours
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return [{"what": "flex", "refused": done.stderr.strip().splitlines()[-1][:300]}]
    return json.loads(done.stdout.splitlines()[-1])


SEARCHED: dict[str, tuple[str, list[dict[str, Any]]]] = {  # kernel: the pattern that decides, and its candidates
    "attention_forward": (
        "sink_128_window_4096",
        [{"block_k": b, "stages": s} for b, s in ((128, 2), (64, 3), (64, 4))],
    ),
    "attention_backward": (
        "sink_128_window_4096",
        [
            {"dq_block_k": b, "dq_stages": 2, "dkv_block_q": 64, "dkv_stages": n, "group_inside": g}
            for b, n, g in ((64, 2, True), (64, 2, False), (64, 3, True), (128, 2, True))
        ],
    ),
}


def search(size: Sizes) -> list[dict[str, Any]]:
    """For the head dim, the fastest tiles of each kernel with all timings: the entries of a file in `tuned/`."""
    from pallas_kernels.attention import mosaic_gpu
    from pallas_kernels.attention.mosaic_gpu_bwd import BackwardTiles
    from pallas_kernels.attention.mosaic_gpu_fwd import ForwardTiles

    inputs, jobs = size.inputs(), {}
    for kernel, (name, candidates) in SEARCHED.items():
        for n, tiles in enumerate(candidates):
            if kernel == "attention_forward":
                attend = mosaic_gpu.with_tiles(PATTERNS[name], forward_tiles=ForwardTiles(**tiles))
                jobs[kernel, n] = (attend, inputs[:3])
            else:
                attend = mosaic_gpu.with_tiles(PATTERNS[name], backward_tiles=BackwardTiles(**tiles))
                jobs[kernel, n] = (with_gradient(attend), inputs)
    compiled, entries = common.compile_all(jobs), []
    for kernel, (name, candidates) in SEARCHED.items():
        timings = []
        for n, tiles in enumerate(candidates):
            run = compiled[kernel, n]
            found = {"refused": run} if isinstance(run, str) else common.milliseconds(run, *jobs[kernel, n][1])
            timings.append({"pattern": name, "length": size.length, "tiles": tiles, **found})
        best = min((t for t in timings if "ms" in t), key=lambda t: t["ms"])
        entries.append({"kernel": kernel, "dim": size.dim, "tiles": best["tiles"], "timings": timings})
    return entries


def write_tiles(size: Sizes, path: Path, commit: str | None) -> Path:
    """Puts the found entries into a device's file; entries of other head dims stay."""
    found = search(size)
    replaced = {(entry["kernel"], entry["dim"]) for entry in found}
    known = json.loads(path.read_text())["entries"] if path.is_file() else []
    kept = [entry for entry in known if (entry["kernel"], entry["dim"]) not in replaced]
    return common.write(
        path, {**common.environment(commit), "sizes": dataclasses.asdict(size), "entries": found + kept}
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
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
    parser.add_argument("--commit", default=None, help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", default=None)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    del sys.argv[1:]  # tokamax would read them as its own flags
    kind = tuning.file_name(jax.devices()[0].device_kind).removesuffix(".json")
    sizes = [Sizes(n, args.heads, args.kv_heads, args.dim) for n in args.lengths]
    if args.search:
        path = Path(args.output or Path(tuning.__file__).parent / "tuned" / f"{kind}.json")
        print(write_tiles(sizes[-1], path, args.commit))
        return
    output = Path(args.output or common.RESULTS / f"attention_{kind}.json")
    record: dict[str, Any] = {**common.environment(args.commit), "sizes": vars(args)}
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        others = [name for name in args.patterns if not rivals(name)]  # where no library has the pattern
        peer = None if args.no_flex else beside.submit(flex, others, args.lengths[-1:], sizes[-1])
        record["gate"] = check(args.patterns, args.implementation, args.dim)
        record["rows"] = measure(args.patterns, sizes, args.implementation)
        record["rows"] += peer.result() if peer else []
    if not args.no_density:
        record["density"] = density(sizes[-1], args.implementation)
        plot(record["density"], output.with_suffix(".png"))
    common.write(output, record)
    print(common.table(record["rows"], ("pattern", "length", "what", "pass", "ms", "tflops", "refused")))
    print(common.table(record.get("density", []), ("length", "window", "density", "tiles", "ms", "of_dense")))
    print(output)


if __name__ == "__main__":
    main()
