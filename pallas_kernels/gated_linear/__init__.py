"""Gated linear attention and its delta-rule relatives."""

from pallas_kernels.gated_linear.api import LinearState, gated_linear_attention, recurrent_step
from pallas_kernels.gated_linear.sharded import gated_linear_attention_sharded
from pallas_kernels.gated_linear.truncated import gated_linear_attention_truncated

__all__ = [
    "LinearState",
    "gated_linear_attention",
    "gated_linear_attention_sharded",
    "gated_linear_attention_truncated",
    "recurrent_step",
]
