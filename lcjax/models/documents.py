"""Attention of documents that don't see each other, between a block before and a block after them (BlockRank)."""

from dataclasses import dataclass

import numpy as np

from lcjax.cache.base import AttentionCache
from lcjax.cache.room import Room
from lcjax.models.patterns import Pattern
from pallas_kernels.masks import Causal, Intervals, Mask
from pallas_kernels.plan import INF


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

    def cache(self, room: Room) -> AttentionCache:
        raise ValueError(
            "DocumentBlocks ranks documents in one pass and decodes nothing: decode with full attention "
            "(Attention.pattern = None)"
        )
