"""Rows hold every pair once, documents never touch, and padding carries no weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcjax.data.packing import first_fit, pairs, render


def pieces_of(sizes: list[int]) -> list[np.ndarray]:
    starts = np.cumsum([0, *[n + 1 for n in sizes]])
    return [np.arange(start, start + n + 1, dtype=np.int32) for start, n in zip(starts, sizes, strict=False)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_first_fit_keeps_every_piece_and_no_row_overflows(sizes):
    rows = first_fit(pieces_of(sizes), 16)
    assert all(sum(map(pairs, row)) <= 16 for row in rows)
    assert sorted(piece[0] for row in rows for piece in row) == sorted(piece[0] for piece in pieces_of(sizes))
    # First-fit decreasing never needs more than 11/9 of the best possible count, and 1 more.
    assert len(rows) <= 11 / 9 * max(1, sum(sizes) / 16) + 1 + sum(s > 8 for s in sizes)


def test_render():
    row = render([np.array([5, 6, 7, 8]), np.array([1, 2])], 6, pad_id=9)
    np.testing.assert_array_equal(row["inputs"], [5, 6, 7, 1, 9, 9])
    np.testing.assert_array_equal(row["targets"], [6, 7, 8, 2, 9, 9])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(row["segment_ids"], [1, 1, 1, 2, 0, 0])
    np.testing.assert_array_equal(row["loss_weights"], [1, 1, 1, 1, 0, 0])
    assert {name: value.dtype for name, value in row.items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "positions": np.int32,
        "segment_ids": np.int32,
        "loss_weights": np.float32,
    }


def test_joined_pieces_are_one_text():
    """The separator, 0, ends a document as a target and begins the next as an input; 4 goes on from a row before."""
    row = render([np.array([0, 5, 6, 0]), np.array([0, 7, ~0]), np.array([4, 8, 0])], 9, pad_id=9, separator=0)
    np.testing.assert_array_equal(row["inputs"], [0, 5, 6, 0, 7, 0, 8, 9, 9])
    np.testing.assert_array_equal(row["targets"], [5, 6, 0, 7, 0, 8, 0, 9, 9])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 4, 5, 6, 0, 0])
    np.testing.assert_array_equal(row["segment_ids"], [1, 1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(row["loss_weights"], [1, 1, 1, 1, 0, 1, 1, 0, 0])


@pytest.mark.parametrize("length", [1, 7])
def test_render_empty_row_is_padding(length):
    row = render([], length, pad_id=3)
    assert not row["segment_ids"].any()
    assert not row["loss_weights"].any()
    assert (row["inputs"] == 3).all()
