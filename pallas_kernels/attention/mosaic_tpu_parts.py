"""Pieces that the TPU attention kernels share: sizes, copies from HBM, lane blocks, token masks.

Arrays keep the caller's layout, [B, N, heads * D]: a block of 128 lanes holds one head of 128, two of 64 or four of 32.
Where heads share a block, a query keeps its head's lanes and zeros in the others, so that a product over a whole block
is a product over the head: the systolic array is 128 deep anyway, and nothing is padded in HBM.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
HIDDEN = -1e38  # a masked score; far below LOWEST, so that its weight is zero in every row
LOWEST = -1e30  # where a row's maximum starts
NO_ROW = 1e30  # log-sum-exp of a row without keys, in the backward: every weight is zero


@dataclasses.dataclass(frozen=True)
class Config:
    """Static facts of a call, in the kernels' terms.

    `places`: sinks count from the start of a segment. `packed`, `limits`: tables that only column blocks need.
    `list_heads`: rows of run-time lists per request, 0 without lists. `tables_batch`: the batch axis of the tables.
    """

    batch: int
    length: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    block_q: int
    block_k: int
    compute_k: int
    causal: bool
    dense: bool
    scale: float
    soft_cap: float | None
    segments: bool
    places: bool
    packed: bool
    limits: bool
    list_heads: int
    tables_batch: int
    vmem_bytes: int

    @property
    def fused(self) -> bool:
        """Whether one kernel makes all three gradients: no heads share lanes, no tile of queries is visited twice."""
        return self.shared == self.value_shared == 1 and not self.list_heads

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def block(self) -> int:
        """Lanes of a block of q and k."""
        return max(self.dim, LANES)

    @property
    def value_block(self) -> int:
        return max(self.value_dim, LANES)

    @property
    def shared(self) -> int:
        """Heads in a block of q and k."""
        return self.block // self.dim

    @property
    def value_shared(self) -> int:
        return self.value_block // self.value_dim

    @property
    def together(self) -> int:
        """Heads that one step of the head axis covers, so that blocks shared by heads are visited in a row."""
        return max(self.shared, self.value_shared)

    @property
    def tiles_q(self) -> int:
        return -(-self.length // self.block_q)

    @property
    def tiles_k(self) -> int:
        return -(-self.keys // self.block_k)

    @property
    def padded_length(self) -> int:
        return -(-self.length // LANES) * LANES

    @property
    def padded_keys(self) -> int:
        return -(-self.keys // LANES) * LANES


def named(names: Sequence[str], refs: Sequence[Any]) -> types.SimpleNamespace:
    """Refs by name; names that the call does not use are None."""
    optional = dict.fromkeys(("q_ids", "k_ids", "packed", "limits", "list_rows", "lists"))
    return types.SimpleNamespace(**{**optional, **dict(zip(names, refs, strict=True))})


def rows_of_lanes(x, multiple: int):
    """[B, N, heads, D] as [B, N', lanes]: N' a multiple of 128, lanes of `multiple`; a copy only where they are not."""
    x = x.reshape(*x.shape[:2], -1)
    pads = (-x.shape[1] % LANES, -x.shape[2] % multiple)
    return jnp.pad(x, ((0, 0), (0, pads[0]), (0, pads[1]))) if any(pads) else x


def transfer(
    pairs: Sequence[tuple[Callable, Callable]], sems, tile, slot, sizes: tuple[int, int], act: str, *, out: bool = False
) -> None:
    """Start or wait for the copies of one tile, in from HBM or `out` to it.

    A pair is (HBM slice, VMEM slot); sizes = (tile, whole extent), the last tile may be short.
    """
    block, extent = sizes

    def go(size: int) -> None:
        for n, (source, target) in enumerate(pairs):
            start = pl.multiple_of(tile * block, LANES)
            ends = (source(start, size), target(slot, size))
            copy = pltpu.make_async_copy(*(ends[::-1] if out else ends), sems.at[n, slot])
            getattr(copy, act)()

    tail = extent % block
    if not tail:
        go(block)
        return
    last = tile == extent // block
    pl.when(last)(lambda: go(tail))
    pl.when(jnp.logical_not(last))(lambda: go(block))


def lane_home(x, dim: int, source, target):
    """float32 x [N, 128] with the head in lane group `source` moved to group `target` and zeros in the other lanes."""
    if dim >= LANES:
        return x
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) // dim
    x = jnp.where(lane == source, x, 0.0)
    shift = lax.rem((target - source) * dim + LANES, LANES)
    return pltpu.roll(x, shift, 1)


def as_column(row):
    """[1, N] as [N, 128], every lane equal."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def wide(column, size: int):
    """[N, 128] with equal lanes as [N, size]."""
    if size <= LANES:
        return column[:, :size]
    return jnp.concatenate([column] * (size // LANES), axis=1)


def product(a, b, dims: str):
    """Matrix product with float32 sums; `dims` is 'nn', 'nt' (b transposed) or 'tn' (a transposed)."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[dims]
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def finite(x):
    """x with zeros for what is not finite: a tile's masked rows may hold anything."""
    y = x.astype(jnp.float32)
    return jnp.where(jnp.abs(y) < jnp.inf, y, 0.0).astype(x.dtype)


def sweep(whole, step: Callable[[int, bool], None], extent: int, size: int) -> None:
    """`step(at, masked)` for each piece of a tile; a tile that is wholly visible goes without the token mask."""
    for masked, chosen in ((False, whole), (True, jnp.logical_not(whole))):

        @pl.when(chosen)
        def _(masked=masked):
            for at in range(0, extent, size):
                step(at, masked)


@dataclasses.dataclass(frozen=True)
class Scope:
    """What decides who reads what in a tile, beside causality.

    Attributes:
      rows, keys: position of the tile's first row and key.
      stop: end of the keys.
      last: end of the rows, where a tile may pass it.
      sink, window: the pattern's numbers.
      limits: expiry and second interval of each key, or None.
      ids: segments of rows and keys, or None.
      places: index of each key in its segment, which sinks count then, or None.
      listed: whether a list brought the tile: then only what the mask leaves out counts. None without lists.
    """

    rows: Any
    keys: Any
    stop: Any
    sink: Any
    window: Any
    last: Any = None
    limits: Any = None
    ids: Any = None
    places: Any = None
    listed: Any = None


def token_mask(c: Config, shape, row_axis: int, s: Scope) -> jax.Array:
    """Who reads what in a tile, bool of `shape`; rows lie along `row_axis`."""
    rows = lax.broadcasted_iota(jnp.int32, shape, row_axis) + s.rows
    keys = lax.broadcasted_iota(jnp.int32, shape, 1 - row_axis) + s.keys
    keep = keys < s.stop
    if not c.dense:
        allow = ((keys if s.places is None else s.places) < s.sink) | (rows - keys < s.window)
        if s.limits is not None:
            allow |= (rows < s.limits[0]) | ((rows >= s.limits[1]) & (rows < s.limits[2]))
        if s.listed is not None:
            allow = allow != (jnp.full(shape, s.listed, jnp.int32) > 0)
        keep &= allow
    if c.causal:
        keep &= keys <= rows
    if s.ids is not None:
        keep &= s.ids[0] == s.ids[1]
    return keep if s.last is None else keep & (rows < s.last)


def streamed(source: Callable, chunk, sem, entry, wanted, first):
    """Entry `entry` of a stream in HBM whose chunk `source(n)` is copied to scalar memory when it is entered.

    Entries are asked for in ascending order; `first` marks the first one, `wanted` is whether there is one at all.
    """
    size = chunk.shape[1]
    entry = jnp.where(wanted, entry, 0)
    place = lax.rem(entry, size)

    @pl.when(wanted & ((place == 0) | first))
    def _():
        copy = pltpu.make_async_copy(source(lax.div(entry, size)), chunk, sem)
        copy.start()
        copy.wait()

    return chunk[0, place]


def scores(c: Config, a, b):
    """(base-2 scores of pre-scaled operands, slope of the soft cap or None)."""
    s = product(a, b, "nt")
    if c.soft_cap is None:
        return s, None
    t = jnp.tanh(s)
    return t * (c.soft_cap * LOG2E), 1.0 - t * t


def prescale(c: Config) -> float:
    """What one operand is multiplied with, so that `scores` needs no multiplication per score."""
    return c.scale * LOG2E if c.soft_cap is None else c.scale / c.soft_cap
