"""`dual_chunk_attention`: three calls of the block-sparse op on disjoint keys, and their merge.

The three masks are columns of the normal form, so every backend of `block_sparse_attention` runs it, forward and
backward. Together they visit the tiles of plain causal attention and no more: what dual chunk attention costs beyond it
is the bytes of the merge.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.api import SegmentIds, block_sparse_attention
from pallas_kernels.dual_chunk.masks import chunk_masks
from pallas_kernels.lists import BlockList
from pallas_kernels.masks import Causal, Sink
from pallas_kernels.merge import Part, add_sink_logits, merge_attention


def dual_chunk_attention(
    queries: Sequence[Float[Array, "B T H D"]],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    chunk: int,
    lists: BlockList | None = None,
    segment_ids: SegmentIds | None = None,
    q_offset: int | Int[Array, " B"] | Int[Array, ""] | None = None,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"] | Part:
    """Causal attention whose query depends on how many chunks back the key is (An et al., arXiv 2402.17463).

    `queries` are three rotations of the same query: for keys of its own chunk, of the chunk before, and of older ones.
    Keys come with one rotation (their position modulo `chunk`). Chunks of `chunk` tokens are counted in absolute
    positions: query row t is at `q_offset + t`. A text of at most one chunk is plain causal attention on queries[0].

    lists: only these key blocks are read, under causality; `chunk` and q_offset must be multiples of their block sizes,
    so that a pair of blocks lies in one pair of chunks. The other arguments are those of `block_sparse_attention`.

    Raises:
      ValueError: not three queries of one shape, or a chunk that does not fit.
      Unsupported: as `block_sparse_attention`.
    """
    if len(queries) != 3 or len({q.shape for q in queries}) != 1:
        shapes = ", ".join(str(q.shape) for q in queries)
        raise ValueError(f"dual_chunk_attention: needs three queries of one shape (own, next, older), got {shapes}")
    masks = chunk_masks(chunk, k.shape[1])
    selections: tuple[BlockList | None, ...] = (None, None, None)
    if lists is not None:
        masks, selections = (Causal() & Sink(0),) * 3, split_lists(lists, chunk, 0 if q_offset is None else q_offset)
    attend = functools.partial(
        block_sparse_attention,
        segment_ids=segment_ids,
        q_offset=q_offset,
        kv_length=kv_length,
        scale=scale,
        soft_cap=soft_cap,
        implementation=implementation,
    )
    reach = _reach(chunk, k.shape[1], queries[0].shape[1], q_offset)
    if reach == 1:
        mask = Causal() if lists is None else masks[0]
        return attend(queries[0], k, v, mask, lists=selections[0], sink_logits=sink_logits, return_lse=return_lse)
    parts = zip(queries, masks, selections, strict=True)
    found = [attend(q, k, v, mask, lists=chosen, return_lse=True) for q, mask, chosen in list(parts)[:reach]]
    o, lse = merge_attention(*cast(list[Part], found))
    if sink_logits is not None:
        o, lse = add_sink_logits(o, lse, sink_logits)
    return (o, lse) if return_lse else o


def _reach(chunk: int, keys: int, length: int, q_offset: int | Array | None) -> int:
    """How many of the three parts can hold a key: as many as the keys have chunks."""
    first = q_offset or 0 if q_offset is None or isinstance(q_offset, int) else keys
    return min(-(-min(keys, first + length) // chunk), 3)


def split_lists(lists: BlockList, chunk: int, q_offset: int | Array) -> tuple[BlockList, BlockList, BlockList]:
    """The listed key blocks of each query block, by how many chunks back they are: 0, 1, or more."""
    for name, block in (("block_q", lists.block_q), ("block_k", lists.block_k)):
        if chunk % block:
            raise ValueError(f"dual_chunk_attention: chunk {chunk} does not fit: lists.{name}={block} must divide it")
    if isinstance(q_offset, int) and q_offset % lists.block_q:
        raise ValueError(
            f"dual_chunk_attention: q_offset {q_offset} must be a multiple of lists.block_q={lists.block_q}"
        )
    idx, count = jnp.asarray(lists.idx), jnp.asarray(lists.count)
    batch, _, rows, width = idx.shape
    first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))[:, None] + jnp.arange(rows) * lists.block_q
    back = (first // chunk)[:, None, :, None] - idx * lists.block_k // chunk
    used = jnp.arange(width) < count[..., None]

    def part(keep: Array) -> BlockList:
        order = jnp.argsort(~keep, axis=-1, stable=True)
        packed = jnp.where(jnp.take_along_axis(keep, order, -1), jnp.take_along_axis(idx, order, -1), -1)
        return BlockList(packed, keep.sum(-1, dtype=jnp.int32), lists.block_q, lists.block_k)

    return part(used & (back == 0)), part(used & (back == 1)), part(used & (back >= 2))
