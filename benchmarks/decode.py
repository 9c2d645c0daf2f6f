"""Decode attention against a copy of the same bytes, cuDNN and plain XLA: `python -m benchmarks.decode --out FILE`.

Every case is checked against the XLA backend before it is timed. A step is timed inside one compiled loop whose queries
and lengths depend on the step before, so nothing is hoisted, overlapped or hidden by the host. Bandwidth counts each
byte of the keys and values that the step must read, once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from benchmarks import common
from pallas_kernels.decode import api, mosaic_gpu

HEADS, KV_HEADS, DIM = 32, 8, 128


def draw(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make_cache(batch: int, size: int, dtype, seed: int = 0) -> pk.KVCache:
    lengths = jnp.full((batch,), size, jnp.int32)
    if dtype == jnp.bfloat16:
        return pk.KVCache(draw(seed, batch, size, KV_HEADS, DIM), draw(seed + 1, batch, size, KV_HEADS, DIM), lengths)
    codes = lambda s: jax.random.randint(jax.random.key(s), (batch, size, KV_HEADS, DIM), -127, 128, jnp.int8)
    factors = lambda s: jax.random.uniform(jax.random.key(s), (batch, KV_HEADS, size), minval=0.5 / 127, maxval=4 / 127)
    return pk.KVCache(codes(seed), codes(seed + 1), lengths, factors(seed + 2), factors(seed + 3))


def seconds(step, q, cache, repeats: int = 20, rounds: int = 7) -> float:
    """Median time of one `step(q, cache) -> o`, from loops of `repeats` steps that depend on each other."""

    @jax.jit
    def loop(q, cache):
        def body(carry, _):
            q, lengths = carry
            o = step(q, dataclasses.replace(cache, lengths=lengths))
            return (q + 1e-6 * o.astype(q.dtype), lengths + (o[0, 0, 0, 0] > 1e30).astype(jnp.int32)), None

        return jax.lax.scan(body, (q, cache.lengths), length=repeats)[0]

    jax.block_until_ready(loop(q, cache))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(loop(q, cache))
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes read and written per second by a device copy of `size` bytes."""
    x = jnp.zeros((size // 4,), jnp.int32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(copy(x))
    start = time.perf_counter()
    for _ in range(20):
        x = copy(x)
    jax.block_until_ready(x)
    return 2 * size * 20 / (time.perf_counter() - start)


def cudnn(q, cache):
    return jax.nn.dot_product_attention(
        q, cache.k, cache.v, key_value_seq_lengths=cache.lengths, implementation="cudnn"
    )


def ours(q, cache, tiles=None, lists=None):
    run = lambda call: mosaic_gpu.attend(call, tiles)
    previous, api.BACKENDS["mosaic_gpu"] = api.BACKENDS["mosaic_gpu"], run
    try:
        return pk.decode_attention(q, cache, lists=lists, implementation="mosaic_gpu")
    finally:
        api.BACKENDS["mosaic_gpu"] = previous


def gate(step, q, cache, lists=None) -> float:
    """Relative error against the XLA backend, ||o - ref|| / ||ref||; raises where it is not small."""
    reference = jax.jit(lambda q, c: pk.decode_attention(q, c, lists=lists, implementation="xla"))(q, cache)
    o = jax.jit(step)(q, cache)
    difference = np.float32(o) - np.float32(reference)
    error = float(np.linalg.norm(difference) / np.linalg.norm(np.float32(reference)))
    if not error < 1e-2:
        raise SystemExit(f"benchmarks.decode: relative error {error} against XLA; nothing was timed")
    return error


def dense_rows(copy: float, cases, variants) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch, size, dtype in cases:
        cache, q = make_cache(batch, size, dtype), draw(9, batch, 1, HEADS, DIM)
        for tiles in variants if size == 32768 else variants[:1]:
            step = functools.partial(ours, tiles=tiles)
            row = {"batch": batch, "length": size, "dtype": jnp.dtype(dtype).name, "backend": "mosaic_gpu"}
            try:
                row["tiles"] = dataclasses.asdict(tiles)
                if tiles == variants[0]:
                    row["error"] = gate(step, q, cache)
                row["ms"] = seconds(step, q, cache) * 1e3
            except (ValueError, RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as failure:
                row["failed"] = str(failure).splitlines()[0][:160]
            rows.append(row)
            print(row, flush=True)
        if dtype == jnp.bfloat16:
            rows.append({"batch": batch, "length": size, "dtype": "bfloat16", "backend": "cudnn"})
            rows[-1]["ms"] = seconds(cudnn, q, cache) * 1e3
        if size == 32768:
            xla = lambda q, c: pk.decode_attention(q, c, implementation="xla")
            rows.append({"batch": batch, "length": size, "dtype": jnp.dtype(dtype).name, "backend": "xla"})
            rows[-1]["ms"] = seconds(xla, q, cache, repeats=3, rounds=3) * 1e3
        for row in rows:
            if "ms" in row and "of_copy" not in row:
                row["of_copy"] = cache.bytes / (row["ms"] * 1e-3) / copy
    return rows


def selected_rows(size: int, keep: int, block: int = 64) -> list[dict]:
    """One request of `size` tokens that reads `keep` of them, chosen by block bounds; all of them; and the parts."""
    cache, q = make_cache(1, size, jnp.bfloat16), draw(9, 1, 1, HEADS, DIM)
    bounds = jax.jit(functools.partial(pk.block_bounds, block=block))(cache.k, cache.lengths)

    def choose(q, lengths, bounds):
        return pk.select_blocks(pk.block_scores(q, bounds), lengths, keep // block, block, first=1, last=2)

    lists = jax.jit(choose)(q, cache.lengths, bounds)
    row = {"length": size, "read": keep, "error": gate(functools.partial(ours, lists=lists), q, cache, lists)}
    row["dense ms"] = seconds(ours, q, cache) * 1e3
    row["attention ms"] = seconds(lambda q, c: ours(q, c, lists=lists), q, cache) * 1e3
    row["scores, top n and attention ms"] = (
        seconds(lambda q, c: ours(q, c, lists=choose(q, c.lengths, bounds)), q, cache) * 1e3
    )
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/decode.json"))
    parser.add_argument("--tune", action="store_true", help="time several tiles")
    args = parser.parse_args()
    tiles = mosaic_gpu.Tiles
    variants = [tiles()]
    if args.tune:
        variants += [tiles(stages=5, programs_per_sm=1), tiles(stages=3, programs_per_sm=1)]
        variants += [tiles(block=128, stages=2, programs_per_sm=1), tiles(stages=3)]
    copy = copy_bandwidth()
    cases = [(b, s, d) for d in (jnp.bfloat16, jnp.int8) for b in (1, 8) for s in (32768, 131072)]
    result = {
        **common.environment(),
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM},
        "copy_bytes_per_s": copy,
        "rows": dense_rows(copy, cases, variants),
        "selected": selected_rows(1 << 20, 4096),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"] + result["selected"]:
        print(row)


if __name__ == "__main__":
    main()
