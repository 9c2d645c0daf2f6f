"""Short depthwise causal convolution over time, and the features that LAWCAT makes of it."""

from pallas_kernels.causal_conv.api import causal_conv1d, causal_conv1d_step
from pallas_kernels.causal_conv.features import hedgehog, hedgehog_conv1d
from pallas_kernels.causal_conv.sharded import causal_conv1d_sharded

__all__ = ["causal_conv1d", "causal_conv1d_sharded", "causal_conv1d_step", "hedgehog", "hedgehog_conv1d"]
