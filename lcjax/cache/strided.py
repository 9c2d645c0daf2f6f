"""The cache of a layer that reads the last blocks of keys, and of older ones only those that its heads keep for ever.

KV head h keeps the blocks J with (J + offsets[h]) % every == 0 and the first `sink_blocks`. A block that is kept goes
to the next of the head's kept pages and stays there; any other goes to page J mod `local` of a ring, where the block
`local` after it takes its place: just when the mask shows it to no further query. So nothing is ever moved, and which
block lies where follows from the length alone. As in `lcjax.cache.ring`, the queries of a chunk also need the ring as
it was, which the cache keeps until it is settled.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcjax.cache.base import (
    Counts,
    Options,
    appended,
    check_room,
    dropped,
    emptied,
    known_empty,
    no_tokens,
    take_rows,
    through_op,
    traced,
    with_lse,
    write_slots,
    written,
)
from lcjax.cache.few import by_op
from lcjax.cache.ring import Chunk
from lcjax.parallel.layout import current_layout
from pallas_kernels import KVCache, merge_attention
from pallas_kernels.head_masks import over_groups
from pallas_kernels.masks import Causal, Intervals, Mask, Recent, Sink, Stride, Window
from pallas_kernels.merge import add_sink_logits
from pallas_kernels.plan import INF


@dataclass(frozen=True)
class Stripes:
    """Which blocks of `block` tokens KV head h keeps: (J + offsets[h]) % every == 0, and J < sink_blocks."""

    block: int
    local: int
    every: int
    sink_blocks: int
    offsets: tuple[int, ...]

    @property
    def near(self) -> Mask:
        """The local band: whole blocks, of which as many tokens as the newest block leaves sure are a window."""
        return Window((self.local - 1) * self.block + 1) | Recent(self.block, self.local)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """What each KV head reads."""
        shared = self.near | Sink(self.sink_blocks * self.block) if self.sink_blocks else self.near
        return tuple(Causal() & (shared | Stride(self.block, self.every, offset)) for offset in self.offsets)

    @property
    def residues(self) -> np.ndarray:
        """[K] J modulo `every` of the strided blocks."""
        return -np.array(self.offsets, np.int32) % self.every

    def kept(self, block: Any) -> Any:
        """Whether block J `[..., K]` stays."""
        return ((block - self.residues) % self.every == 0) | (block < self.sink_blocks)

    def count(self, block: Any) -> Any:
        """How many blocks before J `[..., K]` stay."""
        xp = np if isinstance(block, np.ndarray | int) else jnp
        strided = lambda n: xp.maximum(n - self.residues + self.every - 1, 0) // self.every
        sinks = xp.minimum(block, self.sink_blocks)
        return strided(block) + sinks - strided(sinks)

    def pages(self, tokens: int) -> int:
        """Blocks that stay of `tokens` tokens, of the head that keeps most."""
        return int(self.count(np.full_like(self.residues, -(-tokens // self.block))).max())

    def tokens(self, capacity: int) -> int:
        """Places of a cache for `capacity` tokens."""
        return (self.local + self.pages(capacity)) * self.block

    def far(self, pages: int) -> tuple[Mask, ...]:
        """What each KV head reads of its kept pages in a row: those behind the local band of the query's block."""
        block = np.arange(pages * self.every + self.sink_blocks)[:, None]
        masks = []
        for mine in self.kept(block).T:
            since = np.minimum((block[mine, 0][:pages] + self.local) * self.block, INF)
            later = np.stack([since, np.full_like(since, INF)], axis=1).astype(np.int32)
            masks.append(Intervals(self.block, np.zeros(pages, np.int32), later))
        return tuple(masks)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StridedCache:
    """Pages `[B, K, local + kept, block, D]`: first the ring of local blocks, then those that stay."""

    pages_k: Any
    pages_v: Any
    length: Any  # int32 [B]
    start: Any  # int32 [B]
    chunk: Chunk | None
    stripes: Stripes = field(metadata={"static": True})
    capacity: int = field(metadata={"static": True})

    @classmethod
    def init(cls, batch: int, capacity: int, head_dim: int, dtype: Any, stripes: Stripes) -> "StridedCache":
        """An empty cache of requests of up to `capacity` tokens."""
        pages = stripes.local + stripes.pages(capacity)
        shape = (batch, len(stripes.offsets), pages, stripes.block, head_dim)
        empty = no_tokens(batch)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, None, stripes, capacity)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values: 2 B K (local + kept) block D times the width of the dtype.

        kept: of ceil(capacity / block) blocks, those that the head which keeps most keeps.
        """
        return self.pages_k.nbytes + self.pages_v.nbytes

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"] | None = None
    ) -> "StridedCache":
        """Write each token to the page of its block; what the ring has no place for any more is left out."""
        batch, tokens = k.shape[:2]
        count = appended(tokens, valid, batch)
        check_room(self.length, count, self.capacity)
        k, v = k.astype(self.pages_k.dtype), v.astype(self.pages_v.dtype)
        length = jnp.asarray(self.length)
        end = length + jnp.asarray(count)
        position = length[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        block = (position // self.stripes.block)[..., None]  # [B,T,1]
        newest = (jnp.maximum(end - 1, 0) // self.stripes.block)[:, None, None]
        stays = self.stripes.kept(block) | (block > newest - self.stripes.local)  # [B,T,K]
        stays &= (position < self.capacity)[..., None]
        stays = stays if valid is None else stays & valid[..., None]
        heads = stays.shape[-1]
        page = dropped(self._page(block).reshape(batch, -1), stays.reshape(batch, -1), self.pages_k.shape[2])
        where = (
            jnp.arange(batch)[:, None, None],
            jnp.arange(heads),
            page.reshape(batch, tokens, heads),
            (position % self.stripes.block)[..., None],
        )
        new = (written(buffer.at[where], x) for buffer, x in ((self.pages_k, k), (self.pages_v, v)))
        pages_k, pages_v = new
        chunk = Chunk(k, v, self.pages_k, self.pages_v)
        return replace(self, pages_k=pages_k, pages_v=pages_v, length=end, start=self.length, chunk=chunk)

    def _page(self, block: Int[Array, "..."]) -> Int[Array, "..."]:
        """The page of block J `[..., 1 | K]` of each KV head."""
        kept = self.stripes.local + self.stripes.count(block)
        return jnp.where(self.stripes.kept(block), kept, block % self.stripes.local)

    def prepare(self, q: Array) -> "StridedCache":
        """Nothing."""
        return self

    def settled(self) -> "StridedCache":
        """Without the last chunk."""
        return replace(self, chunk=None)

    def fork(self, rows: Counts) -> "StridedCache":
        """Copies of the rows."""
        k, v, length, start = take_rows(rows, self.pages_k, self.pages_v, self.length, self.start)
        return replace(self, pages_k=k, pages_v=v, length=length, start=start, chunk=None)

    def evict(self, drop: Bool[Array, "B"]) -> "StridedCache":
        """The pages stay as they are; by the length, none of them holds a token."""
        length, start = emptied(drop, self.length, self.start)
        return replace(self, length=length, start=start, chunk=None)

    def attend(
        self, q: Float[Array, "B T H D"], mask: Mask, **options: Unpack[Options]
    ) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"] | None]:
        """One token reads the pages, a chunk also what the ring forgot for it. The mask is this cache's own."""
        heads, groups = q.shape[2], self.pages_k.shape[1]
        self._check(mask, over_groups(self.stripes.masks, heads))
        if self.chunk is None:
            raise ValueError(f"strided cache: {q.shape[1]} tokens attend to a settled cache: attend after an append")
        if known_empty(self.start):
            return through_op(q, self.chunk.k, self.chunk.v, mask, **options)
        if q.shape[1] == 1 and current_layout(q.shape[0], (heads, groups), None) is None:
            return self._attend_token(q, **options)
        return self._attend_chunk(q, self.chunk, **options)

    def _check(self, mask: Mask, own: Mask) -> None:
        """Refuse another mask than the cache's own, as far as its numbers are known."""
        known = not any(traced(x) for x in jax.tree.leaves(mask))
        if jax.tree.structure(mask) != jax.tree.structure(own) or (known and mask != own):
            raise ValueError(f"strided cache: {mask} is not the mask of {self.stripes}; use a dense cache")

    def _attend_token(self, q: Array, **options: Unpack[Options]) -> tuple[Array, Array | None]:
        """Every KV head is a request of its own to the decode op, with a table of the pages that it reads."""
        batch, groups, pages, size, _ = self.pages_k.shape
        position = jnp.asarray(self.start)[:, None]  # [B,1]
        newest = position // size
        oldest = jnp.maximum(newest - self.stripes.local + 1, 0)  # of the local band
        old = self.stripes.count(oldest)  # [B,K] kept blocks before it
        entry = jnp.arange(pages, dtype=jnp.int32)[:, None]  # [W,1]
        band = jnp.minimum(oldest[:, None] + entry - old[:, None], newest[:, None])  # [B,W,K]
        page = jnp.where(entry < old[:, None], self.stripes.local + entry, self._page(band))
        request = jnp.arange(batch * groups, dtype=jnp.int32).reshape(batch, 1, groups)
        table = (request * pages + jnp.clip(page, 0, pages - 1)).swapaxes(1, 2).reshape(batch * groups, pages)
        lengths = (old + newest - oldest) * size + position % size + 1
        pool = (x.reshape(batch * groups * pages, 1, size, x.shape[-1]) for x in (self.pages_k, self.pages_v))
        held = KVCache(*pool, lengths.reshape(-1), page_table=table)
        wanted, logits = options.pop("return_lse", True), options.pop("sink_logits", None)
        o, lse = by_op(q.reshape(batch * groups, 1, -1, q.shape[-1]), held, None, **options)
        assert lse is not None
        o, lse = o.reshape(batch, 1, -1, o.shape[-1]), lse.reshape(batch, -1, 1)
        o, lse = (o, lse) if logits is None else add_sink_logits(o, lse, logits)
        return o, lse if wanted else None

    def _attend_chunk(self, q: Array, chunk: Chunk, **options: Unpack[Options]) -> tuple[Array, Array | None]:
        """The local band and the kept blocks behind it are disjoint key sets: two calls and a merge."""
        stripes, heads = self.stripes, q.shape[2]
        start, length = jnp.asarray(self.start), jnp.asarray(self.length)
        base = jnp.maximum(start // stripes.block - stripes.local + 1, 0) * stripes.block
        k, v = self._near(chunk.k_before, chunk.k, base), self._near(chunk.v_before, chunk.v, base)
        options.pop("return_lse", None)
        near = with_lse(q, k, v, Causal() & stripes.near, q_offset=start - base, kv_length=length - base, **options)
        options.pop("sink_logits", None)  # they are in the first part
        if (pages := self.pages_k.shape[2] - stripes.local) == 0:
            return near
        passed = jnp.maximum(jnp.maximum(length - 1, 0) // stripes.block - stripes.local + 1, 0)
        held = jnp.minimum(jnp.max(stripes.count(passed[:, None]), axis=1), pages) * stripes.block
        k, v = (_in_a_row(x[:, :, stripes.local :]) for x in (self.pages_k, self.pages_v))
        far = with_lse(q, k, v, over_groups(stripes.far(pages), heads), q_offset=start, kv_length=held, **options)
        return merge_attention(near, far)

    def _near(self, before: Array, new: Array, base: Int[Array, " B"]) -> Float[Array, "B S K D"]:
        """The local blocks from position `base` on as they were before the chunk, and the chunk behind them."""
        batch, groups, tokens = before.shape[0], before.shape[1], new.shape[1]
        block = base[:, None] // self.stripes.block + jnp.arange(self.stripes.local, dtype=jnp.int32)
        page = self._page(block[..., None])  # [B,local,K]
        page = jnp.minimum(page, before.shape[2] - 1)
        old = before[jnp.arange(batch)[:, None, None], jnp.arange(groups), page]
        old = _in_a_row(jnp.swapaxes(old, 1, 2))
        slot = (jnp.asarray(self.start) - base)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        return write_slots(jnp.pad(old, ((0, 0), (0, tokens), (0, 0), (0, 0))), new, slot, None)


def _in_a_row(pages: Float[Array, "B K P n D"]) -> Float[Array, "B S K D"]:
    """The tokens of pages, one after the other."""
    rows = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
    return jnp.swapaxes(rows, 1, 2)
