"""Decode attention against a copy of the same bytes, cuDNN and plain XLA: `python -m benchmarks.decode`.

Every case is checked against the XLA backend before it is timed. The figures are milliseconds a layer: one compiled
program runs several layers, each with queries that depend on the layer before and the cache of another layer, so that
nothing is hoisted or found in a cache on the chip, and the host's part of a call is shared. cuDNN and XLA are timed in
the same way. Bandwidth counts each byte of the keys, values and factors that a layer must read, once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from benchmarks import common

HEADS, KV_HEADS, DIM = 32, 8, 128
LAYERS = 12
BLOCK = 64
LIMIT = 1e-2  # relative error
type Step = Callable[..., jax.Array]  # (q, cache, ...) -> o


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def make_cache(seed: int, batch: int, size: int, dtype: Any) -> pk.KVCache:
    lengths = jnp.full((batch,), size, jnp.int32)
    shape = (batch, size, KV_HEADS, DIM)
    if dtype == jnp.bfloat16:
        return pk.KVCache(draw(seed, *shape), draw(seed + 1, *shape), lengths)
    codes = lambda s: jax.random.randint(jax.random.key(s), shape, -127, 128, jnp.int8)
    factor = lambda s: jax.random.uniform(
        jax.random.key(s), (batch, KV_HEADS, size), jnp.bfloat16, minval=0.5 / 127, maxval=4 / 127
    )
    return pk.KVCache(codes(seed), codes(seed + 1), lengths, pk.pack_factors(factor(seed + 2), factor(seed + 3)))


def attend(implementation: str, q: jax.Array, cache: pk.KVCache, lists: pk.BlockList | None = None) -> jax.Array:
    o = pk.decode_attention(q, cache, lists=lists, implementation=implementation)
    assert isinstance(o, jax.Array)
    return o


ours, plain = functools.partial(attend, "mosaic_gpu"), functools.partial(attend, "xla")


def cudnn(q: jax.Array, cache: pk.KVCache) -> jax.Array:
    return jax.nn.dot_product_attention(
        q, cache.k, cache.v, key_value_seq_lengths=cache.lengths, implementation="cudnn"
    )


def choose(keep: int, q: jax.Array, lengths: jax.Array, bounds: pk.BlockBounds) -> pk.BlockList:
    return pk.select_blocks(pk.block_scores(q, bounds), lengths, keep // BLOCK, BLOCK, first=1, last=2)


class Programs:
    """Compiles side by side, before anything is timed."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(8)
        self._all: list[Future] = []

    def compile(self, run: Callable, *shapes: Any) -> Future:
        self._all.append(self._pool.submit(lambda: jax.jit(run).lower(*shapes).compile()))
        return self._all[-1]

    def finish(self) -> None:
        """Wait for all: XLA tries its own variants on the device while it compiles."""
        for program in self._all:
            program.result()

    def layers(self, step: Step, q: Any, cache: Any, *rest: Any, layers: int = LAYERS) -> Future:
        """`layers` layers in a row, over two caches in turn."""

        def run(q, caches, *rest):
            for layer in range(layers):
                q = q + 1e-6 * step(q, caches[layer % 2], *rest).astype(q.dtype)
            return q

        return self.compile(run, q, (cache, cache), *rest)


def dense_case(programs: Programs, batch: int, size: int, dtype: Any) -> Callable[[float], list[dict[str, Any]]]:
    """Starts compiling; the result measures ours, cuDNN where it can, and XLA at the shortest length."""
    make = jax.jit(functools.partial(make_cache, batch=batch, size=size, dtype=dtype))
    q = draw(9, batch, 1, HEADS, DIM)
    cache = jax.eval_shape(make, 0)
    checks = [programs.compile(step, q, cache) for step in (ours, plain)]
    timed = {"mosaic_gpu": (programs.layers(ours, q, cache), LAYERS)}
    if dtype == jnp.bfloat16:
        timed["cudnn"] = programs.layers(cudnn, q, cache), LAYERS
    if size <= 32768:
        timed["xla"] = programs.layers(plain, q, cache, layers=2), 2

    def measure(copy: float) -> list[dict[str, Any]]:
        caches = make(0), make(5)
        case = {"batch": batch, "length": size, "dtype": jnp.dtype(dtype).name}
        found, wanted = (check.result()(q, caches[0]) for check in checks)
        error = common.gate("decode_attention", found, wanted, LIMIT)["decode_attention"]
        rows = []
        for backend, (program, layers) in timed.items():
            ms = common.milliseconds(program.result(), q, caches)["ms"] / layers
            rows.append(case | {"backend": backend, "ms": ms, "of_copy": caches[0].bytes / (ms * 1e-3) / copy})
        rows[0]["error"] = error
        return rows

    return measure


def selected_case(programs: Programs, size: int, keep: int) -> Callable[[], dict[str, Any]]:
    """One request of `size` tokens that reads `keep` of them, chosen by block bounds; all of them; and the parts."""
    make = jax.jit(functools.partial(make_cache, batch=1, size=size, dtype=jnp.bfloat16))
    bound = lambda cache: pk.block_bounds(cache.k, cache.lengths, BLOCK)
    pick = functools.partial(choose, keep)
    both = lambda q, cache, bounds: ours(q, cache, pick(q, cache.lengths, bounds))
    q = draw(9, 1, 1, HEADS, DIM)
    cache = jax.eval_shape(make, 0)
    bounds = jax.eval_shape(bound, cache)
    lists = jax.eval_shape(pick, q, cache.lengths, bounds)
    bounding, picking = programs.compile(bound, cache), programs.compile(pick, q, cache.lengths, bounds)
    checks = [programs.compile(step, q, cache, lists) for step in (ours, plain)]
    timed = {
        "dense": (programs.layers(ours, q, cache), None),
        "attention": (programs.layers(ours, q, cache, lists), "lists"),
        "scores, top n and attention": (programs.layers(both, q, cache, bounds), "bounds"),
    }

    def measure() -> dict[str, Any]:
        caches = make(0), make(5)
        given: dict[Any, Any] = {"bounds": bounding.result()(caches[0])}
        given["lists"] = picking.result()(q, caches[0].lengths, given["bounds"])
        found, wanted = (check.result()(q, caches[0], given["lists"]) for check in checks)
        error = common.gate("selected", found, wanted, LIMIT)["selected"]
        row: dict[str, Any] = {"length": size, "read": keep, "error": error}
        for name, (program, rest) in timed.items():
            arguments = (q, caches) if rest is None else (q, caches, given[rest])
            row[f"{name} ms"] = common.milliseconds(program.result(), *arguments)["ms"] / LAYERS
            row[f"{name}, times faster"] = row["dense ms"] / row[f"{name} ms"]
        return row

    return measure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode attention against a copy, cuDNN and plain XLA.")
    parser.add_argument("--out", type=pathlib.Path, default=common.RESULTS / "decode_nvidia_h100_80gb_hbm3.json")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--selected", type=int, default=1 << 20, help="tokens of the selection case; 0 leaves it out")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    programs = Programs()
    cases = [
        dense_case(programs, batch, size, dtype)
        for dtype, batch, size in itertools.product((jnp.bfloat16, jnp.int8), args.batches, args.lengths)
    ]
    selected = [selected_case(programs, args.selected, 4096)] if args.selected else []
    programs.finish()
    copy = common.copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for measure in cases:
        rows += measure(copy)
        print(common.table(rows[-3:], ("batch", "length", "dtype", "backend", "ms", "of_copy", "error")), flush=True)
    record = {
        **common.environment(args.commit),
        "convention": __doc__,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "layers in a program": LAYERS},
        "copy_bytes_per_s": copy,
        "rows": rows,
        "selected": [measure() for measure in selected],
    }
    common.write(args.out, record)
    print(record["selected"])


if __name__ == "__main__":
    main()
