"""Short depthwise causal convolution over time."""

from pallas_kernels.causal_conv.api import causal_conv1d, causal_conv1d_step
from pallas_kernels.causal_conv.sharded import causal_conv1d_sharded

__all__ = ["causal_conv1d", "causal_conv1d_sharded", "causal_conv1d_step"]
