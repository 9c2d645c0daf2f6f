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
    """Static facts of a call, in the kernels' terms."""

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
    packed: bool
    limits: bool
    tables_batch: int
    vmem_bytes: int

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
    optional = dict.fromkeys(("q_ids", "k_ids", "packed", "limits"))
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


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A pattern's scalars for one tile."""

    keys: Any
    sink: Any
    window: Any


def token_mask(c: Config, shape, row_axis: int, origin, n: Numbers, limits, ids, stop=None) -> jax.Array:
    """Who reads what in a tile whose first row and key are `origin`; rows at `stop` and beyond do not exist."""
    rows = lax.broadcasted_iota(jnp.int32, shape, row_axis) + origin[0]
    keys = lax.broadcasted_iota(jnp.int32, shape, 1 - row_axis) + origin[1]
    keep = keys < n.keys
    if not c.dense:
        allow = (keys < n.sink) | (rows - keys < n.window)
        if limits is not None:
            allow |= (rows < limits[0]) | ((rows >= limits[1]) & (rows < limits[2]))
        keep &= allow
    if c.causal:
        keep &= keys <= rows
    if ids is not None:
        keep &= ids[0] == ids[1]
    return keep if stop is None else keep & (rows < stop)


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
