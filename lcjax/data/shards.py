"""One logical shard: endless packed rows, and a state of a few integers.

The state is where the current window of rows began and how many of its rows are out; a restored shard makes that
window again.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import grain
import numpy as np

from lcjax.data import packing
from lcjax.data.documents import Document
from lcjax.data.sources import DataError
from lcjax.data.spec import DataSpec
from lcjax.data.tokenizers.base import Tokenizer

Batch = dict[str, np.ndarray]
"""`inputs`, `targets`, `positions`, `segment_ids` int32[B,T] and `loss_weights` float32[B,T]; a row has no B."""


def seed_of(*parts: Any) -> int:
    """A 32-bit seed from anything with a fixed `repr`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4])


@dataclass(frozen=True)
class Stream:
    """Endless documents of one source and bucket in one shard: the n-th text, and the share of the tokens."""

    documents: Any
    count: int
    share: float
    name: str


class ShardRows(grain.IterDataset):
    """The rows of one logical shard, without end."""

    def __init__(self, streams: Sequence[Stream], spec: DataSpec, tokenizer: Tokenizer, length: int, shard: int):
        super().__init__()
        self.streams = streams
        self.spec = spec
        self.length = length
        self.shard = shard
        self.pad_id = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
        self.separator = None if spec.separator is None else _one_token(spec.separator, tokenizer)
        first, last = _ends(spec, tokenizer) if self.separator is None else ([self.separator], [self.separator])
        encode = functools.partial(tokenizer.encode, special=spec.parse_special)
        self.tokenize = lambda text: Document(text, encode, first, last)

    def __iter__(self) -> "ShardIterator":
        return ShardIterator(self)


def _ends(spec: DataSpec, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after every document that stands for itself."""
    add_bos = tokenizer.adds_bos if spec.add_bos is None else spec.add_bos
    last = [tokenizer.eos_id] if spec.add_eos and tokenizer.eos_id is not None else []
    return tokenizer.encode("", add_bos=add_bos), last


def _one_token(text: str, tokenizer: Tokenizer) -> int:
    """The id of the separator."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise DataError(f"DataSpec.separator {text!r} is {len(ids)} tokens of this tokenizer: name a single one")
    return ids[0]


class _Cursor:
    """Where each stream of a shard stands; takes pieces by token share.

    An entry is `[document, part, offset, pairs taken of the document, pairs taken in all]`.
    """

    def __init__(self, rows: ShardRows, at: list[list[int]], open_documents: dict[int, tuple[int, Document]]):
        self._rows = rows
        self._open = open_documents
        self.at = [list(entry) for entry in at]
        # Shards start at different phases, or the first rows of all of them would come from one source.
        phase = np.random.default_rng(seed_of(rows.spec.seed, rows.shard, "phase")).random(len(rows.streams))
        self._phase = phase * rows.length

    def take(self, room: int) -> np.ndarray:
        """The next piece, of at most `room` pairs, from the stream that is furthest behind its share."""
        streams = self._rows.streams
        behind = [(at[4] + phase) / s.share for at, phase, s in zip(self.at, self._phase, streams, strict=True)]
        chosen = int(np.argmin(behind))
        at, source = self.at[chosen], streams[chosen]
        for _ in range(source.count + 1):
            document = self._document(chosen)
            piece = self._piece(document, at, room)
            got = packing.pairs(piece)
            if got > 0:
                at[1:] = [*document.move(at[1], at[2], got), at[3] + got, at[4] + got]
            if got < room:
                at[:4] = [at[0] + 1, 0, 0, 0]
            if got > 0:
                return piece
        policy = self._rows.spec.long_documents
        raise DataError(
            f"{source.name} has no document that makes a row of {self._rows.length} (long_documents={policy!r})"
        )

    def _document(self, stream: int) -> Document:
        number = self.at[stream][0]
        if stream not in self._open or self._open[stream][0] != number:
            text = self._rows.streams[stream].documents[number]
            self._open[stream] = (number, self._rows.tokenize(text))
        return self._open[stream][1]

    def _piece(self, document: Document, at: list[int], room: int) -> np.ndarray:
        """The ids from the stream's place on; none where the policy for long documents says so."""
        _, part, offset, taken, _ = at
        length = self._rows.length
        if self._rows.spec.long_documents == "truncate":
            room = min(room, length - taken)
        if self._rows.spec.long_documents == "skip" and taken == 0:
            room = 0 if packing.pairs(document.ids(0, 0, length + 2)) > length else room
        return document.ids(part, offset, room + 1)


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
        self._state: ShardState = {"window": 0, "row": 0, "at": [[0] * 5 for _ in rows.streams]}
        self._open: dict[int, tuple[int, Document]] = {}  # the document that each stream is in
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
        return packing.render(row, self._set.length, self._set.pad_id, self._set.separator)

    def _make(self) -> None:
        """The rows of the current window, in their order of output."""
        spec, length = self._set.spec, self._set.length
        cursor = _Cursor(self._set, self._state["at"], self._open)
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
        self._open = {}


def _full_row(cursor: _Cursor, length: int) -> packing.Row:
    row: packing.Row = []
    room = length
    while room:
        row.append(cursor.take(room))
        room -= packing.pairs(row[-1])
    return row
