"""Decode attention through the real TPU compiler, on a machine without a TPU."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from lcjax.cache.base import write_slots
from pallas_kernels import aot
from pallas_kernels.decode.mosaic_tpu_visits import order_of
from pallas_kernels.masks import Causal, Sink, Window

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler"),
]

GENERATIONS = ["v5e", "v5p", "v6e", "tpu7x"]
MILLION = 2**20
RING = Causal() & (Sink(4) | Window(4096))


def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def contiguous(batch, slots, kv_heads, dim, dtype=jnp.bfloat16, ring=None) -> pk.KVCache:
    kv = jnp.zeros((batch, slots, kv_heads, dim), dtype)
    factors = jnp.zeros((batch, kv_heads, slots), jnp.int32) if dtype == jnp.int8 else None
    return pk.KVCache(kv, kv, jnp.zeros(batch, jnp.int32), factors, None, ring)


def paged(batch, tokens, kv_heads, dim, dtype=jnp.bfloat16, page=64, pages=None, table_heads=None) -> pk.KVCache:
    pages, own = pages or batch * tokens // page, () if table_heads is None else (table_heads,)
    kv = jnp.zeros((pages, kv_heads, page, dim), dtype)
    factors = jnp.zeros((pages, kv_heads, page), jnp.int32) if dtype == jnp.int8 else None
    table = jnp.zeros((batch, *own, tokens // page), jnp.int32)
    return pk.KVCache(kv, kv, jnp.zeros(batch, jnp.int32), factors, table)


def shapes_of(make, *args, **options) -> pk.KVCache:
    """The cache that `make` would make, without its memory."""
    return jax.eval_shape(lambda: make(*args, **options))


CASES = {  # cache, query heads, new tokens, mask
    # 64 requests may reach a million tokens each and share a pool of 32K pages.
    "paged, 64 x 1M": (lambda: paged(64, MILLION, 8, 128, pages=2**15), 32, 1, None),
    "1M tokens": (lambda: contiguous(1, MILLION, 8, 128), 32, 1, None),
    "paged": (lambda: paged(8, 32768, 8, 128), 32, 1, None),
    "paged, 8 new tokens": (lambda: paged(8, 32768, 8, 128), 32, 8, None),
    "paged int8": (lambda: paged(8, 32768, 8, 128, jnp.int8, page=128), 32, 1, None),
    "tokens": (lambda: contiguous(8, 32768, 8, 128), 32, 1, None),
    "tokens int8": (lambda: contiguous(8, 32768, 8, 128, jnp.int8), 32, 1, None),
    "transposed": (lambda: contiguous(8, 8192, 3, 64), 9, 1, None),
    "transposed int8": (lambda: contiguous(8, 8192, 8, 64, jnp.int8), 32, 1, None),
    "transposed pages": (lambda: paged(8, 8192, 8, 64, page=128), 32, 1, None),
    "heads": (lambda: contiguous(8, 8192, 1, 256), 4, 2, None),
    "ring": (lambda: contiguous(8, 4224, 8, 128, ring=4), 32, 1, RING),
    "table per KV head": (lambda: paged(8, 32768, 8, 128, table_heads=8), 32, 2, RING),
}


def compile_case(generation: str, case: str) -> tuple[pk.KVCache, jax.stages.Compiled]:
    make, heads, queries, mask = CASES[case]
    cache = shapes_of(make)
    q = shaped(cache.lengths.shape[0], queries, heads, cache.k.shape[-1], dtype=jnp.bfloat16)
    run = lambda q, cache: pk.decode_attention(q, cache, mask, implementation="mosaic_tpu")
    return cache, aot.compile_for(generation, run, q, cache)


def check(generation: str, case: str) -> None:
    """It compiles, and what it takes beside the cache is a small part of it: no copy in another order."""
    cache, compiled = compile_case(generation, case)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * cache.bytes


@pytest.mark.parametrize("case", ["paged, 64 x 1M", "tokens"])
def test_compiles(case):
    check("v5e", case)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_everywhere(generation, case):
    check(generation, case)


ORDERS = {"tokens": "3,2,1,0", "heads": "3,1,2,0", "transposed": "1,3,2,0"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 128), (2, 128), (3, 128), (4, 128), (8, 128), (1, 256), (8, 64)])
def test_the_order_of_a_cache_is_the_compilers(kv_heads, dim, dtype):
    cache = shapes_of(contiguous, 4, 4096, kv_heads, dim, dtype)
    compiled = aot.compile_for("v5e", lambda x: x.at[0, 0].set(1), cache.k, donate=(0,))
    assert re.search(r"\[[\d,]+\]\{([\d,]+):", compiled.as_text())[1] == ORDERS[order_of(cache)]


@pytest.mark.slow
def test_a_step_writes_its_token_into_a_page():
    cache = shapes_of(paged, 8, 8192, 8, 128)

    def step(cache, new, q):
        at = cache.lengths
        page = jnp.take_along_axis(cache.page_table, (at // 64)[:, None], 1)[:, 0]
        write = lambda pool: pool.at[page, :, at % 64].set(new)
        held = dataclasses.replace(cache, k=write(cache.k), v=write(cache.v), lengths=at + 1)
        return pk.decode_attention(q, held, implementation="mosaic_tpu"), held

    new, q = shaped(8, 8, 128, dtype=jnp.bfloat16), shaped(8, 1, 32, 128, dtype=jnp.bfloat16)
    memory = aot.compile_for("v5e", step, cache, new, q, donate=(0,)).memory_analysis()
    assert memory.alias_size_in_bytes >= cache.bytes
    assert memory.temp_size_in_bytes < 0.05 * cache.bytes


def test_a_step_writes_its_token_in_place():
    """Append and attend with a donated cache: the buffers are aliased and nothing of their size is made."""
    cache = shapes_of(contiguous, 8, 8192, 8, 128)

    def step(k, v, lengths, new, q):
        write = lambda buffer: write_slots(buffer, new, lengths[:, None], None)
        held = pk.KVCache(write(k), write(v), lengths + 1)
        return pk.decode_attention(q, held, implementation="mosaic_tpu"), held.k, held.v

    new, q = (shaped(8, 1, heads, 128, dtype=jnp.bfloat16) for heads in (8, 32))
    memory = aot.compile_for("v5e", step, cache.k, cache.v, cache.lengths, new, q, donate=(0, 1)).memory_analysis()
    assert memory.alias_size_in_bytes >= cache.bytes
    assert memory.temp_size_in_bytes < 0.05 * cache.bytes
