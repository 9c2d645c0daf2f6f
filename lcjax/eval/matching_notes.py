"""Made-up notes on where things are kept, and questions that one of them answers: ranking data of our own."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from lcjax.data.made import MadeTexts
from lcjax.data.ranking import Candidates
from lcjax.eval.words import ADJECTIVES, FILLER, NOUNS, made_up


@dataclass(frozen=True)
class MatchingNotes:
    """A `lcjax.data` source of `count` questions with `documents` notes each, one of them the answer.

    The others share the thing or the owner asked for, never both. filler: most sentences that say nothing, a note.
    """

    count: int = 10_000
    documents: int = 8
    filler: int = 2
    seed: int = 1
    split: str = "train"

    def __post_init__(self):
        if self.count < 1 or self.documents < 1 or self.filler < 0:
            raise ValueError(
                f"MatchingNotes: count {self.count} and documents {self.documents} must be positive, filler "
                f"{self.filler} not negative"
            )

    def open(self, data_dir: str | Path) -> "_Notes":
        """The examples, made as they are read; nothing is written to `data_dir`."""
        del data_dir
        return _Notes(self)


class _Notes(MadeTexts):
    """Of `Candidates`."""

    def __init__(self, source: MatchingNotes):
        self._source = source
        super().__init__(source.count, str(source))

    def text(self, index: int) -> str:
        source = self._source
        rng = Random(f"{source.seed}-{source.split}-{index}")
        thing, owner = _thing(rng), made_up(rng).capitalize()
        others = []
        while len(others) < source.documents - 1:
            other, person = (_thing(rng), owner) if len(others) % 2 else (thing, made_up(rng).capitalize())
            if (other, person) != (thing, owner):
                others.append(self._note(rng, other, person))
        query = f"Where is the {thing} of {owner} kept?"
        return Candidates(query, (self._note(rng, thing, owner),), tuple(others)).text()

    def _note(self, rng: Random, thing: str, owner: str) -> str:
        sentences = [rng.choice(FILLER) for _ in range(rng.randint(0, self._source.filler))]
        sentences.insert(rng.randint(0, len(sentences)), f"The {thing} of {owner} is kept behind the {_thing(rng)}.")
        return " ".join(sentences)


def _thing(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
