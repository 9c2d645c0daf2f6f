"""How the arrays of one op lie on the mesh that is set, and running a per-shard function over it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import AxisType, PartitionSpec

from lcjax.parallel.rules import RULES

Exchange = Literal["auto", "ring", "gather", "heads"]
EXCHANGES: tuple[Exchange, ...] = ("auto", "ring", "gather", "heads")

_exchange = jax.make_user_context(default_value="auto")


def exchange() -> Exchange:
    """How full attention passes keys and values between the shards of a sequence (see `attention_exchange`)."""
    return _exchange.value


def attention_exchange(name: Exchange) -> AbstractContextManager[None]:
    """Trace full attention over a split sequence with this exchange: 'ring', 'gather', 'heads', or 'auto'."""
    if name not in EXCHANGES:
        raise ValueError(f"attention exchange {name!r} is unknown: choose one of {', '.join(map(repr, EXCHANGES))}")
    return _exchange(name)


def exchange_of(heads: int, kv_heads: int, shards: int, *, plain: bool = True) -> Exchange:
    """How attention with a chip's heads goes over the shards, 'auto' decided; `plain`: causal, without a pattern.

    Raises:
      ValueError: 'heads' was asked for, and they don't split.
    """
    chosen, splits = exchange(), splits_heads(heads, kv_heads, shards)
    if chosen == "heads" and not splits:
        raise ValueError(
            f"attention exchange 'heads': {heads} query and {kv_heads} KV heads of a chip do not split over "
            f"context={shards}: choose 'ring' or 'gather'"
        )
    if chosen == "auto":
        chosen = "heads" if plain and splits and kv_heads >= shards else "ring"
    return chosen if plain or chosen == "heads" else "gather"


def splits_heads(heads: int, kv_heads: int, shards: int) -> bool:
    """Whether an all-to-all can deal these heads out to the shards of a sequence."""
    return heads % shards == 0 and (kv_heads % shards == 0 or shards % kv_heads == 0)


@dataclass(frozen=True)
class Layout:
    """The mesh axes that split the batch, the heads and the length of an op's arrays; None or () where nothing does."""

    batch: tuple[str, ...]
    heads: str | None
    length: str | None
    shards: int  # of the length

    def spec(self, *axes: str) -> PartitionSpec:
        """The PartitionSpec of an array whose axes are 'batch', 'length', 'heads', or anything else (whole)."""
        names = {"batch": self.batch or None, "length": self.length, "heads": self.heads}
        return PartitionSpec(*(names.get(axis) for axis in axes))

    def axes(self, *axes: str) -> tuple[str, ...]:
        """The mesh axes that these axes of an array lie over."""
        names = {"batch": self.batch, "length": (self.length,), "heads": (self.heads,)}
        return tuple(name for axis in axes for name in names[axis] if name is not None)


def current_layout(batch: int, heads: tuple[int, ...], length: int | None) -> Layout | None:
    """The layout of arrays of these sizes on the mesh that is set; None without a mesh, or inside a `shard_map`.

    heads: every head count that the tensor axis has to split. length: None keeps the sequence whole.

    Raises:
      ValueError: heads or length that don't divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    sizes = dict(mesh.shape)
    split = lambda axis: tuple(name for name in RULES[axis] if sizes.get(name, 1) > 1)
    rows = split("batch")
    if batch % math.prod(sizes[name] for name in rows):
        rows = ()  # a few requests on many chips: every chip does them all
    tensor, shards = sizes.get("tensor", 1), sizes.get("context", 1)
    if bad := [n for n in heads if n % tensor]:
        raise ValueError(f"{bad[0]} heads do not split over the mesh axis tensor={tensor}: lower it to a divisor")
    if length is None or shards == 1:
        return Layout(rows, "tensor" if tensor > 1 else None, None, 1)
    if length % shards:
        raise ValueError(
            f"a sequence of {length} tokens does not split over the mesh axis context={shards}: "
            f"pad it to {math.ceil(length / shards) * shards}"
        )
    return Layout(rows, "tensor" if tensor > 1 else None, "context", shards)


def per_shard(
    function: Callable[..., Any], in_specs: Any, out_specs: Any, axes: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """`function` of one shard, over the mesh that is set. Kernels carry no replication types, so none are checked.

    axes: the mesh axes that the function sees; the compiler splits its arrays over the others (none given: over none).
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)
