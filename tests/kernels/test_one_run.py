"""Masks whose rows each read one run of keys: the run, what all rows of a tile read, and masks that have none."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mosaic_gpu_tables as tables
from pallas_kernels.dual_chunk.masks import chunk_masks
from pallas_kernels.masks import Causal, Intervals, Sink, Stride, Window
from pallas_kernels.one_run import one_run

LENGTH, UNIT = 1300, tables.UNIT
PARTS = [mask for chunk in (64, 192, 320, 1280) for mask in chunk_masks(chunk, LENGTH)]


def made(mask):
    plan = mask.plan(2, LENGTH, LENGTH, 128, UNIT)
    return plan, one_run(plan, LENGTH)


@pytest.mark.parametrize("mask", PARTS, ids=lambda m: None)
@pytest.mark.parametrize("offset", [0, 77])
def test_a_tile_of_rows_visits_what_its_rows_read_and_knows_what_all_read(mask, offset):
    _, one = made(mask)
    assert one is not None
    first = np.arange(0, LENGTH - offset, 128) + offset
    last = np.minimum(first + 128, LENGTH) - 1
    some, every = (f(jnp.asarray(first)[None, None], jnp.asarray(last)[None, None]) for f in (one.any, one.all))
    allowed = np.asarray(mask.to_array(LENGTH, LENGTH))
    for n, (a, b) in enumerate(zip(first, last, strict=True)):
        rows = allowed[a : b + 1]
        read, all_read = (np.flatnonzero(f(rows, axis=0)) for f in (np.any, np.all))
        begin, stop = (int(x[0, 0, n]) for x in some)
        assert not len(read) or (begin == read[0] and min(stop, b + 1) == read[-1] + 1)
        begin, stop = (int(x[0, 0, n]) for x in every)
        assert begin + len(all_read) == max(min(stop, a + 1, LENGTH), begin)
        assert not len(all_read) or all_read[0] == begin


@pytest.mark.parametrize("mask", PARTS, ids=lambda m: None)
def test_tables_visit_what_is_read_and_spare_only_whole_tiles_the_mask(mask):
    plan, one = made(mask)
    plan, seen = tables.in_units(plan, LENGTH), np.asarray(mask.to_array(LENGTH, LENGTH))
    sizes = LENGTH, LENGTH, UNIT, jnp.zeros(1, int), jnp.asarray([LENGTH]), None
    row_table, lists = tables.row_table(plan, *sizes, one)
    assert lists is None
    for n, row in enumerate(np.asarray(row_table)[0, 0]):
        rows = seen[n * 128 : (n + 1) * 128]
        first, steps = row[tables.WINDOW_BEGIN] // UNIT, row[tables.WINDOW_STEPS]
        needed = {j for j in range(-(-LENGTH // UNIT)) if rows[:, j * UNIT : (j + 1) * UNIT].any()}
        assert needed == set(range(first, first + steps))
        whole = range(first + row[tables.INNER], first + row[tables.INNER] + row[tables.INNER_STEPS])
        assert set(whole) == {
            j for j in needed if rows[:, j * UNIT : (j + 1) * UNIT].all() and (j + 1) * UNIT <= LENGTH
        }
    for n, row in enumerate(np.asarray(tables.column_table(plan, *sizes))[0, 0][: LENGTH // UNIT]):
        keys = seen[:, n * UNIT : (n + 1) * UNIT]
        needed = {i for i in range(-(-LENGTH // UNIT)) if keys[i * UNIT : (i + 1) * UNIT].any()}
        own = [(tables.OWN_1, tables.OWN_END_1), (tables.OWN_2, tables.OWN_END_2)]
        assert needed == {i for begin, end in own for i in range(row[begin], row[end])}
        whole = set(range(row[tables.C_INNER], row[tables.C_INNER_END]))
        assert whole == {i for i in needed if (i + 1) * UNIT <= LENGTH and keys[i * UNIT : (i + 1) * UNIT].all()}


STARTS = np.arange(-(-LENGTH // UNIT)) * UNIT


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal() & (Sink(64) | Window(128)),
        Causal() & Stride(block=64, every=4),
        Causal() & Intervals(64, 0 * STARTS, np.stack([900 - STARTS // 2, 0 * STARTS + 1200], -1)),  # begins shrink
    ],
    ids=["causal", "window", "stride", "older keys come later"],
)
def test_other_masks_have_no_single_run(mask):
    assert made(mask)[1] is None
