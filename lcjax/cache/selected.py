"""Choosing which pages a decoding step reads: a dense or paged cache with bounds of the keys of each block.

Bounds and choice are those of Quest (arXiv 2406.10774) and LServe (arXiv 2502.14866), which also uses a choice for
several steps: neighbouring queries want much the same pages. Prefill reads everything.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcjax.cache.base import Counts, Options, dropped, known_empty, take_rows
from lcjax.cache.dense import DenseCache
from lcjax.cache.few import by_op, few
from lcjax.cache.paged import PagedCache
from pallas_kernels import BlockBounds, BlockList, block_scores, select_blocks
from pallas_kernels.masks import Causal, Mask, Sink, Window

NONE = 1e30  # bound of a block without keys: it scores below all others


@dataclass(frozen=True)
class Selection:
    """What a decoding step reads of a long context.

    tokens: of the context in all. sink, window: the first and the last tokens, always among them. block: tokens of a
    block. every: steps that use one choice.
    """

    tokens: int = 4096
    sink: int = 64
    window: int = 256
    block: int = 64
    every: int = 4

    def __post_init__(self):
        if min(self.tokens, self.block, self.every, self.window) < 1 or self.sink < 0:
            raise ValueError(f"{self}: tokens, block, every and window must be positive, sink not negative")
        if self.blocks < 1:
            raise ValueError(
                f"Selection.tokens={self.tokens} leaves no block of {self.block} beside sink={self.sink} and "
                f"window={self.window}; raise tokens"
            )

    @property
    def blocks(self) -> int:
        """Blocks to choose."""
        return (self.tokens - self.sink - self.window) // self.block

    @property
    def mask(self) -> Mask:
        """What is read without being chosen."""
        return Causal() & (Sink(self.sink) | Window(self.window))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelectedCache:
    """`inner`, and of every block of its tokens the channel-wise extremes of the keys."""

    inner: Any  # DenseCache or PagedCache
    low: Any  # [B,n,K,D]
    high: Any  # [B,n,K,D]
    chosen: Any  # int32 [B,K,W], -1 beyond count
    count: Any  # int32 [B,K]
    age: Any  # int32: decoding steps since the choice, modulo `every`
    selection: Selection = field(metadata={"static": True})

    @classmethod
    def around(cls, inner: DenseCache | PagedCache, selection: Selection, num_kv_heads: int) -> "SelectedCache":
        """Around an empty cache."""
        batch, blocks, dim = inner.length.shape[0], -(-inner.capacity // selection.block), inner.k.shape[-1]
        dtype = jnp.bfloat16 if inner.k.dtype == jnp.int8 else inner.k.dtype
        bounds = (batch, blocks, num_kv_heads, dim)
        width = min(selection.blocks, blocks)
        return cls(
            inner,
            jnp.full(bounds, NONE, dtype),
            jnp.full(bounds, -NONE, dtype),
            jnp.full((batch, num_kv_heads, width), -1, jnp.int32),
            jnp.zeros((batch, num_kv_heads), jnp.int32),
            jnp.zeros((), jnp.int32),
            selection,
        )

    @property
    def length(self) -> Any:
        """Tokens of each request."""
        return self.inner.length

    @property
    def start(self) -> Any:
        """Tokens of each request before the last append."""
        return self.inner.start

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach."""
        return self.inner.capacity

    @property
    def bytes(self) -> int:
        """Bytes of the inner cache, and 2 B n K D of bounds times the width of their dtype."""
        return self.inner.bytes + self.low.nbytes + self.high.nbytes

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> "SelectedCache":
        """Write the new tokens, and widen the bounds of their blocks."""
        inner = self.inner.append(k, v, valid)
        slot = jnp.asarray(self.inner.length)[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)
        block = dropped(slot // self.selection.block, valid, self.low.shape[1])
        at = jnp.arange(k.shape[0])[:, None], block
        low = self.low.at[at].min(k.astype(self.low.dtype), mode="drop")
        high = self.high.at[at].max(k.astype(self.high.dtype), mode="drop")
        return replace(self, inner=inner, low=low, high=high)

    def prepare(self, q: Float[Array, "B T H D"]) -> "SelectedCache":
        """Choose blocks for the queries, at every `every`-th decoding step and whenever a prefill came between."""
        if not few(q.shape[1]) or known_empty(self.start):
            return replace(self, age=jnp.zeros((), jnp.int32))
        if self.selection.tokens >= self.capacity:
            return self

        def choose() -> tuple[Array, Array]:
            bounds = BlockBounds(self.low.swapaxes(1, 2), self.high.swapaxes(1, 2))
            scores = block_scores(q.astype(self.low.dtype), bounds)
            old = jnp.maximum(jnp.asarray(self.length) - self.selection.window, 0)
            picked = select_blocks(scores, old, self.chosen.shape[-1], self.selection.block, last=0)
            return jnp.asarray(picked.idx)[:, :, 0], jnp.asarray(picked.count)[:, :, 0]

        keep = lambda: (self.chosen, self.count)
        chosen, count = choose() if self.selection.every == 1 else jax.lax.cond(self.age == 0, choose, keep)
        return replace(self, chosen=chosen, count=count, age=(self.age + 1) % self.selection.every)

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """A chunk reads everything, a few tokens what was chosen by `prepare`. The mask is plain `Causal()`."""
        tokens = q.shape[1]
        if not mask.plan(q.shape[2], tokens, self.capacity, 1, self.selection.block).dense:
            raise ValueError(f"page selection: {mask} is not Causal(); windowed layers need no selection")
        if not few(tokens) or known_empty(self.start) or self.selection.tokens >= self.capacity:
            return self.inner.attend(q, mask, **options)
        lists = BlockList(self.chosen[:, :, None], self.count[:, :, None], block_q=8, block_k=self.selection.block)
        return by_op(q, self.inner.held(tokens), self.selection.mask, lists=lists, **options)

    def settled(self) -> "SelectedCache":
        """Itself."""
        return self

    def fork(self, rows: Counts) -> "SelectedCache":
        """The inner cache forked, bounds and choice copied."""
        low, high, chosen, count = take_rows(rows, self.low, self.high, self.chosen, self.count)
        return replace(self, inner=self.inner.fork(rows), low=low, high=high, chosen=chosen, count=count)

    def evict(self, drop: Bool[Array, "B"]) -> "SelectedCache":
        """Evicted rows have no bounds; a new choice follows."""
        gone = jnp.asarray(drop)[:, None, None, None]
        low, high = jnp.where(gone, NONE, self.low), jnp.where(gone, -NONE, self.high)
        count = jnp.where(jnp.asarray(drop)[:, None], 0, self.count)
        return replace(
            self, inner=self.inner.evict(drop), low=low, high=high, count=count, age=jnp.zeros((), jnp.int32)
        )
