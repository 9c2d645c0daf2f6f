"""Decode attention on any device: the visits of `schedule.py`, some blocks of all requests at a time."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.decode.cache import KVCache, unpack_factors
from pallas_kernels.decode.call import Call
from pallas_kernels.decode.schedule import static_visits

BLOCK = 64
CHUNK = 1024  # keys of each request read in one step


def places(cache: KVCache, slot: Int[Array, "B K N"]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Where the slots of every request and KV head lie: in keys and values, and in factors."""
    batch, kv_heads, _ = slot.shape
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
    if cache.page_table is None:
        return (b, slot, h), (b, h, slot)
    pages, _, page = cache.k.shape[:3]
    table = cache.page_table if cache.page_table.ndim == 3 else cache.page_table[:, None]
    table = jnp.broadcast_to(table, (batch, kv_heads, table.shape[-1]))
    physical = jnp.clip(jnp.take_along_axis(table, slot // page, axis=2), 0, pages - 1)
    return (physical, h, slot % page), (physical, h, slot % page)


def attend(call: Call) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    q, cache, plan, blocks, group = call.q, call.cache, call.plan, call.lists, call.group
    batch, queries, heads, _ = q.shape
    kv_heads, dv = cache.num_kv_heads, cache.v.shape[-1]
    block = BLOCK if blocks is None else blocks.block_k
    per_step = max(1, CHUNK // block)
    sinks, tail, static = (jnp.broadcast_to(x, (batch, kv_heads)) for x in static_visits(cache, plan, queries, block))
    listed = jnp.zeros_like(static) if blocks is None else jnp.broadcast_to(blocks.count[..., 0], static.shape)
    rows = q.reshape(batch, queries, kv_heads, group, -1)
    pattern = jnp.asarray(plan.pattern_of_head).reshape(kv_heads, 1, group, 1)
    query = (cache.lengths[:, None] - queries + jnp.arange(queries)).reshape(batch, 1, queries, 1, 1)

    def step(m, carry):
        top, total, acc = carry
        n = m * per_step + jnp.arange(per_step)  # visits, [n]
        logical = jnp.where(n < sinks[..., None], n, (tail - sinks)[..., None] + n)  # [B, K, n]
        is_static = n < static[..., None]
        if blocks is not None:
            entry = jnp.clip(n - static[..., None], 0, blocks.idx.shape[-1] - 1)
            idx = jnp.broadcast_to(blocks.idx[:, :, 0], (batch, kv_heads, blocks.idx.shape[-1]))
            logical = jnp.where(is_static, logical, jnp.take_along_axis(idx, entry, axis=2))
        slot = (logical[..., None] * block + jnp.arange(block)).reshape(batch, kv_heads, -1)
        alive = jnp.repeat(n < (static + listed)[..., None], block, axis=2) & (slot < cache.capacity)
        slot = jnp.clip(slot, 0, cache.capacity - 1)
        position = cache.slot_positions(slot)
        alive &= position >= 0
        j = position[:, :, None, None]  # [B, K, 1, 1, N]; queries and heads of the group before the keys
        allowed = plan.allow(query, jnp.maximum(j, 0), pattern)
        if blocks is not None:  # a listed block adds the keys that the static part lacks
            allowed = allowed == jnp.repeat(is_static, block, axis=2)[:, :, None, None]
        keep = alive[:, :, None, None] & (j <= query) & allowed
        at, factors_at = places(cache, slot)
        k, v = (jnp.where(alive[..., None], x[at], 0).astype(q.dtype) for x in (cache.k, cache.v))
        k_factor = v_factor = 1.0
        if cache.factors is not None:
            k_factor, v_factor = unpack_factors(cache.factors[factors_at][:, :, None, None])
        s = jnp.einsum("btkgd,bknd->bktgn", rows, k, preferred_element_type=jnp.float32) * (call.scale * k_factor)
        s = s if call.soft_cap is None else call.soft_cap * jnp.tanh(s / call.soft_cap)
        s = jnp.where(keep, s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(-1))
        base = jnp.where(jnp.isfinite(new_top), new_top, 0)
        p = jnp.exp(s - base[..., None])
        shrink = jnp.exp(top - base)
        acc = acc * shrink[..., None] + jnp.einsum(
            "bktgn,bknd->bktgd", (p * v_factor).astype(q.dtype), v, preferred_element_type=jnp.float32
        )
        return new_top, total * shrink + p.sum(-1), acc

    dims = (batch, kv_heads, queries, group)
    start = jnp.full(dims, -jnp.inf), jnp.zeros(dims), jnp.zeros((*dims, dv))
    steps = -(-(static + listed).max() // per_step)
    top, total, acc = lax.fori_loop(0, steps, step, start)
    lse = top + jnp.log(total)
    o = acc / jnp.where(total > 0, total, 1)[..., None]
    o = o.swapaxes(1, 2).reshape(batch, queries, heads, dv)
    lse = lse.swapaxes(2, 3).reshape(batch, heads, queries)
    return o.astype(q.dtype), lse
