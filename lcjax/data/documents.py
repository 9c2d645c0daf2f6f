"""Documents tokenised as far as they are read, so that a book costs nothing before its pages are due."""

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

PART = 1 << 16
"""Characters of a document that are tokenised together."""

_SEARCH = 4096
# The best places first. Between a word and the space of the next a cut changes no ids for the usual tokenizers.
_BORDERS = (re.compile(r"(?<=\w)(?= \w)"), re.compile(r"(?<=\S)(?=\s)"))


class Scored(str):
    """A text of which only the characters from `begin` on are trained on; what is before them is read."""

    begin: int

    def __new__(cls, text: str, begin: int) -> "Scored":
        """Raises ValueError when the text has no such place."""
        if not 0 <= begin <= len(text):
            raise ValueError(f"Scored: begin is {begin}, the text has {len(text)} characters")
        made = super().__new__(cls, text)
        made.begin = begin
        return made


def border(text: str, low: int, high: int) -> int:
    """The best place to cut a text in low..high: late and between words, or `high` where there is none."""
    low = max(low, high - _SEARCH)
    places = ([m.start() for m in pattern.finditer(text, low, high)] for pattern in _BORDERS)
    return next((found[-1] for found in places if found), high)


def cuts(text: str, size: int = PART) -> list[int]:
    """Where a text is cut into parts of at most `size` characters, from 0 to its length."""
    borders = [0]
    while len(text) - borders[-1] > size:
        borders.append(border(text, borders[-1] + 1, borders[-1] + size))
    return [*borders, len(text)]


class Document:
    """One text as ids, part by part; a place in it is `(part, offset)`.

    Parts are tokenised apart, and `first` and `last` stand around the whole. A text of at most `PART` characters is
    one part. Ids that are not trained on (`Scored`) are given as their complement, ~id, which is negative.
    """

    def __init__(self, text: str, encode: Callable[[str], Sequence[int]], first: list[int], last: list[int]):
        begin = text.begin if isinstance(text, Scored) else 0
        tail = [begin + place for place in cuts(text[begin:])]
        borders = [*(cuts(text[:begin])[:-1] if begin else []), *tail]
        self._texts = [text[low:high] for low, high in itertools.pairwise(borders)]
        self._read = len(borders) - len(tail)  # parts that are not trained on
        self._encode = encode
        self._first, self._last = first, last
        self._ids: dict[int, np.ndarray] = {}

    def _part(self, part: int) -> np.ndarray:
        if part not in self._ids:
            ids = list(self._encode(self._texts[part]))
            first = self._first if part == 0 else []
            last = self._last if part == len(self._texts) - 1 else []
            found = np.asarray([*first, *ids, *last], np.int32)
            self._ids[part] = ~found if part < self._read else found
        return self._ids[part]

    def ids(self, part: int, offset: int, count: int) -> np.ndarray:
        """Up to `count` ids from a place on; fewer only at the document's end."""
        found: list[np.ndarray] = []
        while count > 0 and part < len(self._texts):
            found.append(self._part(part)[offset : offset + count])
            count -= len(found[-1])
            part, offset = part + 1, 0
        return np.concatenate(found) if len(found) != 1 else found[0]

    def move(self, part: int, offset: int, count: int) -> tuple[int, int]:
        """The place `count` ids further on, which must lie in the document; what lies before it is let go."""
        offset += count
        while offset >= len(self._part(part)):
            offset -= len(self._part(part))
            part += 1
        for done in [number for number in self._ids if number < part]:
            del self._ids[done]
        return part, offset
