"""The gated linear attention mixer (Yang et al., arXiv 2312.06635), with optional short convolutions and normaliser."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.cache.recurrent import RecurrentCache, ragged_tail
from lcjax.layers.attention import Context
from lcjax.layers.linear import Linear
from lcjax.layers.norm import RMSNorm
from lcjax.layers.weight import Weight
from lcjax.models.spec import GatedLinear, ModelSpec
from lcjax.parallel import ops
from pallas_kernels import recurrent_step

GATE_TEMPERATURE = 16.0  # keeps one step's decay above exp(-1) for any sane logit

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
        streams = {"q": (heads, keys), "k": (heads, keys), "v": (heads, values)} if mixer.conv_width else {}
        self.convs = nnx.Dict({name: self._taps(shape, rngs, param_dtype) for name, shape in streams.items()})

    def _taps(self, shape: tuple[int, int], rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Param:
        taps = self.mixer.conv_width
        return Weight((taps, *shape), ("taps", "heads", "head_dim"), std=taps**-0.5).param(rngs, dtype)

    def _log_decay(self, x: Float[Array, "B T width"]) -> Float[Array, "..."] | None:
        if self.decay_up is None:
            return None
        logits = self.decay_up(x if self.decay_down is None else self.decay_down(x))
        return jax.nn.log_sigmoid(logits.astype(jnp.float32)) / GATE_TEMPERATURE

    def _convolve(self, streams: dict[str, jax.Array], context: Context, cache: RecurrentCache | None):
        """Convolve every stream over time; also the new tails (last W-1 real inputs) when there is a cache."""
        tails = {}
        for name, taps in self.convs.items():
            x = streams[name]
            tail = None if cache is None else cache.tails[name].astype(x.dtype)
            streams[name] = ops.causal_conv(x, taps[...].astype(x.dtype), tail=tail, segment_ids=context.segment_ids)
            if tail is not None:
                tails[name] = ragged_tail(x.reshape(*x.shape[:2], -1), tail, context.valid)
        return streams, tails

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: RecurrentCache | None = None
    ) -> tuple[Float[Array, "B T width"], RecurrentCache | None]:
        streams, tails = self._convolve({"q": self.query(x), "k": self.key(x), "v": self.value(x)}, context, cache)
        features = FEATURES[self.mixer.feature_map]
        q, k, v, decay = features(streams["q"]), features(streams["k"]), streams["v"], self._log_decay(x)
        if context.valid is not None:  # padding neither writes to the state nor decays it
            real = context.valid[:, :, None, None]
            k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
            if decay is not None:
                decay = jnp.where(real.reshape(real.shape[: decay.ndim]), decay, 0)
        if cache is not None and x.shape[1] == 1:
            now = None if decay is None else decay[:, 0]
            o, state = recurrent_step(q[:, 0], k[:, 0], v[:, 0], now, cache.state, normalise=self.mixer.normalise)
            o = o[:, None]
        else:
            o, state = ops.gated_linear(
                q, k, v, decay,
                initial_state=None if cache is None else cache.state,
                segment_ids=context.segment_ids,
                normalise=self.mixer.normalise,
            )  # fmt: skip
        if self.gate is not None and self.norm is not None:
            o = self.norm(o) * jax.nn.silu(self.gate(x))
        return self.out(o.astype(x.dtype)), None if cache is None else cache.advance(
            state, tails, x.shape[1], context.valid
        )
