"""The meaning of dual chunk attention: float32, every score in memory, the chunk distance of each pair written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
    queries: tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    chunk: int,
    *,
    q_offset: int | Int[Array, " B"] = 0,
    allowed: Bool[Array, "B 1 T S"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """(o, lse): the score of query i and key j takes query number min(i // chunk - j // chunk, 2), for j <= i.

    `allowed` narrows the keys further (segments, lists, a partly filled cache).
    """
    heads, dim = queries[0].shape[2:]
    k, v = (jnp.repeat(x.astype(jnp.float32), heads // x.shape[2], axis=2) for x in (k, v))
    i = (
        jnp.broadcast_to(jnp.asarray(q_offset), k.shape[:1])[:, None, None, None]
        + jnp.arange(queries[0].shape[1])[:, None]
    )
    j = jnp.arange(k.shape[1])
    phase = jnp.minimum(i // chunk - j // chunk, 2)  # [B,1,T,S]
    product = lambda q: jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k, precision="highest")
    score = jnp.stack([jnp.where(phase == n, product(q), 0.0) for n, q in enumerate(queries)]).sum(0) * (
        dim**-0.5 if scale is None else scale
    )
    seen = jnp.broadcast_to(j <= i if allowed is None else (j <= i) & allowed, score.shape)
    some = seen.any(-1)
    lse = jax.nn.logsumexp(jnp.where(seen, score, jnp.where(some[..., None], -jnp.inf, 0.0)), axis=-1)
    weight = jnp.exp(jnp.where(seen, score - lse[..., None], -jnp.inf))
    o = jnp.einsum("bhts,bshd->bthd", weight, v, precision="highest")
    return o.astype(queries[0].dtype), jnp.where(some, lse, -jnp.inf)
