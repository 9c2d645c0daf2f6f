"""The gated linear attention mixer (Yang et al., arXiv 2312.06635), with optional short convolutions and normaliser."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.cache.recurrent import RecurrentCache
from lcjax.layers.attention import Context
from lcjax.layers.forget import GATE_TEMPERATURE, log_forget
from lcjax.layers.linear import Linear, each
from lcjax.layers.norm import RMSNorm
from lcjax.layers.recurrence import Convolution, Inputs, recur
from lcjax.layers.weight import Weight
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import ModelSpec

FEATURES = {
    "none": lambda x: x,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "softmax": lambda x: jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype),
}


class GatedLinearLayer(nnx.Module):
    """q, k, v projections, feature map, decay, the recurrence, and an optional normed output gate. No rotary."""

    def __init__(self, spec: ModelSpec, mixer: GatedLinear, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.mixer = mixer
        heads, keys, values = mixer.sizes(spec)
        width = spec.width
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        key = Weight((width, heads, keys), ("embed", "heads", "head_dim"), std=width**-0.5)
        value = Weight((width, heads, values), ("embed", "heads", "head_dim"), std=width**-0.5)
        out = Weight(
            (heads, values, width), ("heads", "head_dim", "embed"), std=(2 * spec.num_layers * heads * values) ** -0.5
        )
        self.query, self.key, self.value = Linear(key, **init), Linear(key, **init), Linear(value, **init)
        self.out = Linear(out, inputs=2, **init)
        down = Weight((width, mixer.decay_rank), ("embed", "rank"), std=width**-0.5)
        up = Weight((mixer.decay_rank, heads, keys), ("rank", "heads", "head_dim"), std=mixer.decay_rank**-0.5)
        if mixer.decay == "scalar":
            up = Weight((width, heads), ("embed", "heads"), std=width**-0.5)
        self.decay_down = Linear(down, **init) if mixer.decay == "vector" else None
        self.decay_up = Linear(up, bias=True, **init) if mixer.decay != "none" else None
        self.gate = Linear(value, **init) if mixer.output_gate else None
        self.norm = RMSNorm(values, "head_dim", eps=spec.norm_eps, **init) if mixer.output_gate else None
        taps = mixer.conv_width
        streams = {"q": (heads, keys), "k": (heads, keys), "v": (heads, values)} if taps else {}
        axes = ("taps", "heads", "head_dim")
        self.convs = nnx.Dict(
            {name: Convolution(Weight((taps, *shape), axes, std=taps**-0.5), **init) for name, shape in streams.items()}
        )

    def _log_decay(self, x: Float[Array, "B T width"]) -> Float[Array, "..."] | None:
        if self.decay_up is None:
            return None
        if self.decay_down is not None:
            return log_forget(self.decay_down(x), self.decay_up)
        return jax.nn.log_sigmoid(self.decay_up(x).astype(jnp.float32)) / GATE_TEMPERATURE

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: RecurrentCache | None = None
    ) -> tuple[Float[Array, "B T width"], RecurrentCache | None]:
        streams, tails = dict(zip("qkv", each(x, self.query, self.key, self.value), strict=True)), {}
        for name, convolve in self.convs.items():
            tail = None if cache is None else cache.tails[name]
            streams[name], tails[name] = convolve(streams[name], context, tail)
        features = FEATURES[self.mixer.feature_map]
        inputs = Inputs(features(streams["q"]), features(streams["k"]), streams["v"], self._log_decay(x))
        o, state = recur(inputs, context, cache, normalise=self.mixer.normalise)
        if self.gate is not None and self.norm is not None:
            o = self.norm(o) * jax.nn.silu(self.gate(x))
        after = None if cache is None else cache.advance(state, tails, x.shape[1], context.valid)
        return self.out(o.astype(x.dtype)), after
