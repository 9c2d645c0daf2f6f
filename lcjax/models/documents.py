"""Attention of documents that don't see each other, between a block before and a block after them (BlockRank)."""

import functools
from dataclasses import dataclass
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcjax.cache.base import AttentionCache
from lcjax.cache.room import Room
from lcjax.models.patterns import Pattern
from lcjax.parallel import ops
from lcjax.parallel.layout import current_layout
from lcjax.parallel.work import counting
from pallas_kernels import merge_attention
from pallas_kernels.masks import Causal, Intervals, Mask
from pallas_kernels.plan import INF

PARTS = 2  # of the keys that the last block reads: its few tiles of rows would leave half of a GPU idle


@dataclass(frozen=True)
class DocumentBlocks(Pattern):
    """Rows of documents + 2 blocks of `size` tokens (arXiv 2510.05396), causal within each block.

    Every block reads the first one, and the last reads them all; documents don't read each other. So the pairs grow
    linearly with the documents. In terms of the keys: a document's expire at its end and come back for the last block.
    """

    size: int
    documents: int

    def __post_init__(self):
        if self.size < 1 or self.documents < 0:
            raise ValueError(f"DocumentBlocks: size {self.size} must be positive, documents {self.documents} not < 0")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return (self.documents + 2) * self.size

    def mask(self, num_heads: int, num_kv_heads: int) -> Mask:
        block = np.arange(self.documents + 2)
        document = (block > 0) & (block <= self.documents)
        expiry = np.where(document, (block + 1) * self.size, INF).astype(np.int32)
        last = np.where(document, self.length - self.size, 0), np.where(document, INF, 0)
        return Causal() & Intervals(self.size, expiry, np.stack(last, axis=1).astype(np.int32))

    def attend(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        **options: Any,
    ) -> Float[Array, "B T H D"]:
        """Whole rows as three causal calls, of which kernels skip more: the first block, the documents, the last block.

        The documents are a batch, each behind a copy of the first block's keys. Rows that are cut or split over a mesh
        go by the mask.
        """
        layout = current_layout(q.shape[0], (), q.shape[1])
        split = layout is not None and layout.length is not None
        if split or counting() or not self.documents or q.shape[1] != self.length:
            return super().attend(q, k, v, segment_ids=segment_ids, **options)
        size, batch, ids = self.size, q.shape[0], segment_ids
        call = functools.partial(ops.attention, mask=Causal(), **options)
        pair = lambda queries, keys: None if ids is None else (queries(ids), keys(ids))
        head = lambda x: x[:, :size]
        parts = [
            call(head(q), head(k), head(v), segment_ids=None if ids is None else head(ids)),
            call(
                self._own(q), self._read(k), self._read(v), segment_ids=pair(self._own, self._read),
                q_offset=jnp.full(batch * self.documents, size),
            ),
            self._last(call, q, k, v, ids),
        ]  # fmt: skip
        return jnp.concatenate([cast(Array, o).reshape(batch, -1, *q.shape[2:]) for o in parts], axis=1)

    def _last(self, call: Any, q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        """The last block's rows: on equal parts of the keys at once where these divide, and then merged."""
        divides = self.length % PARTS == 0 and self.size * PARTS <= self.length
        count = PARTS if divides and call.keywords.get("sink_logits") is None else 1
        batch, keys = q.shape[0], self.length // count
        rows = lambda x: jnp.repeat(x[:, -self.size :], count, axis=0)
        part = lambda x: x.reshape(batch * count, keys, *x.shape[2:])
        o, lse = call(
            rows(q), part(k), part(v), segment_ids=None if ids is None else (rows(ids), part(ids)),
            q_offset=jnp.tile(self.length - self.size - keys * jnp.arange(count), batch), return_lse=True,
        )  # fmt: skip
        each = lambda x: jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0)
        return merge_attention(*zip(each(o), each(lse), strict=True))[0]

    def _own(self, x: Array) -> Array:
        """`[B,T,...]` -> `[B documents, size, ...]`."""
        return x[:, self.size : -self.size].reshape(-1, self.size, *x.shape[2:])

    def _read(self, x: Array) -> Array:
        """`[B,T,...]` -> `[B documents, 2 size, ...]`: the first block and each document's own."""
        first = jnp.repeat(x[:, : self.size], self.documents, axis=0)
        return jnp.concatenate([first, self._own(x)], axis=1)

    def cache(self, room: Room) -> AttentionCache:
        raise ValueError(
            "DocumentBlocks ranks documents in one pass and decodes nothing: decode with full attention "
            "(Attention.pattern = None)"
        )
