"""Low-rank adapters on linear layers: LoRA (Hu et al., arXiv 2106.09685) and DoRA (Liu et al., arXiv 2402.09353)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.layers.linear import Linear, precision
from lcjax.layers.weight import Weight
from lcjax.models.spec import Adapters


class Adapter(nnx.Module):
    """What is added to the weight W of one linear layer: (alpha / rank) down up, with `up` zero at the start.

    DoRA also rescales each output's column of the sum to a trained `magnitude`, W's own column norm at the start. It
    is stored as the factor on that norm, so that an adapter starts as the identity whatever W is.
    """

    def __init__(self, adapters: Adapters, linear: Linear, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        shape, axes, inputs = linear.kernel.shape, linear.kernel.axes, linear.inputs
        fan_in = 1
        for size in shape[:inputs]:
            fan_in *= size
        down = Weight((*shape[:inputs], adapters.rank), (*axes[:inputs], "rank"), std=fan_in**-0.5)
        up = Weight((adapters.rank, *shape[inputs:]), ("rank", *axes[inputs:]))
        self.scale = adapters.alpha / adapters.rank
        self.inputs = inputs
        self.down, self.up = down.param(rngs, param_dtype), up.param(rngs, param_dtype)
        magnitude = Weight(shape[inputs:], axes[inputs:], fill=1.0)
        self.magnitude = magnitude.param(rngs, param_dtype) if adapters.dora else None

    def delta(self, dtype: DTypeLike) -> Float[Array, "*kernel"]:
        """(alpha / rank) down up, in the kernel's shape."""
        down, up = self.down[...].astype(dtype), self.up[...].astype(dtype)
        return self.scale * jnp.tensordot(down, up, axes=1, precision=precision(dtype))

    def gain(self, kernel: Float[Array, "*kernel"]) -> Float[Array, "*outputs"]:
        """DoRA's factor on each output: magnitude |W| / |W + delta|, whose denominator is a constant to gradients."""
        assert self.magnitude is not None
        axes = tuple(range(self.inputs))
        frozen = kernel.astype(jnp.float32)
        norm = lambda w: jnp.sqrt(jnp.sum(w * w, axis=axes))
        merged = jax.lax.stop_gradient(frozen + self.delta(jnp.float32))
        return self.magnitude[...].astype(jnp.float32) * norm(frozen) / norm(merged)

    def merged(self, kernel: Float[Array, "*kernel"]) -> Float[Array, "*kernel"]:
        """The plain kernel that acts as `kernel` under this adapter."""
        w = kernel.astype(jnp.float32) + self.delta(jnp.float32)
        return (w if self.magnitude is None else w * self.gain(kernel)).astype(kernel.dtype)

    def __call__(
        self, x: Float[Array, "*batch_and_inputs"], y: Float[Array, "*batch_and_outputs"], kernel: Float[Array, "..."]
    ) -> Float[Array, "*batch_and_outputs"]:
        """The layer's product y = x W, adapted; W is never copied."""
        down, up = self.down[...].astype(x.dtype), self.up[...].astype(x.dtype)
        last = tuple(range(x.ndim - self.inputs, x.ndim))
        small = jax.lax.dot_general(
            x, down, ((last, tuple(range(self.inputs))), ((), ())), precision=precision(x.dtype)
        )
        y = y + self.scale * jnp.tensordot(small, up, axes=1, precision=precision(x.dtype))
        return y if self.magnitude is None else y * self.gain(kernel).astype(y.dtype)


def attach(model: nnx.Module, adapters: Adapters, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
    """Give every linear layer whose dotted path matches one of `adapters.targets` its adapter.

    Raises ValueError for a target that names no linear layer.
    """
    linears = {dotted(path): module for path, module in nnx.iter_graph(model) if isinstance(module, Linear)}
    for target in adapters.targets:
        found = [name for name in linears if re.search(target, name)]
        if not found:
            known = ", ".join(sorted({name.split(".", 2)[-1] for name in linears}))
            raise ValueError(f"Adapters.targets has {target!r}, which names no linear layer; known: {known}")
        for name in found:
            linears[name].adapter = Adapter(adapters, linears[name], rngs=rngs, param_dtype=param_dtype)


def dotted(path: tuple[Any, ...]) -> str:
    """A module's path as text."""
    return ".".join(map(str, path))
