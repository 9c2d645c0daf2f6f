"""Choosing which key blocks a decoding step reads: bounds of each block's keys, scores against the query, top n.

The scores bound the largest product of a query with any key of a block (Quest, arXiv 2406.10774; LServe,
arXiv 2502.14866), or use the block's mean key. `select_blocks` makes the `BlockList` that `decode_attention` takes; it
may be used for several steps when the mask covers the tokens since then, as `Causal() & Window(n)`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lists import BlockList


class BlockBounds(NamedTuple):
    """Channel-wise extremes of the rotated keys of each block."""

    low: Float[Array, "B K n D"]
    high: Float[Array, "B K n D"]


def block_bounds(k: Float[Array, "B S K D"], lengths: Int[Array, " B"], block: int) -> BlockBounds:
    """Bounds of the keys below `lengths`, in blocks of `block` that divide S. Blocks without keys hold zeros."""
    batch, size, kv_heads, dim = k.shape
    if size % block:
        raise ValueError(f"block_bounds: {size} keys are not a multiple of block={block}")
    held = (jnp.arange(size) < lengths[:, None]).reshape(batch, size // block, block, 1, 1)
    k = k.reshape(batch, size // block, block, kv_heads, dim)
    some = held.any(2)
    low = jnp.where(some, jnp.where(held, k, jnp.inf).min(2), 0)
    high = jnp.where(some, jnp.where(held, k, -jnp.inf).max(2), 0)
    return BlockBounds(low.swapaxes(1, 2).astype(k.dtype), high.swapaxes(1, 2).astype(k.dtype))


def block_scores(q: Float[Array, "B T H D"], bounds: BlockBounds | Float[Array, "B K n D"]) -> Float[Array, "B K n"]:
    """How well each block may answer the queries: the best over new tokens and over the heads that share a KV head.

    With `BlockBounds` the score is an upper bound of q.k over the block's keys, sum_d max(q_d low_d, q_d high_d); with
    an array it is the product with one key that stands for the block, such as the mean. float32, unscaled.
    """
    batch, queries, heads, dim = q.shape
    stored = bounds.low if isinstance(bounds, BlockBounds) else bounds
    kv_heads = stored.shape[1]
    if heads % kv_heads or stored.shape[3] != dim:
        raise ValueError(f"block_scores: q{q.shape} does not fit blocks{stored.shape} [B,K,n,D]")
    rows = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim).swapaxes(1, 2).reshape(batch, kv_heads, -1, dim)
    product = lambda a, b: jnp.einsum("bkrd,bknd->bkrn", a, b, preferred_element_type=jnp.float32)
    if isinstance(bounds, BlockBounds):
        # max(q l, q h) = relu(q) h - relu(-q) l since l <= h: two matrix products
        scores = product(jax.nn.relu(rows), bounds.high) - product(jax.nn.relu(-rows), bounds.low)
    else:
        scores = product(rows, stored)
    return scores.max(2)


def select_blocks(
    scores: Float[Array, "B Hs n"],
    lengths: Int[Array, " B"],
    count: int,
    block: int,
    *,
    first: int = 0,
    last: int = 1,
) -> BlockList:
    """The `count` best blocks of each request and head, ascending.

    The `first` blocks and the `last` ones that hold keys are always among them (attention sinks, recent tokens).
    Requests with fewer blocks read all they have.

    Raises:
      ValueError: `count` does not exceed what is forced, or there are fewer blocks than `count`.
    """
    blocks = scores.shape[-1]
    if not first + last <= count <= blocks:
        raise ValueError(f"select_blocks: count={count} must lie in {first + last} (first + last)..{blocks} (blocks)")
    held = -(-lengths // block)[:, None, None]
    place = jnp.arange(blocks)
    forced = (place < first) | (place >= held - last)
    ranked = jnp.where(place < held, jnp.where(forced, jnp.inf, scores), -jnp.inf)
    _, chosen = jax.lax.top_k(ranked, count)
    chosen = jnp.sort(jnp.where(chosen < held, chosen, blocks), axis=-1)
    kept = jnp.broadcast_to(jnp.minimum(count, held), (*chosen.shape[:-1], 1))
    idx = jnp.where(jnp.arange(count) < kept, chosen, -1)
    return BlockList(idx[:, :, None].astype(jnp.int32), kept.astype(jnp.int32), block_q=8, block_k=block)
