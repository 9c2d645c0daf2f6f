"""Dense projections over any number of input and output axes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lcjax.layers.weight import Draw, Weight
from lcjax.parallel.weights import whole


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 means float32: accelerators would otherwise multiply it in fewer bits."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


class Linear(nnx.Module):
    """y = x W (+ b), contracting the last `inputs` axes of x; W is stored [*inputs, *outputs].

    bias: True for one that starts at 0, or what draws it.

    `adapter` (see `lcjax.layers.adapter`) changes what W does without touching it.
    """

    def __init__(
        self,
        kernel: Weight,
        *,
        inputs: int = 1,
        bias: bool | Draw = False,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        self.inputs = inputs
        self.kernel = kernel.param(rngs, param_dtype)
        draw = None if isinstance(bias, bool) else bias
        outputs = Weight(kernel.shape[inputs:], kernel.axes[inputs:], draw=draw)
        self.bias = outputs.param(rngs, param_dtype) if bias else None
        self.adapter: Any = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch_and_inputs"]) -> Float[Array, "*batch_and_outputs"]:
        kernel = whole(self.kernel[...].astype(x.dtype), self.kernel.axes)
        last = tuple(range(x.ndim - self.inputs, x.ndim))
        y = jax.lax.dot_general(x, kernel, ((last, tuple(range(self.inputs))), ((), ())), precision=precision(x.dtype))
        if self.adapter is not None:
            y = self.adapter(x, y, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embed(nnx.Module):
    """Token table [V, width]; also the unembedding where the two are tied."""

    def __init__(self, weight: Weight, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.table = weight.param(rngs, param_dtype)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T width"]:
        # From a table split by features every chip would look up a slice of all tokens, which then are put together.
        return jnp.take(whole(self.table[...], self.table.axes), tokens, axis=0)
