"""Dense projections over any number of input and output axes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lcjax.layers.weight import Draw, Weight
from lcjax.parallel.weights import whole
from pallas_kernels.op import platform

JOINED_TOKENS = 64  # up to which projections of the same tokens may be one product


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 means float32: accelerators would otherwise multiply it in fewer bits."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def contract(
    x: Float[Array, "*batch_and_inputs"], kernel: Float[Array, "*inputs_and_outputs"], inputs: int
) -> Float[Array, "*batch_and_outputs"]:
    """x W over the last `inputs` axes of x.

    XLA for GPUs makes elementwise products of one row and a matrix of less than ten million weights, and writes them
    all out before it adds them up: three times the weights' bytes. Two rows stay a matrix product.
    """
    last = tuple(range(x.ndim - inputs, x.ndim))
    alone = platform() == "gpu" and all(size == 1 for size in x.shape[: x.ndim - inputs])
    wide = jnp.broadcast_to(x, (2, *x.shape)) if alone else x
    over = tuple(axis + alone for axis in last), tuple(range(inputs))
    y = jax.lax.dot_general(wide, kernel, (over, ((), ())), precision=precision(x.dtype))
    return y[0] if alone else y


def each(x: Float[Array, "B T n"], *projections: Callable[[Array], Array]) -> Iterator[Array]:
    """Every projection of x, in products that XLA for GPUs is not to join.

    It joins products of one x (of up to 32 MiB each), and as kernels take whole arrays, copies then cut the result up
    again. With few tokens these are small, and launches count for more.
    """
    for n, project in enumerate(projections):
        if n and platform() == "gpu" and x.shape[1] > JOINED_TOKENS:
            x = jax.lax.optimization_barrier(x)
        yield project(x)


@jax.custom_vjp
def wide_product(x: Float[Array, "*batch n"], w: Float[Array, "n m"]) -> Float[Array, "*batch m"]:
    """x W in float32, whatever the operands' dtype, which cotangents take before they meet them.

    A float32 cotangent would turn both products of the backward pass into float32's, on tensor cores at half the speed.
    """
    return jnp.matmul(x, w, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _wide_product_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_product(x, w), (x, w)


def _wide_product_bwd(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = operands
    g = g.astype(x.dtype)
    rows, like = tuple(range(x.ndim - 1)), precision(x.dtype)
    return jnp.matmul(g, w.T, precision=like), jax.lax.dot_general(x, g, ((rows, rows), ((), ())), precision=like)


wide_product.defvjp(_wide_product_fwd, _wide_product_bwd)


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
        y = contract(x, kernel, self.inputs)
        if self.adapter is not None:
            y = self.adapter(x, y, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def weights(self, dtype: DTypeLike) -> tuple[Float[Array, "*inputs_and_outputs"], Float[Array, "*outputs"] | None]:
        """W as the adapter leaves it, and b, for a caller with a product of its own."""
        kernel = self.kernel[...] if self.adapter is None else self.adapter.merged(self.kernel[...])
        bias = None if self.bias is None else self.bias[...].astype(dtype)
        return whole(kernel.astype(dtype), self.kernel.axes), bias


class Embed(nnx.Module):
    """Token table [V, width]; also the unembedding where the two are tied."""

    def __init__(self, weight: Weight, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.table = weight.param(rngs, param_dtype)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T width"]:
        # From a table split by features every chip would look up a slice of all tokens, which then are put together.
        return jnp.take(whole(self.table[...], self.table.axes), tokens, axis=0)
