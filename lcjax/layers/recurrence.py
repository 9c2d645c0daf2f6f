"""What the recurrent mixers share: streamed short convolutions, and the recurrence over a chunk or one token."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lcjax.cache.recurrent import RecurrentCache, ragged_tail
from lcjax.layers.attention import Context
from lcjax.layers.weight import Weight
from lcjax.parallel import ops
from pallas_kernels import LinearState, recurrent_step


class Convolution(nnx.Module):
    """A causal depthwise convolution over time of one stream, with taps of its own for every output channel.

    A stream with fewer heads than the taps is repeated first, each head for its group.
    """

    def __init__(
        self,
        taps: Weight,
        *,
        bias: bool = False,
        activation: Literal["silu"] | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        self.activation: Literal["silu"] | None = activation
        self.taps = taps.param(rngs, param_dtype)  # [W, heads, channels]
        self.bias = Weight(taps.shape[1:], taps.axes[1:]).param(rngs, param_dtype) if bias else None

    def __call__(
        self, x: Float[Array, "B T N D"], context: Context, tail: Float[Array, "B W1 ND"] | None
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B W1 ND"] | None]:
        """The convolved stream, and (given the W-1 inputs before x) the inputs for the next call."""
        _, heads, dim = self.taps.shape
        wide = repeat_heads(x, heads)
        before = None
        if tail is not None:
            before = repeat_heads(tail.astype(x.dtype).reshape(*tail.shape[:2], *x.shape[2:]), heads)
            before = before.reshape(*tail.shape[:2], heads * dim)
        y = ops.causal_conv(
            wide,
            self.taps[...].astype(x.dtype),
            bias=None if self.bias is None else self.bias[...].astype(x.dtype),
            tail=before,
            segment_ids=context.segment_ids,
            activation=self.activation,
        )
        return y, self._after(x, context, tail)

    def features(
        self,
        x: Float[Array, "B T N D"],
        maps: Float[Array, "H D f"],
        context: Context,
        tail: Float[Array, "B W1 ND"] | None,
    ) -> tuple[Float[Array, "B T H f2"], Float[Array, "B W1 ND"] | None]:
        """Hedgehog features of the convolved stream (neither bias nor activation), and the inputs for the next call."""
        before = None if tail is None else tail.astype(x.dtype).reshape(*tail.shape[:2], *x.shape[2:])
        taps = self.taps[...].astype(x.dtype)
        y = ops.hedgehog_conv(x, taps, maps.astype(x.dtype), tail=before, segment_ids=context.segment_ids)
        return y, self._after(x, context, tail)

    def _after(self, x, context: Context, tail) -> Float[Array, "B W1 ND"] | None:
        return None if tail is None else ragged_tail(x.reshape(*x.shape[:2], -1), tail, context.valid)


def repeat_heads(x: Float[Array, "B T N *D"], heads: int) -> Float[Array, "B T H *D"]:
    """Each of N heads for its group of heads / N."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


class Inputs(NamedTuple):
    """What the recurrence reads, per token and head; see `pallas_kernels.gated_linear_attention`."""

    q: Float[Array, "B T H Dk"]
    k: Float[Array, "B T Hk Dk"]
    v: Float[Array, "B T Hv Dv"]
    log_decay: Float[Array, "B T Hg *Dk"] | None = None
    beta: Float[Array, "B T H"] | None = None


def recur(
    x: Inputs, context: Context, cache: RecurrentCache | None, *, normalise: bool = False, scale: float | None = None
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """The recurrence over a chunk, or one step of it, from the cache's state; padding leaves the state alone."""
    if context.valid is not None:
        keep = context.valid
        x = jax.tree.map(lambda part: masked(part, keep), x)
    if cache is not None and x.q.shape[1] == 1:
        q, k, v, decay, beta = (None if part is None else part[:, 0] for part in x)
        assert q is not None
        assert k is not None
        assert v is not None
        o, state = recurrent_step(q, k, v, decay, cache.state, beta=beta, normalise=normalise, scale=scale)
        return o[:, None], state
    return ops.gated_linear(
        x.q,
        x.k,
        x.v,
        x.log_decay,
        beta=x.beta,
        initial_state=None if cache is None else cache.state,
        segment_ids=context.segment_ids,
        normalise=normalise,
        scale=scale,
    )


def masked(x: Float[Array, "B T *D"], keep: Bool[Array, "B T"]) -> Float[Array, "B T *D"]:
    """x with zeros where `keep` is false."""
    return jnp.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), x, 0)


def log_uniform_rates(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log of U(1, 16): initial decay rates of state-space layers (Mamba-2)."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))


def step_biases(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverse softplus of log-uniform [1e-3, 0.1]: initial time steps of state-space layers (Mamba-2)."""
    low, high = jnp.log(1e-3), jnp.log(0.1)
    step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high)), 1e-4)
    return step + jnp.log(-jnp.expm1(-step))
