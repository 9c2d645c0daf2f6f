"""Which earlier tokens each KV head of a layer may read, where that is neither everything nor one window for all heads.

All query heads of a KV head share its pattern, since otherwise no key could be forgotten.
"""

from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Array, Float

from lcjax.cache.base import AttentionCache
from lcjax.cache.groups import GroupedCache
from lcjax.cache.room import Room
from lcjax.cache.strided import Stripes
from lcjax.parallel import ops
from pallas_kernels.head_masks import over_groups
from pallas_kernels.masks import Causal, Mask, Sink, Window


class Pattern:
    """Base: a frozen dataclass of plain numbers, so that it is written into configurations and checkpoints."""

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise ValueError when the pattern is made for another number of heads."""

    def mask(self, num_heads: int, num_kv_heads: int) -> Mask:
        """The pattern of all query heads in the kernels' algebra, causality included; segments are passed beside it."""
        raise NotImplementedError

    def attend(
        self, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], **options: Any
    ) -> Float[Array, "B T H D"]:
        """Self-attention over whole rows, by the mask unless the pattern knows better; `options` are the op's."""
        return cast(Array, ops.attention(q, k, v, self.mask(q.shape[2], k.shape[2]), **options))

    def cache(self, room: Room) -> AttentionCache:
        """An empty cache that keeps what the mask can still show, and may forget the rest."""
        raise NotImplementedError

    def at(self, length: int) -> "Pattern":
        """The pattern for requests of up to `length` tokens, prompt and answer; it does not change on the way."""
        del length
        return self


@dataclass(frozen=True)
class Spans(Pattern):
    """KV head h reads the last `windows[h]` tokens, its own included, and the first `sinks[h]`; None: everything.

    Of packed documents each sees its own sinks.
    """

    sinks: tuple[int, ...]
    windows: tuple[int | None, ...]

    def __post_init__(self):
        if len(self.sinks) != len(self.windows) or not self.sinks:
            raise ValueError(f"Spans: {len(self.sinks)} sinks and {len(self.windows)} windows; give one of each a head")
        for head, (sink, window) in enumerate(self.spans):
            if sink < 0 or (window is not None and window < 1) or (window is None and sink):
                raise ValueError(
                    f"Spans: KV head {head} has sink {sink} and window {window}; a window is at least 1, a sink at "
                    "least 0, and a head that reads everything (window None) has sink 0"
                )

    @property
    def spans(self) -> tuple[tuple[int, int | None], ...]:
        """(sink, window) of each KV head."""
        return tuple(zip(self.sinks, self.windows, strict=True))

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        if len(self.spans) != num_kv_heads:
            raise ValueError(f"Spans is made for {len(self.spans)} KV heads, the model has {num_kv_heads}")

    def mask(self, num_heads: int, num_kv_heads: int) -> Mask:
        return over_groups([_span_mask(*span) for span in self.spans], num_heads)

    def cache(self, room: Room) -> AttentionCache:
        """A ring for each set of heads of one span, where it is smaller than all tokens; the others keep everything."""
        members: dict[tuple[int, int] | None, list[int]] = {}
        for head, (sink, window) in enumerate(self.spans):
            ring = (sink, window) if window is not None and room.turns(sink, window) else None
            members.setdefault(ring, []).append(head)
        everything = members.get(None, [])
        whole = room.full if all(self.windows[head] is None for head in everything) else room.whole
        caches = [
            whole(len(heads)) if span is None else room.ring(len(heads), *span) for span, heads in members.items()
        ]
        return GroupedCache.of(caches, list(members.values()))


def _span_mask(sink: int, window: int | None) -> Mask:
    if window is None:
        return Causal()
    return Causal() & (Sink(sink) | Window(window)) if sink else Causal() & Window(window)


@dataclass(frozen=True)
class Strided(Pattern):
    """Blocks of `block` keys: the last `local` blocks, the query's own included, and every `every`-th block for ever.

    KV head h of the pattern keeps the blocks J with (J + h * step + offset) % every == 0, counted from the start of the
    row (S2-Attention, arXiv 2407.17678), and the first `sink_blocks` blocks. The last `dense_heads` KV heads read
    everything. step None: max(1, every // number of query heads); 0: the same blocks for all heads.
    """

    block: int = 64
    local: int = 16
    every: int = 16
    step: int | None = None
    offset: int = 0
    sink_blocks: int = 0
    dense_heads: int = 0

    def __post_init__(self):
        for name, least in (("block", 1), ("local", 1), ("every", 1), ("sink_blocks", 0), ("dense_heads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Strided.{name} is {getattr(self, name)}; it must be at least {least}")

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        if self.dense_heads > num_kv_heads:
            raise ValueError(f"Strided.dense_heads is {self.dense_heads}, the model has {num_kv_heads} KV heads")

    def stripes(self, num_heads: int, num_kv_heads: int) -> Stripes:
        """The blocks of the KV heads that are not dense."""
        step = max(1, self.every // num_heads) if self.step is None else self.step
        offsets = tuple((h * step + self.offset) % self.every for h in range(num_kv_heads - self.dense_heads))
        return Stripes(self.block, self.local, self.every, self.sink_blocks, offsets)

    def mask(self, num_heads: int, num_kv_heads: int) -> Mask:
        masks = self.stripes(num_heads, num_kv_heads).masks
        return over_groups([*masks, *(Causal(),) * self.dense_heads], num_heads)

    def cache(self, room: Room) -> AttentionCache:
        """A ring of local blocks and the blocks that stay; beside it a full cache of the dense heads."""
        stripes = self.stripes(room.num_heads, room.num_kv_heads)
        sparse, heads = len(stripes.offsets), range(room.num_kv_heads)
        if not sparse or stripes.tokens(room.capacity) >= room.capacity:
            return room.whole(room.num_kv_heads) if sparse else room.full(room.num_kv_heads)
        caches: list[AttentionCache] = [room.strided(stripes)]
        caches += [room.full(self.dense_heads)] if self.dense_heads else []
        return GroupedCache.of(caches, [group for group in (heads[:sparse], heads[sparse:]) if group])
