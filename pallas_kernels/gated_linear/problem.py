"""What every backend of gated linear attention is given: checked arrays and the folded form of packed rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear.segments import Segments

NORMALISER_FLOOR = 1e-10  # added to the denominator of a normalised output


class LinearState(NamedTuple):
    """What the recurrence carries: `s` sums keys times values, `z` sums keys (None without the normaliser)."""

    s: Float[Array, "B H Dk Dv"]
    z: Float[Array, "B H Dk"] | None


class Problem(NamedTuple):
    """One checked call. `log_decay` has 3 axes (one per head), 4 (one per key channel) or is None.

    k, v and log_decay may have fewer heads than q, each one for a group.
    """

    q: Float[Array, "B T H Dk"]
    k: Float[Array, "B T Hk Dk"]
    v: Float[Array, "B T Hv Dv"]
    log_decay: Float[Array, "B T Hg *Dk"] | None
    beta: Float[Array, "B T H"] | None
    state: LinearState
    segments: Segments | None
    scale: float


def repeat_heads(p: Problem) -> Problem:
    """The same problem with H heads of everything."""

    def repeat(x):
        return None if x is None else jnp.repeat(x, p.q.shape[2] // x.shape[2], axis=2)

    return p._replace(k=repeat(p.k), v=repeat(p.v), log_decay=repeat(p.log_decay))


def varying_like(x: Array, like: Array) -> Array:
    """x, marked as differing between the shards between which `like` differs (a scan inside `shard_map` insists)."""
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def fold_segments(p: Problem) -> Problem:
    """The same problem without segments: padding becomes tokens that do nothing, a start becomes a decay factor of 0.

    Backends multiply decay factors and never subtract their logarithms, so a log-decay of -inf is an exact mask there.
    Outputs at padding have to be masked by the caller.
    """
    if p.segments is None:
        return p
    valid, reset, _ = p.segments

    def keep(x):
        return jnp.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0)

    g = jnp.zeros(p.q.shape[:3], p.state.s.dtype) if p.log_decay is None else keep(p.log_decay)
    g = jnp.where(reset.reshape(*reset.shape, *[1] * (g.ndim - 2)), -jnp.inf, g)
    beta = None if p.beta is None else keep(p.beta)
    return p._replace(q=keep(p.q), k=keep(p.k), v=keep(p.v), log_decay=g, beta=beta, segments=None)


def widen(p: Problem) -> tuple[Float[Array, "B T H Dv1"], Float[Array, "B H Dk Dv1"]]:
    """Values and initial state with the normaliser as one more value column (of ones), where there is one."""
    if p.state.z is None:
        return p.v, p.state.s
    v = jnp.concatenate([p.v, jnp.ones_like(p.v[..., :1])], axis=-1)
    return v, jnp.concatenate([p.state.s, p.state.z[..., None]], axis=-1)


def widened_results(p: Problem, o: Array, last: Array) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """Undoes `widen` on the outputs and the last state, dividing by the sum of weights; further columns are dropped."""
    dv = p.v.shape[-1]
    if p.state.z is None:
        return o[..., :dv].astype(p.v.dtype), LinearState(last[..., :dv], None)
    weights = o[..., dv : dv + 1].astype(p.state.s.dtype) + NORMALISER_FLOOR
    return (o[..., :dv] / weights).astype(p.v.dtype), LinearState(last[..., :dv], last[..., dv])
