"""Gated linear attention and its delta-rule relatives."""

from pallas_kernels.gated_linear.api import LinearState, gated_linear_attention, recurrent_step
from pallas_kernels.gated_linear.sharded import gated_linear_attention_sharded

__all__ = ["LinearState", "gated_linear_attention", "gated_linear_attention_sharded", "recurrent_step"]
