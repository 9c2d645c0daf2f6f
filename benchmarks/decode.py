"""Decode attention against a copy of the same bytes, cuDNN and plain XLA: `python -m benchmarks.decode`.

Every case is checked against the XLA backend before it is timed. The figures are milliseconds a layer: one compiled
program runs several layers, each with queries that depend on the layer before and the cache of another layer, so that
nothing is hoisted or found in a cache on the chip, and the host's part of a call is shared. cuDNN and XLA are timed in
the same way. Bandwidth counts each byte of the keys, values and scales that a layer must read, once.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from benchmarks import common
from pallas_kernels.decode import api, mosaic_gpu

HEADS, KV_HEADS, DIM = 32, 8, 128
LAYERS = 12
BLOCK = 64
type Step = Callable[..., jax.Array]  # (q, cache, ...) -> o


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def make_cache(batch: int, size: int, dtype: Any, seed: int = 0) -> pk.KVCache:
    lengths = jnp.full((batch,), size, jnp.int32)
    shape = (batch, size, KV_HEADS, DIM)
    if dtype == jnp.bfloat16:
        return pk.KVCache(draw(seed, *shape), draw(seed + 1, *shape), lengths)
    codes = lambda s: jax.random.randint(jax.random.key(s), shape, -127, 128, jnp.int8)
    factors = lambda s: jax.random.uniform(jax.random.key(s), (batch, KV_HEADS, size), minval=0.5 / 127, maxval=4 / 127)
    return pk.KVCache(codes(seed), codes(seed + 1), lengths, factors(seed + 2), factors(seed + 3))


def milliseconds(step: Step, q: jax.Array, caches: list[pk.KVCache], *rest: Any, layers: int = LAYERS) -> float:
    """Milliseconds a layer of a program of `layers` layers in a row."""

    @jax.jit
    def run(q, caches, *rest):
        for layer in range(layers):
            q = q + 1e-6 * step(q, caches[layer % len(caches)], *rest).astype(q.dtype)
        return q

    return common.milliseconds(run, q, caches, *rest)["ms"] / layers


def output(o: Any) -> jax.Array:
    """`o` alone: no lse was asked for."""
    assert isinstance(o, jax.Array)
    return o


def cudnn(q: jax.Array, cache: pk.KVCache) -> jax.Array:
    return jax.nn.dot_product_attention(
        q, cache.k, cache.v, key_value_seq_lengths=cache.lengths, implementation="cudnn"
    )


def ours(q: jax.Array, cache: pk.KVCache, tiles: mosaic_gpu.Tiles | None = None, lists: Any = None) -> jax.Array:
    previous, api.BACKENDS["mosaic_gpu"] = api.BACKENDS["mosaic_gpu"], lambda call: mosaic_gpu.attend(call, tiles)
    try:
        return output(pk.decode_attention(q, cache, lists=lists, implementation="mosaic_gpu"))
    finally:
        api.BACKENDS["mosaic_gpu"] = previous


def plain(q: jax.Array, cache: pk.KVCache, lists: Any = None) -> jax.Array:
    return output(pk.decode_attention(q, cache, lists=lists, implementation="xla"))


def gate(step: Step, q: jax.Array, cache: pk.KVCache, lists: Any = None) -> float:
    """Relative error against the XLA backend; GateError where it is not below 1 %."""
    reference = jax.jit(plain)(q, cache, lists)
    return common.gate("decode_attention", jax.jit(step)(q, cache), reference, 1e-2)["decode_attention"]


def dense_rows(batch: int, size: int, dtype: Any, copy: float, variants: list[mosaic_gpu.Tiles]) -> list[dict]:
    """Ours, with each of `variants` as well; cuDNN where it can; XLA at 32K."""
    caches = [make_cache(batch, size, dtype, seed) for seed in (0, 5)]
    q = draw(9, batch, 1, HEADS, DIM)
    case = {"batch": batch, "length": size, "dtype": jnp.dtype(dtype).name}
    rows: list[dict[str, Any]] = []

    def add(backend: str, step: Step, layers: int = LAYERS, **more: Any) -> None:
        ms = milliseconds(step, q, caches, layers=layers)
        rows.append(case | {"backend": backend, "ms": ms, "of_copy": caches[0].bytes / (ms * 1e-3) / copy} | more)
        print(rows[-1], flush=True)

    add("mosaic_gpu", ours, error=gate(ours, q, caches[0]))
    for tiles in variants:
        add("mosaic_gpu", functools.partial(ours, tiles=tiles), tiles=str(tiles))
    if dtype == jnp.bfloat16:
        add("cudnn", cudnn)
    if size == 32768:
        add("xla", plain, layers=2)
    return rows


def selected_row(size: int, keep: int) -> dict[str, Any]:
    """One request of `size` tokens that reads `keep` of them, chosen by block bounds; all of them; and the parts."""
    caches = [make_cache(1, size, jnp.bfloat16, seed) for seed in (0, 5)]
    q = draw(9, 1, 1, HEADS, DIM)
    bounds = jax.jit(functools.partial(pk.block_bounds, block=BLOCK))(caches[0].k, caches[0].lengths)

    def choose(q, lengths, bounds):
        return pk.select_blocks(pk.block_scores(q, bounds), lengths, keep // BLOCK, BLOCK, first=1, last=2)

    lists = jax.jit(choose)(q, caches[0].lengths, bounds)
    chosen = functools.partial(ours, lists=lists)
    row: dict[str, Any] = {"length": size, "read": keep, "error": gate(chosen, q, caches[0], lists)}
    row["dense ms"] = milliseconds(ours, q, caches)
    row["attention ms"] = milliseconds(chosen, q, caches)
    row["scores, top n and attention ms"] = milliseconds(
        lambda q, cache, bounds: ours(q, cache, lists=choose(q, cache.lengths, bounds)), q, caches, bounds
    )
    for name in ("attention", "scores, top n and attention"):
        row[f"{name}, times faster"] = row["dense ms"] / row[f"{name} ms"]
    print(row, flush=True)
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode attention against a copy, cuDNN and plain XLA.")
    parser.add_argument("--out", type=pathlib.Path, default=common.RESULTS / "decode_nvidia_h100_80gb_hbm3.json")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--tune", nargs="*", default=[], metavar="BLOCK,STAGES,PROGRAMS", help="more tiles to time")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--selected", type=int, default=1 << 20, help="tokens of the selection case; 0 leaves it out")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    variants = [mosaic_gpu.Tiles(*(int(n) for n in text.split(","))) for text in args.tune]
    copy = common.copy_bandwidth()
    rows = []
    for dtype in (jnp.bfloat16, jnp.int8):
        for batch in args.batches:
            for size in args.lengths:
                rows += dense_rows(batch, size, dtype, copy, variants)
    record = {
        **common.environment(args.commit),
        "convention": __doc__,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "layers in a program": LAYERS},
        "copy_bytes_per_s": copy,
        "rows": rows,
        "selected": [selected_row(args.selected, 4096)] if args.selected else [],
    }
    common.write(args.out, record)
    print(common.table(rows, ("batch", "length", "dtype", "backend", "tiles", "ms", "of_copy", "error")))


if __name__ == "__main__":
    main()
