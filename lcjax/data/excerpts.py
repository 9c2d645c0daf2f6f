"""Texts in stretches of varied length, for methods whose documents should not all be as long as a row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcjax.data.documents import Scored, border
from lcjax.data.made import MadeTexts
from lcjax.data.sources import Corpus, DataError, Source

CHARACTER = 4
"""Most UTF-8 bytes of a character."""


@dataclass(frozen=True)
class Excerpts:
    """The texts of `source`, each cut into stretches of log-uniform length from `least` to `most` UTF-8 bytes.

    A token of English is about four bytes; the source does not know the tokenizer. The stretches of a text make it up,
    the last one being what is left, and a text shorter than its first draw stays whole. They end between words, up to
    4,096 characters early. Log-uniform in number is uniform by bytes: stretches of 1 to 2 units hold as much text as
    those of 2 to 3.
    """

    source: Source
    least: int = 16_384
    most: int = 262_144
    seed: int = 0

    def __post_init__(self):
        if not CHARACTER <= self.least <= self.most:
            raise DataError(
                f"Excerpts: least {self.least} must be {CHARACTER} bytes or more, for a character, and not above "
                f"most {self.most}"
            )

    @property
    def split(self) -> str:
        """That of the texts."""
        return self.source.split

    def open(self, data_dir: str | Path) -> "_Excerpts":
        """The stretches, cut as they are read; the texts are prepared under `data_dir` as `source` does it.

        Raises:
          DataError: as `source` does.
        """
        return _Excerpts(self, self.source.open(data_dir))


class _Excerpts(MadeTexts):
    """Keeps where the stretches of every text are planned to end, in bytes; the text says where between words."""

    def __init__(self, source: Excerpts, texts: Corpus):
        self._texts = texts
        self._ends = [_ends(source, number, int(size)) for number, size in enumerate(texts.sizes())]
        self._first = np.cumsum([0, *map(len, self._ends)])  # stretch of every text, and their count
        super().__init__(int(self._first[-1]), f"{source.least} {source.most} {source.seed} {texts.fingerprint}")

    def text(self, index: int) -> str:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        text, ends = self._texts[number], self._ends[number]
        if isinstance(text, Scored):
            raise DataError("Excerpts.source has texts that are trained on in part: read them as they are instead")
        # In characters: one or more a stretch, which has the bytes of any character.
        places = [0, *(end * len(text) // ends[-1] for end in ends)]
        at = index - int(self._first[number])
        return text[_begin(text, places, at) : _begin(text, places, at + 1)]


def _begin(text: str, places: list[int], at: int) -> int:
    """Where a stretch begins: between words, behind the place of the one before."""
    return places[at] if at in (0, len(places) - 1) else border(text, places[at - 1] + 1, places[at])


def _ends(source: Excerpts, number: int, size: int) -> list[int]:
    """Where the stretches of text `number`, of `size` bytes, end."""
    rng = np.random.default_rng([source.seed, number])
    ends: list[int] = []
    at = 0
    while at < size:
        at = min(size, at + int(source.least * (source.most / source.least) ** rng.random()))
        ends.append(at)
    return ends
