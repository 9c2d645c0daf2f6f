"""What each tile visits, as small int32 tables that the Hopper kernels read.

Row tables drive the forward and dQ kernels (one row per batch, pattern and tile of queries), column tables the dK/dV
kernel (one row per batch, pattern and tile of keys). Their size is patterns x tiles.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.op import Unsupported
from pallas_kernels.plan import Plan

UNIT = 64  # keys per entry of a list; tiles of keys are one or two units

# Columns of a row table, in tokens unless named otherwise.
SINK_STEPS, LIST_LEN, WINDOW_STEPS, LIST_LOW, WINDOW_BEGIN, SINK_STOP, SINK, WINDOW, KEY_STOP, OFFSET = range(10)
# Columns of a column table; rows are counted from the call's first query.
STEPS_1, BEGIN_1, STEPS_2, BEGIN_2, FULL_STOP, FULL_2_START, FULL_2_STOP, C_SINK, C_WINDOW, C_KEY_STOP, C_OFFSET = (
    range(11)
)
COLUMN_FIELDS = 11


class Lists(NamedTuple):
    """Key units beyond sink and window, per pattern or, for run-time lists, per batch, head and row tile.

    units: [..., n] unit index (cdiv(S, UNIT) for padding); full: first row position that no longer reads all its keys.
    """

    units: Int[Array, ...]
    full: Int[Array, ...]


class Rules(NamedTuple):
    """Token rules of columns, per key unit: expiry and an optional later interval of rows."""

    expiry: Int[Array, "P n"] | None
    start: Int[Array, "P n"] | None
    stop: Int[Array, "P n"] | None


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def in_units(plan: Plan, keys: int) -> Plan:
    """The same plan with columns counted in key units."""
    if plan.expiry is None and plan.second is None:
        return dataclasses.replace(plan, block_k=UNIT)
    if plan.block_k % UNIT:
        raise Unsupported(
            f"the mask counts columns in blocks of {plan.block_k} keys; the kernel needs a multiple of {UNIT}"
        )
    times, units = plan.block_k // UNIT, cdiv(keys, UNIT)
    widen = lambda x: None if x is None else jnp.repeat(jnp.asarray(x), times, axis=1)[:, :units]
    if isinstance(plan.sink, np.ndarray):
        widen = lambda x: None if x is None else np.repeat(np.asarray(x), times, axis=1)[:, :units]
    return dataclasses.replace(plan, block_k=UNIT, expiry=widen(plan.expiry), second=widen(plan.second))


def rules(plan: Plan) -> Rules:
    if plan.expiry is None and plan.second is None:
        return Rules(None, None, None)
    zero = jnp.zeros_like(jnp.asarray(plan.second)[..., 0] if plan.expiry is None else jnp.asarray(plan.expiry))
    expiry = zero if plan.expiry is None else jnp.asarray(plan.expiry)
    if plan.second is None:
        return Rules(expiry, None, None)
    second = jnp.asarray(plan.second)
    return Rules(expiry, second[..., 0], second[..., 1])


def row_table(
    plan: Plan, rows: int, keys: int, tile_q: int, tile_k: int, offset: Int[Array, " B"], kv_length: Int[Array, " B"]
) -> tuple[Int[Array, "B P nQ F"], Lists | None]:
    """Forward schedule: steps of `tile_k` keys over sink and window, and the run of listed units between them.

    `plan` counts columns in units. Positions of row r of batch b are `offset[b] + r`.
    """
    runs = plan.row_runs(max(rows, keys) + rows, keys, tile_q, UNIT)
    count = cdiv(rows, tile_q)
    first = offset[:, None, None] + tile_q * jnp.arange(count, dtype=jnp.int32)
    last = offset[:, None, None] + jnp.minimum(tile_q * jnp.arange(1, count + 1, dtype=jnp.int32), rows) - 1
    pattern = jnp.arange(plan.num_patterns, dtype=jnp.int32)[None, :, None]
    shape = (offset.shape[0], plan.num_patterns, count)
    sinks, low, listed, begin, width = (jnp.broadcast_to(x, shape) for x in runs.run(pattern, first, last))
    key_stop = jnp.broadcast_to(kv_length[:, None, None], shape)
    units_stop = (key_stop + UNIT - 1) // UNIT
    sinks = jnp.minimum(sinks, units_stop)
    width = jnp.clip(units_stop - begin, 0, width)
    per = tile_k // UNIT
    fields = [
        (sinks + per - 1) // per,
        listed,
        (width + per - 1) // per,
        low,
        begin * UNIT,
        jnp.minimum(sinks * UNIT, key_stop),
        jnp.broadcast_to(jnp.asarray(plan.sink)[:, None], shape),
        jnp.broadcast_to(jnp.asarray(plan.window)[:, None], shape),
        key_stop,
        jnp.broadcast_to(offset[:, None, None], shape),
    ]
    table = jnp.stack([jnp.asarray(f, jnp.int32) for f in fields], axis=-1)
    if runs.packed is None:
        return table, None
    units = cdiv(keys, UNIT)
    packed = jnp.asarray(runs.packed)
    columns = plan.columns(keys, UNIT)
    full = jnp.take_along_axis(jnp.asarray(columns.full_end), jnp.minimum(packed, units - 1), axis=1)
    return table, Lists(packed, jnp.where(packed < units, full, 0))


def column_table(
    plan: Plan, rows: int, keys: int, tile_q: int, tile_k: int, offset: Int[Array, " B"], kv_length: Int[Array, " B"]
) -> Int[Array, "B P nK F"]:
    """dK/dV schedule: one or two runs of `tile_q` rows for every tile of `tile_k` keys."""
    columns = plan.columns(keys, tile_k)
    count = cdiv(keys, tile_k)
    key = tile_k * jnp.arange(count, dtype=jnp.int32)
    shape = (offset.shape[0], plan.num_patterns, count)
    off = offset[:, None, None]
    live = key < kv_length[:, None, None]
    least = jnp.maximum(key - off, 0) if plan.causal else jnp.zeros(shape, jnp.int32)
    stop = jnp.clip(jnp.asarray(columns.end)[None], 0, off + rows) - off
    tiles = cdiv(rows, tile_q)
    begin_1 = jnp.minimum(least // tile_q, tiles)
    end_1 = jnp.maximum((stop + tile_q - 1) // tile_q, begin_1)
    end_1 = jnp.where(live & (stop > least), end_1, begin_1)
    none = jnp.zeros(shape, jnp.int32)
    begin_2, end_2, full_start, full_stop = none, none, none, none
    if columns.second is not None:
        second = jnp.clip(jnp.asarray(columns.second)[None], 0, off[..., None] + rows) - off[..., None]
        begin_2 = jnp.maximum(jnp.maximum(second[..., 0], least) // tile_q, end_1)
        end_2 = jnp.where(live, jnp.maximum((second[..., 1] + tile_q - 1) // tile_q, begin_2), begin_2)
        full_start = jnp.broadcast_to(jnp.asarray(columns.full_second)[None, ..., 0], shape)
        full_stop = jnp.broadcast_to(jnp.asarray(columns.full_second)[None, ..., 1], shape)
    fields = [
        end_1 - begin_1,
        begin_1,
        end_2 - begin_2,
        begin_2,
        jnp.asarray(columns.full_end)[None],
        full_start,
        full_stop,
        jnp.asarray(plan.sink)[None, :, None],
        jnp.asarray(plan.window)[None, :, None],
        kv_length[:, None, None],
        off,
    ]
    return jnp.stack([jnp.broadcast_to(jnp.asarray(f, jnp.int32), shape) for f in fields], axis=-1)
