"""The meaning of block-sparse attention: float32, one head at a time, every score in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.call import Call
from pallas_kernels.masks import Evaluation
from pallas_kernels.op import Unsupported


def attend(call: Call) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """(o, lse) of the call, differentiable by JAX; keys and values that are not finite count as zero."""
    if call.whole is not None:
        raise Unsupported("JAX differentiates it, so a whole result is no help")
    q, k, v = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    k, v = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (k, v))
    batch, length, heads, _ = q.shape
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    flat = [jnp.swapaxes(x, 1, 2).reshape(batch * heads, *x.shape[1::2]) for x in (q, k, v)]
    allowed = visible(call).reshape(batch * heads, length, k.shape[1])
    o, lse = jax.lax.map(lambda head: _head(*head, call), (*flat, allowed))
    o = jnp.swapaxes(o.reshape(batch, heads, length, -1), 1, 2)
    return o.astype(call.q.dtype), lse.reshape(batch, heads, length)


def _head(q, k, v, allowed, call):
    score = jnp.matmul(q, k.T, precision="highest") * call.scale
    if call.soft_cap is not None:
        score = call.soft_cap * jnp.tanh(score / call.soft_cap)
    score = jnp.where(allowed, score, -jnp.inf)
    some = allowed.any(-1)
    lse = jax.nn.logsumexp(jnp.where(some[:, None], score, 0.0), axis=-1)
    weight = jnp.exp(jnp.where(allowed, score - lse[:, None], -jnp.inf))
    return jnp.matmul(weight, v, precision="highest"), jnp.where(some, lse, -jnp.inf)


def visible(call: Call) -> Bool[Array, "B H T S"]:
    """Which keys each query reads, from the mask's expression and not from its normal form."""
    (batch, length, heads, _), keys = call.q.shape, call.k.shape[1]
    j = jnp.arange(keys)
    allowed = []
    for b in range(batch):
        offset = call.q_offset if isinstance(call.q_offset, int) else call.q_offset[b]
        i = jnp.arange(length)[:, None] + offset
        ids = None if call.segment_ids is None else (call.segment_ids[0][b], call.segment_ids[1][b])
        keep = call.mask.evaluate(i, j[None], Evaluation(length, keys, ids, skip_lists=True))
        if call.lists is not None:
            chosen = call.lists.to_array(length, keys)[b] & ((j <= i) | (not call.mask.causal))
            keep = keep | jnp.repeat(chosen, heads // chosen.shape[0], axis=0)
        keep = jnp.broadcast_to(keep, (heads, length, keys))
        if ids is not None:
            keep = keep & (ids[0][:, None] == ids[1][None, :])
        allowed.append(keep if call.kv_length is None else keep & (j < call.kv_length[b]))
    return jnp.stack(allowed)
