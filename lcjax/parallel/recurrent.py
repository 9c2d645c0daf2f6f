"""Recurrences over a sequence that is split between shards: a state or a few tokens are handed over.

Runs inside `shard_map`, shard r holding positions [r C, (r+1) C).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lcjax.parallel.dense import Split
from lcjax.parallel.sparse import halo_before
from pallas_kernels import LinearState, causal_conv1d, gated_linear_attention


class Documents(NamedTuple):
    """One shard's view of packed rows."""

    ids: Int[Array, "B C"]  # of documents; -1 marks padding, also where a shard begins with it
    continues: Bool[Array, "B"]  # its first document began on an earlier shard
    unbroken: Bool[Array, "B"]  # what entered the shard is still alive at its end


def read_documents(ids: Int[Array, "B C"], split: Split) -> Documents:
    """Ids as `gated_linear_attention` reads them, with what the earlier shards say about this one."""
    place = lax.axis_index(split.axis)
    largest = lax.all_gather(jnp.max(ids, axis=1), split.axis)  # [n,B]
    earlier = jnp.arange(split.shards)[:, None] < place
    before = jnp.max(jnp.where(earlier, largest, -1), axis=0)  # [B] highest id so far; ids never decrease
    started = jnp.maximum(lax.cummax(ids, axis=1), before[:, None]) > 0
    ids = jnp.where((ids > 0) | ((ids == 0) & ~started), ids, -1)
    real = ids >= 0
    first = jnp.min(jnp.where(real, ids, jnp.iinfo(jnp.int32).max), axis=1)
    some = real.any(axis=1)
    continues = (place > 0) & some & (first == before)
    last = jnp.max(ids, axis=1)
    return Documents(ids, continues, ~some | (continues & (first == last)))


def linear(
    q: Float[Array, "B C H Dk"],
    k: Float[Array, "B C H Dk"],
    v: Float[Array, "B C H Dv"],
    log_decay: Float[Array, "B C H *Dk"] | None,
    ids: Int[Array, "B C"] | None,
    split: Split,
    normalise: bool,
) -> tuple[Float[Array, "B C H Dv"], LinearState]:
    """Gated linear attention and the state after the whole sequence.

    A shard's effect on a state S is S -> decay S + own, and these maps compose: every shard first finds its own, all
    gather them, and each starts again from the state that enters it.
    """
    documents = None if ids is None else read_documents(ids, split)
    local = None if documents is None else documents.ids
    scale = split.scale
    _, own = gated_linear_attention(q, k, v, log_decay, segment_ids=local, normalise=normalise, scale=scale)
    decay = _total_decay(q, log_decay, documents)  # [B,H,Dk]
    owns, decays = lax.all_gather((own, decay), split.axis)
    entering, leaving = _compose(owns, decays, lax.axis_index(split.axis), split.shards)
    if documents is not None:
        entering = jax.tree.map(lambda s: jnp.where(_wide(documents.continues, s), s, 0), entering)
    o, _ = gated_linear_attention(
        q, k, v, log_decay, initial_state=entering, segment_ids=local, normalise=normalise, scale=scale
    )
    return o, leaving


def _total_decay(q: Array, log_decay: Array | None, documents: Documents | None) -> Float[Array, "B H Dk"]:
    """How much of a state that enters the shard is left at its end, per key feature."""
    batch, _, heads, dim = q.shape
    if log_decay is None:
        total = jnp.ones((batch, heads, dim), jnp.float32)
    else:
        g = log_decay.astype(jnp.float32)
        if documents is not None:
            g = jnp.where((documents.ids >= 0).reshape(*documents.ids.shape, *(1,) * (g.ndim - 2)), g, 0)
        total = jnp.exp(jnp.sum(g, axis=1))
        total = jnp.broadcast_to(total if g.ndim == 4 else total[..., None], (batch, heads, dim))
    return total if documents is None else jnp.where(_wide(documents.unbroken, total), total, 0)


def _compose(owns: LinearState, decays: Array, place: Array, shards: int) -> tuple[LinearState, LinearState]:
    """(state entering shard `place`, state after the last shard) from all shards' own states and decays `[n,...]`."""
    state = jax.tree.map(lambda s: jnp.zeros_like(s[0]), owns)
    entering = state
    for r in range(shards):
        entering = jax.tree.map(lambda now, kept, here=(place == r): jnp.where(here, now, kept), state, entering)
        faded = lambda s, own, r=r: decays[r].reshape(decays[r].shape + (1,) * (s.ndim - 3)) * s + own[r]
        state = jax.tree.map(faded, state, owns)
    return entering, state


def _wide(flag: Bool[Array, "B"], like: Array) -> Array:
    return flag.reshape(-1, *(1,) * (like.ndim - 1))


def conv(
    x: Float[Array, "B C channels"], w: Float[Array, "W channels"], ids: Int[Array, "B C"] | None, split: Split
) -> Float[Array, "B C channels"]:
    """A causal convolution whose first taps are the last inputs of the shard before."""
    taps = w.shape[0] - 1
    tail = halo_before(x, taps, split)
    place = lax.axis_index(split.axis)
    if ids is None:
        return causal_conv1d(x, w, tail=jnp.where(place > 0, tail, 0))[0]
    documents = read_documents(ids, split)
    first = jnp.min(jnp.where(documents.ids >= 0, documents.ids, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    near = halo_before(documents.ids, taps, split) == first  # padding is in no document
    tail = jnp.where((near & documents.continues[:, None])[..., None], tail, 0)
    return causal_conv1d(x, w, tail=tail, segment_ids=documents.ids)[0]
