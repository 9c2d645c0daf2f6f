"""Short depthwise causal convolution over time."""

from pallas_kernels.causal_conv.api import causal_conv1d, causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]
