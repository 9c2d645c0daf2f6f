"""Attention and recurrence kernels for long contexts: arrays in, arrays out."""

from pallas_kernels.causal_conv import causal_conv1d as causal_conv1d, causal_conv1d_step as causal_conv1d_step  # noqa: I001
from pallas_kernels.gated_linear import (
    LinearState as LinearState,
    gated_linear_attention as gated_linear_attention,
    recurrent_step as recurrent_step,
)
