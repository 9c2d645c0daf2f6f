"""Tokens in pages of a common pool: requests of different lengths share memory, and forks share a prefix.

A page holds `page` tokens of every KV head, one head's tokens together, `[K, page, D]`: what one copy of a decode step
reads. int8 factors lie beside, `[K, page]`, a word a token; codes of 4 bits would be pages of D / 2 bytes a token with
the same factors.
Page n of a request (tokens n * page ...) is `table[b, n]` of the pool, for n below `pages[b]`.
"""

from dataclasses import dataclass, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels as pk
from lcjax.cache.base import (
    Counts,
    Options,
    appended,
    check_room,
    dropped,
    emptied,
    known_empty,
    no_tokens,
    reached,
    take_rows,
    through_op,
    written,
)
from lcjax.cache.encoding import decode, encode, no_factors, stored_bytes
from lcjax.cache.few import by_op, few
from pallas_kernels.checks import check_values
from pallas_kernels.masks import Mask

PAGE = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """A pool of P pages, and each request's table of W of them."""

    k: Any  # [P,K,page,D]
    v: Any  # [P,K,page,Dv]
    factors: Any  # int32 [P,K,page], of int8: two bfloat16 a word (`encoding`)
    table: Any  # int32 [B,W]; always pages that exist
    pages: Any  # int32 [B]: entries of the table that are the request's own or shared with a fork
    length: Any  # int32 [B]
    start: Any  # int32 [B]

    @classmethod
    def init(
        cls,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        *,
        page: int = PAGE,
        pool: int | None = None,
    ) -> "PagedCache":
        """An empty cache of requests of up to `capacity` tokens.

        pool: pages in all. By default every request has all it can fill; with fewer, `reserve` hands them out.
        """
        if page < 1 or capacity < 1 or (pool is not None and pool < 1):
            raise ValueError(f"paged cache: page {page}, capacity {capacity} and pool {pool} must be positive")
        width = -(-capacity // page)
        count = batch * width if pool is None else pool
        shape = (count, num_kv_heads, page, head_dim)
        k, v = (jnp.zeros(shape, dtype) for _ in range(2))
        table = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
        pages = np.full((batch,), width, np.int32)
        if pool is not None:
            table, pages = np.zeros_like(table), np.zeros_like(pages)
        tables = jnp.asarray(table), jnp.asarray(pages)
        return cls(k, v, no_factors(shape[:3], dtype), *tables, no_tokens(batch), no_tokens(batch))

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def pool(self) -> int:
        """Pages in all."""
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach."""
        return self.table.shape[1] * self.page

    @property
    def bytes(self) -> int:
        """Bytes of the pool and the table: 2 P K page D times the width of the dtype (int8: D + 2), and 4 B W."""
        return stored_bytes(self.k, self.v, self.factors) + 4 * self.table.size

    def reserve(self, tokens: Counts | int) -> "PagedCache":
        """Give each request the pages that its next `tokens` tokens need.

        Raises:
          ValueError: the requests need more pages than their tables or the pool have (under jit: by the debug checks).
        """
        pages = jnp.asarray(self.pages)
        need = jnp.maximum(-(-jnp.asarray(reached(self.length, tokens)) // self.page), pages)
        uses = self._uses()
        self._check_pages(need, (need - pages).sum(), (uses == 0).sum())
        order = jnp.argsort(uses > 0, stable=True).astype(jnp.int32)  # free pages first
        entry = jnp.arange(self.table.shape[1], dtype=jnp.int32)
        new = (entry >= pages[:, None]) & (entry < need[:, None])
        rank = jnp.cumsum(new.reshape(-1)).reshape(new.shape) - 1
        return replace(self, table=jnp.where(new, order[rank % self.pool], self.table), pages=need)

    def _check_pages(self, need: Counts, wanted: Int[Array, ""], free: Int[Array, ""]) -> None:
        """Tables wide enough for `need` pages a request, and a pool with `wanted` free pages."""
        width = self.table.shape[1]
        check_values(
            lambda pages: pages <= width,
            f"paged cache: {{found}} pages of {self.page} tokens pass the capacity of {self.capacity}",
            need,
        )
        check_values(
            lambda wanted, free: wanted <= free,
            f"paged cache: {{found}} pages are needed and fewer of {self.pool} are free; make the pool larger or evict "
            "requests",
            wanted,
            free,
        )

    def _uses(self) -> Int[Array, "P"]:
        """How many requests hold each page."""
        own = jnp.arange(self.table.shape[1]) < jnp.asarray(self.pages)[:, None]
        return jnp.zeros(self.pool, jnp.int32).at[jnp.where(own, self.table, self.pool)].add(1, mode="drop")

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> "PagedCache":
        """Write the new tokens behind the ones held, into the requests' pages."""
        batch, tokens = k.shape[:2]
        count = appended(tokens, valid, batch)
        self._check(count)
        length = jnp.asarray(self.length)
        slot = length[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        entry = jnp.minimum(slot // self.page, self.table.shape[1] - 1)
        physical = jnp.take_along_axis(self.table, entry, axis=1)
        # tokens to drop move past the end of the pool, each to a place of its own; no page of others is ever written
        keep = slot < (jnp.asarray(self.pages) * self.page)[:, None]
        keep = keep if valid is None else keep & valid
        physical = dropped(physical, keep, self.pool)
        at = lambda buffer: buffer.at[physical, :, slot % self.page]
        k, v, factors = encode(k, v, self.k.dtype)
        if factors is not None:
            factors = written(at(self.factors), factors)
        k, v = written(at(self.k), k), written(at(self.v), v)
        return replace(self, k=k, v=v, factors=factors, length=length + jnp.asarray(count), start=self.length)

    def _check(self, count: Counts) -> None:
        """Room and pages for the new tokens: at once where the numbers are known, under jit in the debug checks."""
        check_room(self.length, count, self.capacity)
        check_values(
            lambda held, pages: held <= pages * self.page,
            f"paged cache: a request reaches {{found}} tokens, more than its pages of {self.page} hold; "
            "reserve more before the append",
            reached(self.length, count),
            self.pages,
        )

    def prepare(self, q: Array) -> "PagedCache":
        """Nothing."""
        return self

    def settled(self) -> "PagedCache":
        """Itself."""
        return self

    def held(self, tokens: int) -> pk.KVCache:
        """What the decode op reads after an append of `tokens`."""
        length = jnp.minimum(jnp.asarray(self.start) + tokens, self.capacity)
        return pk.KVCache(self.k, self.v, length, self.factors, self.table)

    def floats(self, dtype: DTypeLike, tokens: int | None = None) -> tuple[Array, Array]:
        """Keys and values `[B,S,K,D]` of the first `tokens` slots (default: all), copied in the order of the tokens."""
        size = self.capacity if tokens is None else tokens
        table = self.table[:, : -(-size // self.page)]

        def gathered(pool: Array) -> Array:
            inner = jnp.moveaxis(pool[table], 2, 1)  # [B,K,W,page,...]
            return inner.reshape(*inner.shape[:2], -1, *inner.shape[4:])[:, :, :size]

        factors = None if self.factors is None else gathered(self.factors)
        return decode(gathered(self.k).swapaxes(1, 2), gathered(self.v).swapaxes(1, 2), factors, dtype)

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """A few tokens read the pages where they lie; a chunk goes through the block-sparse op over a copy in order."""
        tokens = q.shape[1]
        if known_empty(self.start) and tokens <= self.capacity:
            return through_op(q, *self.floats(q.dtype, tokens), mask, **options)
        if not few(tokens):
            return through_op(q, *self.floats(q.dtype), mask, q_offset=self.start, kv_length=self.length, **options)
        return by_op(q, self.held(tokens), mask, **options)

    def fork(self, rows: Counts) -> "PagedCache":
        """Full pages are shared; of the rows that continue one request, all but the first copy its last page."""
        rows = jnp.asarray(rows)
        table, pages, length, start = take_rows(rows, self.table, self.pages, self.length, self.start)
        again = (jnp.tril(rows[:, None] == rows[None], -1)).any(1)
        full = length // self.page
        shared = replace(self, table=table, pages=jnp.where(again, full, pages), length=length, start=start)
        forked = shared.reserve(jnp.where(again, pages * self.page - length, 0))
        last = jnp.minimum(full, table.shape[1] - 1)[:, None]
        source, target = (jnp.take_along_axis(t, last, axis=1)[:, 0] for t in (table, forked.table))
        target = jnp.where(again & (full < forked.pages), target, self.pool)  # the others keep theirs
        copy = lambda pool: None if pool is None else pool.at[target].set(pool[source], mode="drop")
        arrays = {name: copy(getattr(self, name)) for name in ("k", "v", "factors")}
        return replace(forked, **arrays)

    def evict(self, drop: Bool[Array, "B"]) -> "PagedCache":
        """Pages that no other request shares are free again."""
        pages, length, start = emptied(drop, self.pages, self.length, self.start)
        return replace(self, pages=pages, length=length, start=start)
