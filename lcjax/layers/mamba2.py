"""The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060): a state-space layer as linear attention with scalar decay."""

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
from lcjax.layers.recurrence import Convolution, Inputs, log_uniform_rates, recur, repeat_heads, step_biases
from lcjax.layers.weight import Weight
from lcjax.models.recurrent import Mamba2
from lcjax.models.spec import ModelSpec


class Mamba2Layer(nnx.Module):
    """x, B, C, gate and time step from one input; C, B and step x stand for q, k and v; gated norm; projection."""

    def __init__(self, spec: ModelSpec, mixer: Mamba2, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.mixer = mixer
        memory, width = mixer.memory(spec), spec.width
        heads, dim, groups = memory.heads, mixer.head_dim, mixer.groups
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        inner = Weight((width, heads, dim), ("embed", "heads", "head_dim"), std=width**-0.5)
        shared = Weight((width, groups, mixer.state), ("embed", "groups", "head_dim"), std=width**-0.5)
        self.value, self.gate = Linear(inner, **init), Linear(inner, **init)
        self.key, self.query = Linear(shared, **init), Linear(shared, **init)
        self.step = Linear(Weight((width, heads), ("embed", "heads"), std=width**-0.5), **init)
        taps = mixer.conv_width
        streams = {
            "x": ("heads", heads, dim),
            "b": ("groups", groups, mixer.state),
            "c": ("groups", groups, mixer.state),
        }
        self.convs = nnx.Dict(
            {
                name: Convolution(
                    Weight((taps, count, size), ("taps", axis, "head_dim"), std=taps**-0.5),
                    bias=True,
                    activation="silu",
                    **init,
                )
                for name, (axis, count, size) in streams.items()
            }
        )
        rate, bias = (Weight((heads,), ("heads",), draw=draw) for draw in (log_uniform_rates, step_biases))
        self.log_rate, self.step_bias = rate.param(rngs, param_dtype), bias.param(rngs, param_dtype)
        self.skip = Weight((heads,), ("heads",), fill=1.0).param(rngs, param_dtype)
        self.norm = RMSNorm(heads * dim, "mlp", eps=spec.norm_eps, **init)
        std = (2 * spec.num_layers * heads * dim) ** -0.5
        self.out = Linear(Weight((heads, dim, width), ("heads", "head_dim", "embed"), std=std), inputs=2, **init)

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: RecurrentCache | None = None
    ) -> tuple[Float[Array, "B T width"], RecurrentCache | None]:
        streams, tails = dict(zip("xbc", each(x, self.value, self.key, self.query), strict=True)), {}
        for name, convolve in self.convs.items():
            tail = None if cache is None else cache.tails[name]
            streams[name], tails[name] = convolve(streams[name], context, tail)
        u = streams["x"]  # [B,T,H,D]
        heads = u.shape[2]
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])  # [B,T,H]
        decay = -jnp.exp(self.log_rate[...].astype(jnp.float32)) * step
        q, k = repeat_heads(streams["c"], heads), repeat_heads(streams["b"], heads)
        o, state = recur(Inputs(q, k, u * step[..., None].astype(u.dtype), decay), context, cache, scale=1.0)
        o = o.astype(u.dtype) + self.skip[...].astype(u.dtype)[:, None] * u
        o = o * jax.nn.silu(self.gate(x))
        o = self.norm(o.reshape(*o.shape[:2], -1)).reshape(o.shape)
        after = None if cache is None else cache.advance(state, tails, x.shape[1], context.valid)
        return self.out(o), after
