"""One residual layer: mixer and feed-forward, each behind a norm (and before another, in sandwich style)."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.layers.attention import AttentionLayer, Context
from lcjax.layers.gated_linear import GatedLinearLayer
from lcjax.layers.mlp import MLP
from lcjax.layers.norm import RMSNorm
from lcjax.models.spec import Attention, Mixer, ModelSpec


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); `post_norm` norms each sublayer's output too."""

    def __init__(self, spec: ModelSpec, mixer: Mixer, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        attends = isinstance(mixer, Attention)
        self.mixer = AttentionLayer(spec, mixer, **init) if attends else GatedLinearLayer(spec, mixer, **init)
        self.mlp = MLP(spec, **init)
        norm: dict[str, Any] = {"eps": spec.norm_eps, "offset": spec.norm_offset, **init}
        self.mixer_norm = RMSNorm(spec.width, "embed", **norm)
        self.mlp_norm = RMSNorm(spec.width, "embed", **norm)
        self.post_mixer_norm = RMSNorm(spec.width, "embed", **norm) if spec.post_norm else None
        self.post_mlp_norm = RMSNorm(spec.width, "embed", **norm) if spec.post_norm else None

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: Any = None
    ) -> tuple[Float[Array, "B T width"], Any]:
        y, cache = self.mixer(self.mixer_norm(x), context, cache)
        x = x + (y if self.post_mixer_norm is None else self.post_mixer_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y)), cache
