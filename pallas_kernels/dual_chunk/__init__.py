"""Dual chunk attention: three query rotations over one set of keys."""

from pallas_kernels.dual_chunk.api import dual_chunk_attention
from pallas_kernels.dual_chunk.masks import chunk_masks

__all__ = ["chunk_masks", "dual_chunk_attention"]
