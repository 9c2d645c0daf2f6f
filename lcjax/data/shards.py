"""One logical shard: endless packed rows, and a state of a few integers.

The state is where the current window of rows began and how many of its rows are out; a restored shard makes that
window again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import grain
import numpy as np

from lcjax.data import packing
from lcjax.data.sources import DataError
from lcjax.data.spec import DataSpec

Batch = dict[str, np.ndarray]
"""`inputs`, `targets`, `positions`, `segment_ids` int32[B,T] and `loss_weights` float32[B,T]; a row has no B."""


def seed_of(*parts: Any) -> int:
    """A 32-bit seed from anything with a fixed `repr`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4])


@dataclass(frozen=True)
class Stream:
    """Endless documents of one source and bucket in one shard: ids of the n-th, and its share of the tokens."""

    documents: Any
    count: int
    share: float
    name: str


class ShardRows(grain.IterDataset):
    """The rows of one logical shard, without end."""

    def __init__(self, streams: Sequence[Stream], spec: DataSpec, length: int, shard: int, pad_id: int):
        super().__init__()
        self.streams = streams
        self.spec = spec
        self.length = length
        self.shard = shard
        self.pad_id = pad_id

    def __iter__(self) -> "ShardIterator":
        return ShardIterator(self)


class _Cursor:
    """Where each stream of a shard stands: `[document, offset, tokens taken]`; takes pieces by token share."""

    def __init__(self, rows: ShardRows, at: list[list[int]], cache: dict[int, tuple[int, np.ndarray]]):
        self._rows = rows
        self._cache = cache
        self.at = [list(entry) for entry in at]
        # Shards start at different phases, or the first rows of all of them would come from one source.
        phase = np.random.default_rng(seed_of(rows.spec.seed, rows.shard, "phase")).random(len(rows.streams))
        self._phase = phase * rows.length

    def take(self, room: int) -> np.ndarray:
        """The next piece, of at most `room` pairs, from the stream that is furthest behind its share."""
        streams = self._rows.streams
        behind = [(at[2] + phase) / s.share for at, phase, s in zip(self.at, self._phase, streams, strict=True)]
        chosen = int(np.argmin(behind))
        at = self.at[chosen]
        ids = self._document(chosen)
        limit = packing.pairs(ids)
        piece = ids[at[1] : at[1] + room + 1]
        at[1] += packing.pairs(piece)
        at[2] += packing.pairs(piece)
        if at[1] >= limit:
            at[0], at[1] = at[0] + 1, 0
        return piece

    def _document(self, stream: int) -> np.ndarray:
        """The ids of the stream's current document, passing over those that the policy leaves out."""
        at = self.at[stream]
        source = self._rows.streams[stream]
        policy, length = self._rows.spec.long_documents, self._rows.length
        for _ in range(source.count + 1):
            if self._cache.get(stream, (-1,))[0] != at[0]:
                self._cache[stream] = (at[0], source.documents[at[0]])
            ids = self._cache[stream][1]
            if policy == "truncate":
                ids = ids[: length + 1]
            if len(ids) >= 2 and not (policy == "skip" and packing.pairs(ids) > length):
                return ids
            at[0] += 1
        raise DataError(f"{source.name} has no document that makes a row of {length} (long_documents={policy!r})")


class ShardState(TypedDict):
    """What a shard needs to go on: integers only."""

    window: int
    row: int
    at: list[list[int]]


class ShardIterator(grain.DatasetIterator):
    """State: `window` number, `row` within it, and the cursor `at` the window's start."""

    def __init__(self, rows: ShardRows):
        super().__init__()
        self._set = rows
        self._state: ShardState = {"window": 0, "row": 0, "at": [[0, 0, 0] for _ in rows.streams]}
        self._cache: dict[int, tuple[int, np.ndarray]] = {}  # the document that each stream is in
        self._made: list[packing.Row] | None = None
        self._next: list[list[int]] = []

    def __next__(self) -> Batch:
        if self._made is None:
            self._make()
        rows = self._made or []
        row = rows[self._state["row"]]
        self._state["row"] += 1
        if self._state["row"] == len(rows):
            self._state = {"window": self._state["window"] + 1, "row": 0, "at": self._next}
            self._made = None
        return packing.render(row, self._set.length, self._set.pad_id)

    def _make(self) -> None:
        """The rows of the current window, in their order of output."""
        spec, length = self._set.spec, self._set.length
        cursor = _Cursor(self._set, self._state["at"], self._cache)
        rows: list[packing.Row] = []
        if spec.packing == "pad":
            rows = [[cursor.take(length)] for _ in range(spec.window)]
        elif spec.packing == "split":
            rows = [_full_row(cursor, length) for _ in range(spec.window)]
        else:
            pieces: list[np.ndarray] = []
            missing = spec.window * length
            while missing > 0:
                pieces.append(cursor.take(length))
                missing -= packing.pairs(pieces[-1])
            rows = packing.first_fit(pieces, length)
        if spec.shuffle:
            rng = np.random.default_rng(seed_of(spec.seed, self._set.shard, self._state["window"], "rows"))
            rows = [rows[i] for i in rng.permutation(len(rows))]
        self._made, self._next = rows, cursor.at

    def get_state(self) -> dict[str, Any]:
        return {**self._state, "at": [list(entry) for entry in self._state["at"]]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._state = {"window": state["window"], "row": state["row"], "at": [list(entry) for entry in state["at"]]}
        self._made = None


def _full_row(cursor: _Cursor, length: int) -> packing.Row:
    row: packing.Row = []
    room = length
    while room:
        row.append(cursor.take(room))
        room -= packing.pairs(row[-1])
    return row
