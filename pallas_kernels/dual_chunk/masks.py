"""Which keys each of the three queries of dual chunk attention reads."""

from __future__ import annotations

import numpy as np

from pallas_kernels.masks import Causal, Intervals, Mask
from pallas_kernels.plan import INF


def chunk_masks(chunk: int, keys: int) -> tuple[Mask, Mask, Mask]:
    """(intra, successive, inter) over `keys` keys: those of the query's own chunk, of the chunk before, of older ones.

    They are disjoint and together causal. Chunks are counted in absolute positions from 0; a chunk is one block of the
    normal form, read by a single interval of rows.
    """
    if chunk < 1:
        raise ValueError(f"dual_chunk_attention: chunk {chunk} does not fit: it must be at least 1 token")
    begin = np.arange(-(-keys // chunk), dtype=np.int64) * chunk
    row = lambda n: np.minimum(begin + n * chunk, INF).astype(np.int32)  # first row of the chunk n further on
    never = np.zeros_like(row(0))
    later = lambda first, last: Causal() & Intervals(chunk, never, np.stack([first, last], -1))
    return Causal() & Intervals(chunk, row(1)), later(row(1), row(2)), later(row(2), np.full_like(never, INF))
