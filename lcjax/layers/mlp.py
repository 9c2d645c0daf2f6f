"""The gated feed-forward sublayer."""

import functools

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.layers.linear import Linear
from lcjax.layers.weight import Weight
from lcjax.models.spec import ModelSpec

ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(activation(gate x) * up x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.activation = spec.activation
        wide = Weight((spec.width, spec.mlp_width), ("embed", "mlp"), std=spec.width**-0.5)
        narrow = Weight(
            (spec.mlp_width, spec.width), ("mlp", "embed"), std=(2 * spec.num_layers * spec.mlp_width) ** -0.5
        )
        self.gate = Linear(wide, bias=spec.mlp_bias, rngs=rngs, param_dtype=param_dtype)
        self.up = Linear(wide, bias=spec.mlp_bias, rngs=rngs, param_dtype=param_dtype)
        self.down = Linear(narrow, bias=spec.mlp_bias, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        return self.down(ACTIVATION[self.activation](self.gate(x)) * self.up(x))
