"""Merging attention over disjoint sets of keys by their log-sum-exp."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

type Part = tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]


def merge_attention(*parts: Part) -> Part:
    """Attention over the union of the parts' keys, from each part's (o [B,T,H,Dv], lse [B,H,T]).

    Exact if no key is in two parts. A row that sees no key in any part gives o = 0 and lse = -inf. Differentiable in
    every o and lse. The result has the first part's dtype; lse is float32.

    Raises:
      ValueError: no parts, or shapes that differ.
    """
    if not parts:
        raise ValueError("merge_attention: needs at least one (o, lse)")
    for n, (o, lse) in enumerate(parts):
        if o.shape != parts[0][0].shape or lse.shape != (o.shape[0], o.shape[2], o.shape[1]):
            raise ValueError(
                f"merge_attention: part {n} has o{o.shape} and lse{lse.shape}; every o must be {parts[0][0].shape}"
                " [B,T,H,Dv] and every lse its [B,H,T]"
            )
    lse = jnp.stack([part[1].astype(jnp.float32) for part in parts])
    top = jnp.max(lse, axis=0)
    seen = top > -jnp.inf
    top = jnp.where(seen, top, 0.0)
    weight = jnp.exp(jnp.where(seen, lse, -jnp.inf) - top)
    total = jnp.where(seen, weight.sum(0), 1.0)
    share = jnp.swapaxes(weight / total, 2, 3)[..., None]
    terms = (part[0].astype(jnp.float32) * own for part, own in zip(parts, share, strict=True))
    merged = functools.reduce(jnp.add, terms)  # one pass over each o
    return merged.astype(parts[0][0].dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf)


def add_sink_logits(o: Float[Array, "B T H Dv"], lse: Float[Array, "B H T"], logits: Float[Array, " H"]) -> Part:
    """Attention whose softmax has one more entry per head, a learned logit with a zero value."""
    logits = logits.astype(jnp.float32)[None, :, None]
    total = jnp.logaddexp(lse, logits)
    share = jnp.where(lse > -jnp.inf, jnp.exp(jnp.where(lse > -jnp.inf, lse, 0.0) - total), 0.0)
    return (o.astype(jnp.float32) * jnp.swapaxes(share, 1, 2)[..., None]).astype(o.dtype), total
