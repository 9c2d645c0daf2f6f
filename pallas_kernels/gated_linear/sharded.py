"""Gated linear attention of a sequence that lies in shards along a mesh axis.

Every shard runs from an empty state and sums itself up as `(transition, state)`: what it does to a state that enters,
and what it adds. The summaries, whose size does not depend on the length, are gathered; each shard composes those on
its left into its true entry state `S`, and what its tokens read from it, `reader S`, is added to its outputs. All of
it is linear in the states, so the backward is the transpose of the same program: one pass of the backend's own
backward over each shard, and one exchange of state cotangents.

With a decay alone the transition is diagonal, the shard's product of decays, and the reader is q times the decay since
the shard's start. Under the delta rule neither has a closed form; both come from one more run, on values of zero from
the identity.

After Yang et al., Gated Linear Attention (arXiv 2312.06635), and LASP-2 (arXiv 2502.07563).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_linear.api import make_problem, solver
from pallas_kernels.gated_linear.problem import (
    LinearState,
    Problem,
    fold_segments,
    repeat_heads,
    varying_like,
    widen,
    widened_results,
)
from pallas_kernels.gated_linear.segments import Segments, blank_padding, gather_segments


def gated_linear_attention_sharded(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hk Dk"],
    v: Float[Array, "B T Hv Dv"],
    log_decay: Float[Array, "B T Hg"] | Float[Array, "B T Hg Dk"] | None = None,
    *,
    axis_name: str,
    beta: Float[Array, "B T H"] | None = None,
    initial_state: LinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalise: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """`gated_linear_attention` inside `jax.shard_map`, every array being this shard's T tokens of a longer sequence.

    Exact, forward and backward, at the cost of one exchange of states each way. Arguments and results are those of
    `gated_linear_attention`, and only these differ:

    Args:
      axis_name: mesh axis along which the sequence lies in order; every shard holds the same number of tokens.
      initial_state: what the whole sequence continues from, the same on every shard.
      segment_ids: this shard's part of ids that never decrease along the whole row.

    Returns:
      This shard's outputs, and the state after the whole sequence, the same on every shard.

    Raises:
      ValueError, Unsupported: as `gated_linear_attention`.
    """
    segments = None if segment_ids is None else own_segments(segment_ids, axis_name)
    problem = make_problem(
        q, k, v, log_decay, beta=beta, state=initial_state, segments=segments, normalise=normalise, scale=scale
    )
    folded = fold_segments(repeat_heads(problem))
    v, start = widen(folded)
    run = solver(implementation)
    alone = folded._replace(v=v, state=LinearState(jnp.zeros_like(start), None))
    o, added = run(alone)
    reader, transition = transfer(alone, run)
    entry, last = exchange(transition, added.s, start, axis_name)
    o = add_read(o, reader, entry)
    o, last = widened_results(folded, o, last)
    return blank_padding(o, segments), last


def own_segments(segment_ids: Int[Array, "B T"], axis_name: str) -> Segments:
    """This shard's part of the segments of the whole row."""
    length = segment_ids.shape[1]
    start = jax.lax.axis_index(axis_name) * length
    whole = gather_segments(segment_ids, axis_name)
    return Segments(*(jax.lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in whole))


def transfer(p: Problem, run) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B H Dk #Dk"]]:
    """`(reader, transition)`: a state S that enters adds `reader S` to the outputs and `transition S` to the last one.

    A diagonal transition is `[B, H, Dk, 1]`, to be multiplied in place of the matrix product.
    """
    acc = p.state.s.dtype
    if p.beta is not None:
        b, _, h, dk = p.q.shape
        identity = varying_like(jnp.broadcast_to(jnp.eye(dk, dtype=acc), (b, h, dk, dk)), p.q)
        reader, last = run(p._replace(v=jnp.zeros_like(p.q), state=LinearState(identity, None)))
        return reader, last.s
    g = jnp.zeros(p.q.shape[:3], acc) if p.log_decay is None else p.log_decay.astype(acc)
    decay = jnp.exp(jnp.cumsum(g if g.ndim == 4 else g[..., None], axis=1))
    transition = jnp.broadcast_to(decay[:, -1, :, :, None], (*p.state.s.shape[:3], 1))
    return p.q.astype(acc) * decay * p.scale, transition


def carry(transition: Float[Array, "*N Dk #Dk"], state: Float[Array, "*N Dk M"]) -> Float[Array, "*N Dk M"]:
    """What a transition makes of a state."""
    diagonal = transition.shape[-1] == 1
    return transition * state if diagonal else jnp.matmul(transition, state, precision="highest")


def states_along(transition, added, start) -> tuple[Array, Array]:
    """The states that enter the parts of a sequence, whose summaries lie along the first axis, and the one after."""
    last, entries = jax.lax.scan(
        lambda state, part: (carry(part[0], state) + part[1], state), start, (transition, added)
    )
    return entries, last


def exchange(transition, added, start, axis_name: str) -> tuple[Array, Array]:
    """The state that enters this shard `[B, H, Dk, Dv]`, and the one after the last shard."""
    # As one array: alone, libtpu scatters no cotangent of a diagonal, whose last axis is 1.
    columns = transition.shape[-1]
    summaries = jax.lax.all_gather(jnp.concatenate([transition, added], axis=-1), axis_name)
    entries, last = states_along(summaries[..., :columns], summaries[..., columns:], start)
    return entries[jax.lax.axis_index(axis_name)], of_last_shard(last, axis_name)


def of_last_shard(x: Array, axis_name: str) -> Array:
    """The last shard's x on every shard, and known to be the same there."""
    final = jax.lax.axis_size(axis_name) - 1
    return jax.lax.psum(jnp.where(jax.lax.axis_index(axis_name) == final, x, 0), axis_name)


def add_read(o, reader, entry) -> Array:
    """Outputs with what is read from the entry state."""
    precision = None if o.dtype == jnp.bfloat16 else "highest"
    return (o + jnp.einsum("bthk,bhkv->bthv", reader, entry, precision=precision)).astype(o.dtype)
