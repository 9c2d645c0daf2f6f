"""Pieces of documents into rows of one length, with segment ids, positions and loss weights."""

from collections.abc import Sequence

import numpy as np

Row = list[np.ndarray]
"""The pieces of one row; a piece of n + 1 ids makes n (input, target) pairs. An id that is not trained on is stored as
its complement, ~id."""

FIELDS = ("inputs", "targets", "positions", "segment_ids", "loss_weights")


def pairs(piece: np.ndarray) -> int:
    """(input, target) pairs of a piece."""
    return len(piece) - 1


def first_fit(pieces: Sequence[np.ndarray], length: int) -> list[Row]:
    """Rows of at most `length` pairs, longest pieces first, each into the first row with room.

    No piece is cut, so a row may end in padding; with many pieces a row, about 1 % of the tokens.
    """
    order = sorted(range(len(pieces)), key=lambda i: -pairs(pieces[i]))
    rows: list[Row] = []
    room: list[int] = []
    first_open = 0
    for index in order:
        need = pairs(pieces[index])
        at = next((r for r in range(first_open, len(rows)) if room[r] >= need), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(pieces[index])
        room[at] -= need
        while first_open < len(rows) and room[first_open] == 0:
            first_open += 1
    return rows


def render(row: Row, length: int, pad_id: int, separator: int | None = None) -> dict[str, np.ndarray]:
    """One packed row.

    separator: an id with which pieces are joined to one text: every piece after the first begins with it, also one
      that goes on with a document, and all share segment 1.

    Returns:
      `inputs`, `targets`, `positions` (from 0 in every segment), `segment_ids` (1, 2, ...; 0 is padding), all int32[T],
      and `loss_weights` float32[T], 1 on every pair whose target is trained on and 0 elsewhere.
    """
    out: dict[str, np.ndarray] = {name: np.zeros(length, np.int32) for name in FIELDS[:-1]}
    weights = np.zeros(length, np.float32)
    out["inputs"].fill(pad_id)
    out["targets"].fill(pad_id)
    at = begin = 0
    for number, piece in enumerate(row, 1):
        end = at + pairs(piece)
        ids = np.where(piece < 0, ~piece, piece)
        out["inputs"][at:end] = ids[:-1]
        out["targets"][at:end] = ids[1:]
        weights[at:end] = piece[1:] >= 0
        if separator is None:
            begin = at
        elif number > 1:
            out["inputs"][at] = separator
        out["positions"][at:end] = np.arange(at - begin, end - begin)
        out["segment_ids"][at:end] = number if separator is None else 1
        at = end
    return out | {"loss_weights": weights}
