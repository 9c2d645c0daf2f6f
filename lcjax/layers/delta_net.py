"""DeltaNet (Yang et al., arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464) mixers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.cache.recurrent import RecurrentCache
from lcjax.layers.attention import Context
from lcjax.layers.linear import Linear, each
from lcjax.layers.norm import RMSNorm
from lcjax.layers.recurrence import Convolution, Inputs, log_uniform_rates, recur, step_biases
from lcjax.layers.weight import Weight
from lcjax.models.recurrent import DeltaNet
from lcjax.models.spec import ModelSpec


class DeltaNetLayer(nnx.Module):
    """Projections, convolutions with SiLU, unit-length q and k, the delta rule, a normed (and gated) output."""

    def __init__(self, spec: ModelSpec, mixer: DeltaNet, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.mixer = mixer
        memory, width = mixer.memory(spec), spec.width
        heads, keys, values = memory.heads, memory.keys, memory.values
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        axes = ("embed", "heads", "head_dim")
        key = Weight((width, heads, keys), axes, std=width**-0.5)
        value = Weight((width, heads, values), axes, std=width**-0.5)
        std = (2 * spec.num_layers * heads * values) ** -0.5
        self.query, self.key, self.value = Linear(key, **init), Linear(key, **init), Linear(value, **init)
        self.out = Linear(Weight((heads, values, width), ("heads", "head_dim", "embed"), std=std), inputs=2, **init)
        per_head = Weight((width, heads), ("embed", "heads"), std=width**-0.5)
        self.strength = Linear(per_head, **init)
        self.norm = RMSNorm(values, "head_dim", eps=spec.norm_eps, **init)
        taps, axes = mixer.conv_width, ("taps", "heads", "head_dim")
        self.convs = nnx.Dict(
            {
                name: Convolution(Weight((taps, heads, dim), axes, std=taps**-0.5), activation="silu", **init)
                for name, dim in (("q", keys), ("k", keys), ("v", values))
            }
        )
        self.step = Linear(per_head, **init) if mixer.gated else None
        self.gate = Linear(value, **init) if mixer.gated else None
        rate, bias = (Weight((heads,), ("heads",), draw=draw) for draw in (log_uniform_rates, step_biases))
        self.log_rate = rate.param(rngs, param_dtype) if mixer.gated else None
        self.step_bias = bias.param(rngs, param_dtype) if mixer.gated else None

    def _log_decay(self, x: Float[Array, "B T width"]) -> Float[Array, "B T H"] | None:
        """-rate x softplus(step), per head."""
        if self.step is None or self.log_rate is None or self.step_bias is None:
            return None
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        return -jnp.exp(self.log_rate[...].astype(jnp.float32)) * step

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: RecurrentCache | None = None
    ) -> tuple[Float[Array, "B T width"], RecurrentCache | None]:
        streams, tails = dict(zip("qkv", each(x, self.query, self.key, self.value), strict=True)), {}
        for name, convolve in self.convs.items():
            tail = None if cache is None else cache.tails[name]
            streams[name], tails[name] = convolve(streams[name], context, tail)
        beta = jax.nn.sigmoid(self.strength(x).astype(jnp.float32)) * (2 if self.mixer.negative_eigenvalues else 1)
        q, k = unit(streams["q"]), unit(streams["k"])
        o, state = recur(Inputs(q, k, streams["v"], self._log_decay(x), beta), context, cache)
        o = self.norm(o.astype(x.dtype))
        if self.gate is not None:
            o = o * jax.nn.silu(self.gate(x))
        after = None if cache is None else cache.advance(state, tails, x.shape[1], context.valid)
        return self.out(o), after


def unit(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x scaled to length 1."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
