"""Decode attention, by its definition: one request, one head, one query at a time, in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.decode.cache import KVCache, unpack_factors
from pallas_kernels.decode.call import Call


def rows_of(cache: KVCache, batch: int, head: int) -> tuple[Float[Array, "S D"], Float[Array, "S Dv"]]:
    """Keys and values of one request and KV head in slot order, dequantised, unused slots as they lie."""
    if cache.page_table is not None:
        table = cache.page_table[batch] if cache.page_table.ndim == 2 else cache.page_table[batch, head]
        table = jnp.maximum(table, 0)
        pick = lambda x: x[table, head].reshape(-1, *x.shape[3:])
    else:
        pick = lambda x: x[batch, :, head]
    k, v = pick(cache.k).astype(jnp.float32), pick(cache.v).astype(jnp.float32)
    if cache.factors is not None:
        of_k, of_v = unpack_factors(pick(cache.factors) if cache.page_table is not None else cache.factors[batch, head])
        k, v = k * of_k[:, None], v * of_v[:, None]
    return k, v


def attend(call: Call) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    q, cache, plan = call.q, call.cache, call.plan
    batch, length, heads, _ = q.shape
    position = cache.slot_positions()
    o = jnp.zeros((batch, length, heads, cache.v.shape[-1]), jnp.float32)
    lse = jnp.zeros((batch, heads, length), jnp.float32)
    for b in range(batch):
        for h in range(heads):
            k, v = rows_of(cache, b, h // call.group)
            for t in range(length):
                i = cache.lengths[b] - length + t
                keep = plan.allow(i, jnp.maximum(position[b], 0), plan.pattern_of_head[h])
                if call.lists is not None:
                    listed = call.lists.to_array(length, position.shape[1])
                    keep |= listed[b, h * listed.shape[1] // heads, t]
                keep &= (position[b] >= 0) & (position[b] <= i)
                s = jnp.where(keep[:, None], k, 0) @ q[b, t, h].astype(jnp.float32) * call.scale
                s = s if call.soft_cap is None else call.soft_cap * jnp.tanh(s / call.soft_cap)
                s = jnp.where(keep, s, -jnp.inf)
                top = jnp.where(keep.any(), s.max(), 0)
                p = jnp.exp(s - top)
                o = o.at[b, t, h].set(p @ jnp.where(keep[:, None], v, 0) / jnp.where(keep.any(), p.sum(), 1))
                lse = lse.at[b, h, t].set(top + jnp.log(p.sum()))
    return o.astype(q.dtype), lse
