"""The copy-recall probe: a passage of one text is planted in another and begins again at the end.

A model with working long-range attention goes on copying; a small model that answers no question still shows this.
`plants` are token rows for teacher-forced scoring (`lcjax.eval.copy_recall`); `CopyRecall` has the copy decoded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import numpy as np

from lcjax.eval.budget import BudgetError, Draft, Encoder
from lcjax.eval.haystack import read_text
from lcjax.eval.task import Example
from lcjax.eval.tasks.base import GeneratedTask, haystack_facts

PASSAGE = 64
CUE = 16
SCORED = PASSAGE - CUE
_CHARACTERS = 1_500_000
_LONGEST = 32 * PASSAGE  # characters that surely hold a passage
_BLANK_LINE = re.compile(r"\n\s*\n")


def plants(
    tokenizer: Encoder, length: int, *, count: int, filler: str, passages: str, depth: float = 0.25, seed: int = 0
) -> np.ndarray:
    """Token rows [count, length]: filler with a passage of 64 tokens at `depth` between blank lines, then the passage.

    Score the last 48 tokens of a row; the 16 before are the cue. `filler` and `passages` are as in `read_text`. Filler
    begins anywhere, a passage where a paragraph does: in the middle of a sentence it would be harder to go on with.
    Raises BudgetError for rows too short, ValueError for passages without 64 tokens.
    """
    book, other = tokenizer.encode(_text(filler)), _text(passages)
    starts = [0, *(found.end() for found in _BLANK_LINE.finditer(other))]
    starts = [start for start in starts if start <= max(len(other) - _LONGEST, 0)]
    gap = list(tokenizer.encode("\n\n"))
    room = length - 2 * PASSAGE - 3 * len(gap)
    if room < 1:
        raise BudgetError(f"copy_recall needs more than {length} tokens: passages and blank lines take {length - room}")
    rows = np.empty((count, length), np.int32)
    for i in range(count):
        rng = Random(f"copy_recall-{seed}-{i}")
        start = rng.choice(starts)
        passage = list(tokenizer.encode(other[start : start + _LONGEST]))[:PASSAGE]
        if len(passage) < PASSAGE:
            raise ValueError(f"copy_recall: {passages!r} has {len(passage)} tokens; a passage takes {PASSAGE}")
        straw = _slice(book, rng, room)
        before = int(depth * room)
        rows[i] = [*straw[:before], *gap, *passage, *gap, *straw[before:], *gap, *passage]
    return rows


def _text(source: str) -> str:
    return read_text(source)[:_CHARACTERS]


def _slice(ids: Sequence[int], rng: Random, count: int) -> list[int]:
    """`count` consecutive ids from a random place; the text repeats where it is too short."""
    start = rng.randrange(len(ids))
    return [ids[(start + i) % len(ids)] for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class CopyRecall(GeneratedTask):
    """Go on with a passage of the text after its first words. A unit is a word of filler.

    Score: the share of the continuation, from its start on, that is copied without a slip.
    """

    words: int = 48
    cue: int = 12
    kind: ClassVar[str] = "copy_recall"

    @property
    def least(self) -> int:
        """The passage alone."""
        return 0

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The passage at a quarter of the filler, then its first words again."""
        haystack = self.text()
        passage = " ".join(haystack.take_words(self.words, haystack.random_start(rng))).split()
        filler = " ".join(haystack.take_words(units, haystack.random_start(rng))).split()
        quarter = len(filler) // 4
        parts = (" ".join(filler[:quarter]), " ".join(passage), " ".join(filler[quarter:]))
        cue, rest = " ".join(passage[: self.cue]), " ".join(passage[self.cue :])
        facts = haystack_facts(haystack, depth=0.25)
        return Draft("\n\n".join(part for part in parts if part) + "\n", (rest,), 64, cue, rest, facts)

    def score(self, example: Example, text: str) -> float:
        """Common prefix over the reference's length, in words."""
        said, wanted = text.split(), example.references[0].split()
        same = 0
        while same < min(len(said), len(wanted)) and said[same] == wanted[same]:
            same += 1
        return same / len(wanted)
