"""Gated linear attention whose gradient looks back a bounded number of tokens (truncated adjoint sharding).

The outputs are exact. The sequence is cut in blocks; for its gradient, the state that enters a block depends on the
tokens of the block before it alone, and what entered that one is a constant. So no gradient is carried from block to
block: the backward of all blocks runs at once, and a shard of the sequence needs one state cotangent from its right.

After adjoint sharding (arXiv 2501.00692), where the window slides token by token; here it moves by whole blocks, a
gradient reaching back between one and two windows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_linear.api import make_problem, solver
from pallas_kernels.gated_linear.problem import (
    LinearState,
    fold_segments,
    repeat_heads,
    varying_like,
    widen,
    widened_results,
)
from pallas_kernels.gated_linear.segments import blank_padding, read_segments
from pallas_kernels.gated_linear.sharded import (
    add_read,
    carry,
    exchange,
    of_last_shard,
    own_segments,
    states_along,
    transfer,
)


def gated_linear_attention_truncated(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hk Dk"],
    v: Float[Array, "B T Hv Dv"],
    log_decay: Float[Array, "B T Hg"] | Float[Array, "B T Hg Dk"] | None = None,
    *,
    window: int,
    axis_name: str | None = None,
    beta: Float[Array, "B T H"] | None = None,
    initial_state: LinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalise: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """`gated_linear_attention` with **a gradient that is not the true one**: it looks back `window` tokens at least and
    less than twice as many. What earlier tokens wrote counts as a constant. The gradient of q is exact.

    The bias is about `exp(window * mean log-decay)`: it is small where states fade within a window, and large for gates
    near 1. Outputs and states are exact, and so is everything when `window` is the whole length.

    Args:
      window: tokens of a block, a divisor of T.
      axis_name: as `gated_linear_attention_sharded`, or None where the sequence is whole.

    Raises:
      ValueError: a window that does not divide T; otherwise as `gated_linear_attention`.
    """
    b, t, *_ = q.shape
    if window < 1 or t % window:
        raise ValueError(f"window is {window}: it must be a divisor of the {t} tokens{' of a shard' * bool(axis_name)}")
    segments = None
    if segment_ids is not None:
        segments = read_segments(segment_ids) if axis_name is None else own_segments(segment_ids, axis_name)
    problem = make_problem(
        q, k, v, log_decay, beta=beta, state=initial_state, segments=segments, normalise=normalise, scale=scale
    )
    folded = fold_segments(repeat_heads(problem))
    v, start = widen(folded)

    def split(x):
        return None if x is None else x.reshape(b * (t // window), window, *x.shape[2:])

    zeros = jnp.zeros((b * (t // window), *start.shape[1:]), start.dtype)
    inputs = {name: split(getattr(folded, name)) for name in ("q", "k", "log_decay", "beta")}
    alone = folded._replace(**inputs, v=split(v), state=LinearState(varying_like(zeros, q), None))
    run = solver(implementation)
    o, added = run(alone)
    reader, transition = transfer(alone, run)
    by_block = lambda x: jnp.moveaxis(x.reshape(b, t // window, *x.shape[1:]), 1, 0)
    entries, last = _entries(by_block(transition), by_block(added.s), start, axis_name)
    o = add_read(o, reader, jnp.moveaxis(entries, 0, 1).reshape(zeros.shape)).reshape(b, t, *o.shape[2:])
    o, last = widened_results(folded, o, last)
    return blank_padding(o, segments), last


def _entries(transition, added, start, axis_name: str | None) -> tuple[Array, Array]:
    """States that enter the blocks, which lie along the first axis, and the last one. Gradients go one block back."""
    constants = jax.lax.stop_gradient((transition, added))
    entry = jax.lax.stop_gradient(start)
    if axis_name is not None:
        identity = jnp.ones_like(transition[0]) if transition.shape[-1] == 1 else _eye_like(transition[0])
        whole, _ = jax.lax.scan(lambda product, step: (carry(step, product), None), identity, constants[0])
        _, own = states_along(*constants, jnp.zeros_like(entry))
        entry, _ = exchange(whole, own, entry, axis_name)
    leaving = carry(transition, states_along(*constants, entry)[0]) + added
    if axis_name is None:
        return jnp.concatenate([start[None], leaving[:-1]]), leaving[-1]
    pairs = [(i, i + 1) for i in range(jax.lax.axis_size(axis_name) - 1)]
    first = jnp.where(jax.lax.axis_index(axis_name) == 0, start, jax.lax.ppermute(leaving[-1], axis_name, pairs))
    return jnp.concatenate([first[None], leaving[:-1]]), of_last_shard(leaving[-1], axis_name)


def _eye_like(x: Array) -> Array:
    return jnp.zeros_like(x) + jnp.eye(x.shape[-1], dtype=x.dtype)
