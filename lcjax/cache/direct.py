"""Attention of a few query tokens over every slot of a cache, in plain XLA.

Decoding is bound by reading the cache, so the two products are laid out to read it exactly once, as it is stored and
in its own dtype: the queries of all heads go block-diagonally over the K*D columns of a `[S, K*D]` view. That costs
K times the multiplications, which a decode step has to spare, and saves any transposed or widened copy. Keys are cut
into runs (split-K) so that a single request still fills the device.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

RUN = 256  # keys a batched product covers; a capacity that is a multiple splits evenly


def attend_direct(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    allowed: Bool[Array, "B #H T S"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    return_lse: bool = True,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
    """Softmax attention where `allowed`; (o in q's dtype, lse in float32). A row without keys gives 0 and -inf."""
    batch, steps, heads, dim = q.shape
    slots, groups, value_dim = k.shape[1], k.shape[2], v.shape[3]
    runs = slots // RUN if slots % RUN == 0 else 1
    rows = heads * steps
    eye = jnp.eye(groups, dtype=k.dtype)
    # [B,H*T,K*D]: head h of group g has its query in columns g*D..., zeros elsewhere.
    grouped = jnp.moveaxis(q.astype(k.dtype), 1, 2).reshape(batch, groups, -1, 1, dim)
    wide = (grouped * eye[:, None, :, None]).reshape(batch, 1, rows, groups * dim)
    wide = jnp.broadcast_to(wide, (batch, runs, rows, groups * dim))
    keys = k.reshape(batch, runs, slots // runs, groups * dim)
    scores = _product(wide, keys, contract=(3, 3)) * (dim**-0.5 if scale is None else scale)  # [B,C,H*T,S/C]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(_by_run(allowed, heads, runs), scores, -jnp.inf)
    top = jnp.max(scores, axis=(1, 3), keepdims=True)
    if sink_logits is not None:
        sink = jnp.repeat(sink_logits.astype(jnp.float32), steps)[None, None, :, None]
        top = jnp.maximum(top, sink)
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - safe)
    total = jnp.sum(weights, axis=(1, 3), keepdims=True)
    if sink_logits is not None:
        total = total + jnp.exp(sink - safe)
    values = v.reshape(batch, runs, slots // runs, groups * value_dim)
    partial = _product(weights.astype(v.dtype), values, contract=(3, 2))  # [B,C,H*T,K*Dv]
    summed = (jnp.sum(partial, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0))[:, 0]
    summed = summed.reshape(batch, groups, rows // groups, groups, value_dim)
    o = jnp.sum(summed * eye[:, None, :, None].astype(summed.dtype), axis=3)  # own group's columns
    o = jnp.moveaxis(o.reshape(batch, heads, steps, value_dim), 1, 2).astype(q.dtype)
    if not return_lse:
        return o, None
    lse = jnp.where(total > 0, safe + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return o, lse.reshape(batch, heads, steps)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Batched over the two leading axes, accumulated in float32; float32 inputs keep all their bits."""
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _by_run(allowed: Array, heads: int, runs: int) -> Array:
    """`[B,1|H,T,S]` -> `[B,C,H*T,S/C]`."""
    batch, _, steps, slots = allowed.shape
    full = jnp.broadcast_to(allowed, (batch, heads, steps, slots))
    return jnp.moveaxis(full.reshape(batch, heads * steps, runs, slots // runs), 2, 1)
