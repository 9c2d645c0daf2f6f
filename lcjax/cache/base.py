"""What every cache of attention keys and values can do, and the pieces that the layouts share.

A cache is a frozen pytree of fixed shape: `append` and `attend` return new values, and under `jax.jit` with donated
arguments XLA writes them in place. Keep caches as a tuple over layers (or carry them through a loop): as scanned
outputs a second copy of everything would appear.
"""

from typing import Any, Protocol, TypedDict, Unpack, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from lcjax.parallel import ops
from pallas_kernels.checks import check_values
from pallas_kernels.masks import Mask

type Counts = Int[Array | np.ndarray, "B"]
"""Tokens of each request. Zeros in NumPy are known while tracing: the first chunk then needs no look at the cache."""


class Options(TypedDict, total=False):
    """How to attend, as in `pallas_kernels.block_sparse_attention`. Without `return_lse` (default True) lse is None."""

    scale: float | None
    soft_cap: float | None
    sink_logits: Array | None
    return_lse: bool


@runtime_checkable
class AttentionCache(Protocol):
    """Keys and values of the tokens seen so far by one attention layer.

    `length[B]` counts the tokens of each request, on the device. `start[B]` is the length before the last `append`:
    the query at row t of `attend` sits at position start + t.
    """

    @property
    def length(self) -> Array: ...

    @property
    def start(self) -> Array: ...

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach; the caller checks this on the host before a launch."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and states held for the whole batch."""
        ...

    def append(self, k: Array, v: Array, valid: Array | None = None) -> "AttentionCache":
        """k, v `[B,T,K,D]` follow the tokens held. `valid[B,T]` marks real tokens; padding is on the right.

        The queries of these tokens attend next: what they need and the cache forgets is kept until it is `settled`.
        """
        ...

    def prepare(self, q: Array) -> "AttentionCache":
        """What the queries of the last append change before they attend: a choice of pages, or nothing."""
        ...

    def attend(self, q: Array, mask: Any, **options: Unpack[Options]) -> tuple[Array, Array | None]:
        """q `[B,T,H,D]` of the last T appended tokens -> (o `[B,T,H,Dv]` in q's dtype, lse `[B,H,T]` float32).

        Rows of padding hold finite values without meaning.
        """
        ...

    def settled(self) -> "AttentionCache":
        """Without what only the queries of the last append needed: what is carried from pass to pass."""
        ...

    def fork(self, rows: Counts) -> "AttentionCache":
        """A cache whose request i continues request `rows[i]` of this one; several may continue the same."""
        ...

    def evict(self, drop: Bool[Array, "B"]) -> "AttentionCache":
        """Forget the requests marked in `drop`: their rows are empty again."""
        ...


@runtime_checkable
class SlotCache(AttentionCache, Protocol):
    """A cache with a slot a token and keys as floats: what layers need that rotate keys as they read them."""

    @property
    def k(self) -> Array:
        """The keys `[B,S,K,D]` in their slots."""
        ...

    def positions(self) -> Array:
        """The absolute position `[B,S]` of the token in each slot; -1 where a slot is known to be empty."""
        ...

    def with_keys(self, k: Array) -> "SlotCache":
        """The same tokens with other keys in the slots, to attend with once."""
        ...


def through_op(
    q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K Dv"], mask: Mask, **options: Any
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
    """`block_sparse_attention` in the cache's dtype, with a pair as result whether or not lse was asked for."""
    if options.pop("return_lse", True):
        return with_lse(q, k, v, mask, **options)
    o = ops.attention(q.astype(k.dtype), k, v, mask, **options)
    assert not isinstance(o, tuple)
    return o.astype(q.dtype), None


def with_lse(
    q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K Dv"], mask: Mask, **options: Any
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """As `through_op`, and always with lse."""
    out = ops.attention(q.astype(k.dtype), k, v, mask, return_lse=True, **options)
    assert isinstance(out, tuple)
    return out[0].astype(q.dtype), out[1]


def appended(tokens: int, valid: Bool[Array, "B T"] | None, batch: int) -> Counts:
    """How many of the `tokens` new tokens of each request are real."""
    if valid is None:
        return np.full((batch,), tokens, np.int32)
    return jnp.sum(valid, axis=1, dtype=jnp.int32)


def no_tokens(batch: int) -> np.ndarray:
    """The counts of an empty cache."""
    return np.zeros((batch,), np.int32)


def known_empty(length: Counts) -> bool:
    """Whether the cache was certainly empty, by what is known while tracing."""
    return isinstance(length, np.ndarray) and not length.any()


def write_first(buffer: Array, new: Array, axis: int = 1) -> Array:
    """Put the first chunk into an empty buffer. Padding goes along: later tokens replace it before it is seen."""
    fits = jax.lax.slice_in_dim(new, 0, min(new.shape[axis], buffer.shape[axis]), axis=axis)
    return jax.lax.dynamic_update_slice(buffer, fits, (0,) * buffer.ndim)


def write_slots(
    buffer: Shaped[Array, "B S K D"],
    new: Shaped[Array, "B T K D"],
    slot: Int[Array, "B T"],
    keep: Bool[Array, "B T"] | None,
) -> Shaped[Array, "B S K D"]:
    """Put each new row into its slot; rows with `keep` false are dropped. In place when `buffer` is donated."""
    if slot.size == 1:
        return _write_one(buffer, new, slot[0, 0], True if keep is None else keep[0, 0])
    slot = dropped(slot, keep, buffer.shape[1])
    return written(buffer.at[jnp.arange(slot.shape[0])[:, None], slot], new)


def _write_one(
    buffer: Shaped[Array, "1 S K D"], new: Shaped[Array, "1 1 K D"], slot: Int[Array, ""], keep: Bool[Array, ""] | bool
) -> Shaped[Array, "1 S K D"]:
    """One token of one request: a slice put in place is one kernel on a GPU, where a scatter is three."""
    place = (0, slot, 0, 0)
    new = jnp.where(keep & (slot < buffer.shape[1]), new, jax.lax.dynamic_slice(buffer, place, new.shape))
    return jax.lax.optimization_barrier(jax.lax.dynamic_update_slice(buffer, new, place))


def dropped(slot: Int[Array, "B T"], keep: Bool[Array, "B T"] | None, end: int) -> Int[Array, "B T"]:
    """The slots, those with `keep` false moved past `end`: a scatter drops them, and stays free of duplicates."""
    if keep is None:
        return slot
    return jnp.where(keep, slot, end + jnp.arange(slot.size, dtype=slot.dtype).reshape(slot.shape))


def written(place: Any, new: Array) -> Array:
    """The buffer with `new` at `place` (`buffer.at[...]`), which names no slot twice."""
    buffer = place.set(new, mode="drop", unique_indices=True)
    # Fused into its reader, the write would be done twice, and the second time on a copy of the cache.
    return jax.lax.optimization_barrier(buffer)


def take_rows(rows: Counts, *arrays: Any) -> list[Any]:
    """Rows of arrays whose first axis is the batch; None stays None."""
    return [None if x is None else jnp.asarray(x)[jnp.asarray(rows)] for x in arrays]


def emptied(drop: Bool[Array, "B"], *counts: Counts) -> list[Array]:
    """The counts, zero where `drop`."""
    return [jnp.where(drop, 0, jnp.asarray(x)) for x in counts]


def traced(x: Any) -> bool:
    """Whether the value is not known yet."""
    return isinstance(x, Tracer)


def reached(length: Counts, tokens: Counts | int) -> Counts:
    """Tokens of each request after `tokens` more; known where both are."""
    if traced(length) or traced(tokens):
        return jnp.asarray(length) + jnp.asarray(tokens)
    return np.asarray(length) + np.asarray(tokens)


def check_room(length: Counts, tokens: Counts, capacity: int) -> None:
    """Raise when an append passes the end: at once where the numbers are known, under jit in the debug checks."""
    message = (
        f"cache: appending reaches {{found}} tokens, but the capacity is {capacity}; "
        "make the cache larger or the prompt shorter"
    )
    check_values(lambda held: held <= capacity, message, reached(length, tokens))
