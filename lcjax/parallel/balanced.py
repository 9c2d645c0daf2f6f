"""A whole pass in the balanced order of ring attention: the sequence is dealt out once, and not by every layer.

Where all layers are full causal attention over a split sequence that goes around a ring, nothing else in a decoder
minds the order of the tokens. So token ids, positions and document ids are dealt out before the first layer, and the
final states are put back.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Shaped

from lcjax.parallel import dense
from lcjax.parallel.layout import Layout, current_layout, exchange_of, per_shard
from lcjax.parallel.work import counting

_dealt = jax.make_user_context(default_value=False)


def dealt() -> bool:
    """Whether the arrays of attention being traced lie in the balanced order already."""
    return _dealt.value


@dataclass(frozen=True)
class Order:
    """The order of a pass's tokens: balanced over the shards of `layout`, or as they are stored (None)."""

    layout: Layout | None = None

    def deal(self, *arrays: Shaped[Array, "... T"] | None) -> Sequence[Any]:
        """The arrays in this order."""
        return [self._moved(dense.zigzag, x, "batch", "length") for x in arrays]

    def restore(self, x: Shaped[Array, "B T width"]) -> Array:
        """An array of this order as tokens are stored."""
        return self._moved(dense.unzigzag, x, "batch", "length", "hidden")

    def held(self) -> AbstractContextManager[Any]:
        """Trace layers whose arrays have this order."""
        return contextlib.nullcontext() if self.layout is None else _dealt(True)

    def _moved(self, move: Any, x: Any, *axes: str) -> Any:
        if self.layout is None or x is None:
            return x
        layout, spec = self.layout, self.layout.spec(*axes)
        assert layout.length is not None
        split = dense.Split(layout.length, layout.shards, scale=None, soft_cap=None)
        return per_shard(lambda x: move(x, split), spec, spec)(x)


def order_of(full: bool, batch: int, length: int, heads: int, kv_heads: int) -> Order:
    """Of a pass over whole rows; `full`: all layers are full causal attention, and each token has one position."""
    layout = None if counting() or not full else current_layout(batch, (heads, kv_heads), length)
    if layout is None or layout.length is None:
        return Order()
    tensor = 1 if layout.heads is None else jax.sharding.get_abstract_mesh().shape[layout.heads]
    ring = exchange_of(heads // tensor, kv_heads // tensor, layout.shards) == "ring"
    return Order(layout if ring else None)
