"""Full causal attention over a sequence that is split between shards: three exchanges of the same result.

Everything here runs inside `shard_map`: arrays are one shard's, `[B,C,...]` with C = T / shards, shard r holding
positions [r C, (r+1) C). Causality makes late shards work more than early ones, so 'ring' and 'gather' first deal the
sequence out again in the balanced order of `zigzag` (Brandon et al., arXiv 2311.09431, with Llama 3's halves) and put
the result back after; the layout outside never changes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import block_sparse_attention, merge_attention
from pallas_kernels.attention.call import KEPT
from pallas_kernels.masks import Causal, Full, Mask

type Result = tuple[Float[Array, "B C H Dv"], Float[Array, "B H C"]]


class Shard(NamedTuple):
    """One shard's queries, keys, values and document ids."""

    q: Float[Array, "B C H D"]
    k: Float[Array, "B C K D"]
    v: Float[Array, "B C K Dv"]
    ids: Int[Array, "B C"] | None


class Keys(NamedTuple):
    """One shard's keys, values and document ids."""

    k: Float[Array, "B C K D"]
    v: Float[Array, "B C K Dv"]
    ids: Int[Array, "B C"] | None


class Split(NamedTuple):
    """What a shard knows of the whole: hashable, so that it may be static."""

    axis: str
    shards: int
    scale: float | None
    soft_cap: float | None


def attend(split: Split, q: Array, k: Array, v: Array, mask: Mask, **options: Any) -> Result:
    """The op on what a shard holds, with lse."""
    options |= {"scale": split.scale, "soft_cap": split.soft_cap, "return_lse": True}
    return cast(Result, block_sparse_attention(q, k, v, mask, **options))


def by_heads(x: Shard, mask: Mask, split: Split) -> Result:
    """All-to-all: each shard gets whole sequences of some heads (DeepSpeed-Ulysses, arXiv 2309.14509)."""
    kv_heads = x.k.shape[2]
    copies = max(1, split.shards // kv_heads)  # fewer KV heads than shards: neighbours share one
    out = functools.partial(lax.all_to_all, axis_name=split.axis, split_axis=2, concat_axis=1, tiled=True)
    back = functools.partial(lax.all_to_all, axis_name=split.axis, split_axis=1, concat_axis=2, tiled=True)
    k, v = (jnp.repeat(a, copies, axis=2) if copies > 1 else a for a in (x.k, x.v))
    ids = None if x.ids is None else lax.all_gather(x.ids, split.axis, axis=1, tiled=True)
    o, lse = attend(split, out(x.q), out(k), out(v), mask, segment_ids=ids)
    return back(o), jnp.swapaxes(back(jnp.swapaxes(lse, 1, 2)), 1, 2)


def gathered(
    queries: tuple[Float[Array, "B C H D"], ...], keys: Keys, call: Callable[..., Result], split: Split
) -> Result:
    """All keys and values on every shard; queries in balanced order. Takes any mask over absolute positions.

    `call(queries, k, v, segment_ids=, q_offset=)` attends from half a shard's queries, in all their rotations.
    """
    k, v, ids = jax.tree.map(lambda a: lax.all_gather(a, split.axis, axis=1, tiled=True), keys)
    dealt, half = tuple(zigzag(q, split) for q in queries), queries[0].shape[1] // 2
    own = None if keys.ids is None else zigzag(keys.ids, split)
    place = lax.axis_index(split.axis)
    parts = []
    for rows, chunk in ((slice(0, half), place), (slice(half, None), 2 * split.shards - 1 - place)):
        pair = None if own is None else (own[:, rows], ids)
        some = tuple(q[:, rows] for q in dealt)
        parts.append(call(some, k, v, segment_ids=pair, q_offset=jnp.int32(chunk * half)))
    o, lse = (jnp.concatenate([p[n] for p in parts], axis=1 + n) for n in (0, 1))
    return unzigzag(o, split), jnp.swapaxes(unzigzag(jnp.swapaxes(lse, 1, 2), split), 1, 2)


def ring(x: Shard, split: Split, *, dealt: bool = False) -> Result:
    """Keys and values travel around the shards while each attends to those it holds (Liu et al., arXiv 2310.01889).

    A shard keeps one shard of keys beside its own, forward and backward. dealt: the arrays lie in balanced order.
    """
    if dealt:
        return _ring(split, x)
    o, lse = _ring(split, jax.tree.map(lambda a: zigzag(a, split), x))
    return unzigzag(o, split), jnp.swapaxes(unzigzag(jnp.swapaxes(lse, 1, 2), split), 1, 2)


def zigzag(x: Shaped[Array, "B C *rest"], split: Split) -> Shaped[Array, "B C *rest"]:
    """From halves (2r, 2r+1) of the sequence's 2 n halves on shard r to halves (r, 2n-1-r): equal causal work."""
    first, second = jnp.split(_even(x), 2, axis=1)
    evens = lax.ppermute(first, split.axis, _to_zigzag(split.shards, 0))
    odds = lax.ppermute(second, split.axis, _to_zigzag(split.shards, 1))
    ordered = lax.axis_index(split.axis) % 2 == 0  # an even shard's early half came as an even half
    return jnp.concatenate([jnp.where(ordered, evens, odds), jnp.where(ordered, odds, evens)], axis=1)


def unzigzag(x: Shaped[Array, "B C *rest"], split: Split) -> Shaped[Array, "B C *rest"]:
    """The inverse of `zigzag`."""
    early, late = jnp.split(x, 2, axis=1)
    ordered = lax.axis_index(split.axis) % 2 == 0
    home = lambda parity: [(there, here) for here, there in _to_zigzag(split.shards, parity)]
    first = lax.ppermute(jnp.where(ordered, early, late), split.axis, home(0))
    second = lax.ppermute(jnp.where(ordered, late, early), split.axis, home(1))
    return jnp.concatenate([first, second], axis=1)


def _to_zigzag(shards: int, parity: int) -> list[tuple[int, int]]:
    """(from, to) for the first (0) or second (1) halves of all shards."""
    halves = [(r, 2 * r + parity) for r in range(shards)]
    return [(r, half if half < shards else 2 * shards - 1 - half) for r, half in halves]


def _even(x: Array) -> Array:
    if x.shape[1] % 2:
        raise ValueError(
            f"full attention over a split sequence deals out half shards, and a shard of {x.shape[1]} tokens has no "
            "half: make the length a multiple of twice the mesh axis context"
        )
    return x


def _next(tree: Any, split: Split) -> Any:
    around = [(i, (i + 1) % split.shards) for i in range(split.shards)]
    return jax.tree.map(lambda a: lax.ppermute(a, split.axis, around), tree)


class _Pieces(NamedTuple):
    """Two half-by-half blocks of full attention, stacked along the batch: the work of every step but the first.

    The late half of the queries reads the early half of the visiting keys; and the early queries read them too when
    they come from an earlier shard (`before`), else the late queries read the late keys as well.
    """

    before: Array
    half: int

    def queries(self, x: Array) -> Array:
        """Rows [2B,c,...] of x [B,C,...]."""
        early, late = x[:, : self.half], x[:, self.half :]
        return jnp.concatenate([late, jnp.where(self.before, early, late)])

    def keys(self, x: Array) -> Array:
        """Keys [2B,c,...] of x [B,C,...]."""
        early, late = x[:, : self.half], x[:, self.half :]
        return jnp.concatenate([early, jnp.where(self.before, early, late)])

    def add_queries(self, total: Array, pieces: Array) -> Array:
        """Add the pieces' rows [2B,c,...] where they belong in [B,C,...]."""
        first, second = jnp.split(pieces.astype(total.dtype), 2)
        zero = jnp.zeros_like(second)
        late = first + jnp.where(self.before, zero, second)
        return total + jnp.concatenate([jnp.where(self.before, second, zero), late], axis=1)

    def add_keys(self, total: Array, pieces: Array) -> Array:
        """As `add_queries`, for keys."""
        first, second = jnp.split(pieces.astype(total.dtype), 2)
        zero = jnp.zeros_like(second)
        early = first + jnp.where(self.before, second, zero)
        return total + jnp.concatenate([early, jnp.where(self.before, zero, second)], axis=1)

    def merge(self, total: Result, pieces: tuple[Array, Array]) -> Result:
        """Merge the pieces (o [2B,c,H,Dv], lse [2B,H,c]) into (o, lse) of all rows."""
        (o, lse), (o2, lse2) = total, pieces
        (late, other), (late_lse, other_lse) = jnp.split(o2, 2), jnp.split(lse2, 2)
        nothing = jnp.full_like(other_lse, -jnp.inf)
        o_early, o_late = jnp.split(o, 2, axis=1)
        lse_early, lse_late = jnp.split(lse, 2, axis=2)
        early = merge_attention((o_early, lse_early), (other, jnp.where(self.before, other_lse, nothing)))
        late = merge_attention(
            (o_late, lse_late), (late, late_lse), (other, jnp.where(self.before, nothing, other_lse))
        )
        return jnp.concatenate([early[0], late[0]], axis=1), jnp.concatenate([early[1], late[1]], axis=2)


def _pieces(split: Split, step: Any, length: int) -> _Pieces:
    place = lax.axis_index(split.axis)
    return _Pieces(step <= place, length // 2)  # the keys are those of shard place - step, if there is one


def _around(split: Split, body: Any, carry: Any) -> Any:
    """body(step, carry, last) for steps 1 .. shards-1, as a loop but for the last."""
    if split.shards > 2:
        carry = lax.fori_loop(1, split.shards - 1, lambda step, c: body(step, c, last=False), carry)
    return body(split.shards - 1, carry, last=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(split: Split, x: Shard) -> Result:
    return _ring_forward(split, x)[0]


def _ring_forward(split: Split, x: Shard):
    pair = None if x.ids is None else (x.ids, x.ids)
    visiting = _next(Keys(x.k, x.v, x.ids), split)
    o, lse = attend(split, x.q, x.k, x.v, Causal(), segment_ids=pair)

    def body(step: Any, carry: Any, *, last: bool) -> Any:
        keys, result = carry
        following = None if last else _next(keys, split)
        p = _pieces(split, step, x.q.shape[1])
        pair = None if x.ids is None else (p.queries(x.ids), p.keys(keys.ids))
        part = attend(split, p.queries(x.q), p.keys(keys.k), p.keys(keys.v), Full(), segment_ids=pair)
        return following, p.merge(result, part)

    _, (o, lse) = _around(split, body, (visiting, (o.astype(jnp.float32), lse)))
    o, lse = checkpoint_name((o.astype(x.q.dtype), lse), KEPT)
    return (o, lse), (x, o, lse)


def _ring_backward(split: Split, residuals: Any, cotangents: Any):
    """Each shard's part of the gradient needs only the final (o, lse); dk and dv travel with their keys."""
    (x, o, lse), (do, dlse) = residuals, cotangents
    zeros = lambda a: jnp.zeros(a.shape, jnp.float32)

    def part(q: Array, k: Array, v: Array, mask: Mask, ids: Any, whole: Any, cotangent: Any):
        call = lambda q, k, v: attend(split, q, k, v, mask, segment_ids=ids, whole=whole)
        return jax.vjp(call, q, k, v)[1](cotangent)

    def body(step: Any, carry: Any, *, last: bool) -> Any:
        keys, sums, dq = carry
        following = None if last else _next(keys, split)
        p = _pieces(split, step, x.q.shape[1])
        rows = lambda a: jnp.swapaxes(p.queries(jnp.swapaxes(a, 1, 2)), 1, 2)  # of lse [B,H,C]
        ids = None if x.ids is None else (p.queries(x.ids), p.keys(keys.ids))
        whole, cotangent = (p.queries(o), rows(lse)), (p.queries(do), rows(dlse))
        queries = (p.queries(x.q), p.keys(keys.k), p.keys(keys.v))
        dq2, dk2, dv2 = part(*queries, Full(), ids, whole, cotangent)
        sums = _next((p.add_keys(sums[0], dk2), p.add_keys(sums[1], dv2)), split)
        return following, sums, p.add_queries(dq, dq2)

    visiting = _next(Keys(x.k, x.v, x.ids), split)
    ids = None if x.ids is None else (x.ids, x.ids)
    dq, dk, dv = part(x.q, x.k, x.v, Causal(), ids, (o, lse), (do, dlse))
    # Sums start with the key's first visit, one step on; after the last step they have come home.
    carry = (visiting, (zeros(x.k), zeros(x.v)), dq.astype(jnp.float32))
    _, (dk_far, dv_far), dq = _around(split, body, carry)
    dk, dv = dk.astype(jnp.float32) + dk_far, dv.astype(jnp.float32) + dv_far
    return (Shard(dq.astype(x.q.dtype), dk.astype(x.k.dtype), dv.astype(x.v.dtype), None),)


_ring.defvjp(_ring_forward, _ring_backward)
