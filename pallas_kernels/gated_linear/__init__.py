"""Gated linear attention and its delta-rule relatives."""

from pallas_kernels.gated_linear.api import LinearState, gated_linear_attention, recurrent_step

__all__ = ["LinearState", "gated_linear_attention", "recurrent_step"]
