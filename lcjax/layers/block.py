"""One residual layer: mixer and feed-forward, each behind a norm (and before another, in sandwich style)."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.layers.attention import AttentionLayer, Context
from lcjax.layers.delta_net import DeltaNetLayer
from lcjax.layers.gated_heads import GatedHeadsLayer
from lcjax.layers.gated_linear import GatedLinearLayer
from lcjax.layers.linearized import LinearizedLayer
from lcjax.layers.mamba2 import Mamba2Layer
from lcjax.layers.mlp import MLP
from lcjax.layers.norm import RMSNorm
from lcjax.models.gated_heads import GatedHeads
from lcjax.models.recurrent import DeltaNet, GatedLinear, Linearized, Mamba2
from lcjax.models.spec import Attention, Mixer, ModelSpec
from lcjax.parallel.adjoint import adjoint

LAYERS: dict[type[Mixer], Any] = {
    Attention: AttentionLayer,
    GatedHeads: GatedHeadsLayer,
    GatedLinear: GatedLinearLayer,
    Linearized: LinearizedLayer,
    DeltaNet: DeltaNetLayer,
    Mamba2: Mamba2Layer,
}


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); `post_norm` norms each sublayer's output too."""

    def __init__(self, spec: ModelSpec, mixer: Mixer, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.mixer = LAYERS[type(mixer)](spec, mixer, **init)
        self.mlp = MLP(spec, **init)
        norm: dict[str, Any] = {"eps": spec.norm_eps, "offset": spec.norm_offset, **init}
        self.mixer_norm = RMSNorm(spec.width, "embed", **norm)
        self.mlp_norm = RMSNorm(spec.width, "embed", **norm)
        self.post_mixer_norm = RMSNorm(spec.width, "embed", **norm) if spec.post_norm else None
        self.post_mlp_norm = RMSNorm(spec.width, "embed", **norm) if spec.post_norm else None

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: Any = None
    ) -> tuple[Float[Array, "B T width"], Any]:
        local = adjoint().mode == "layer_local" and not isinstance(self.mixer, AttentionLayer)
        y, cache = self.mixer(self.mixer_norm(jax.lax.stop_gradient(x) if local else x), context, cache)
        return self.after_mixer(x, y), cache

    def after_mixer(self, x: Float[Array, "B T width"], y: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        """The layer's result, given its input and what the mixer made of it."""
        x = x + (y if self.post_mixer_norm is None else self.post_mixer_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y))
