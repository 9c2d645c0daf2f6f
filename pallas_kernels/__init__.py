"""Attention and recurrence kernels for long contexts: arrays in, arrays out."""

from pallas_kernels import masks
from pallas_kernels.attention.api import block_sparse_attention
from pallas_kernels.lists import BlockList
from pallas_kernels.merge import merge_attention
from pallas_kernels.op import Unsupported

__all__ = ["BlockList", "Unsupported", "block_sparse_attention", "masks", "merge_attention"]
