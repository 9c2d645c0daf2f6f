"""Attention and recurrence kernels for long contexts: arrays in, arrays out."""

from pallas_kernels import masks
from pallas_kernels.attention.api import block_sparse_attention
from pallas_kernels.causal_conv import (
    causal_conv1d,
    causal_conv1d_sharded,
    causal_conv1d_step,
    hedgehog,
    hedgehog_conv1d,
)
from pallas_kernels.decode.api import decode_attention
from pallas_kernels.decode.cache import KVCache, pack_factors, quantize_tokens
from pallas_kernels.decode.select import BlockBounds, block_bounds, block_scores, select_blocks
from pallas_kernels.dual_chunk import chunk_masks, dual_chunk_attention
from pallas_kernels.gated_linear import (
    LinearState,
    gated_linear_attention,
    gated_linear_attention_sharded,
    gated_linear_attention_truncated,
    recurrent_step,
)
from pallas_kernels.lists import BlockList
from pallas_kernels.merge import merge_attention
from pallas_kernels.op import Unsupported

__all__ = [
    "BlockBounds",
    "BlockList",
    "KVCache",
    "LinearState",
    "Unsupported",
    "block_bounds",
    "block_scores",
    "block_sparse_attention",
    "causal_conv1d",
    "causal_conv1d_sharded",
    "causal_conv1d_step",
    "chunk_masks",
    "decode_attention",
    "dual_chunk_attention",
    "gated_linear_attention",
    "gated_linear_attention_sharded",
    "gated_linear_attention_truncated",
    "hedgehog",
    "hedgehog_conv1d",
    "masks",
    "merge_attention",
    "pack_factors",
    "quantize_tokens",
    "recurrent_step",
    "select_blocks",
]
