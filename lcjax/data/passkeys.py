"""Documents that hide pass keys and end in questions about them: what DuoAttention learns its gates on."""

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lcjax.data.documents import Scored
from lcjax.data.made import MadeTexts
from lcjax.data.sources import Corpus, DataError, Source

ALPHABET = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india",
    "juliett", "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo",
    "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
DEPTHS = 1000  # places between 5 and 95 % of the haystack
LENGTHS = 50  # sizes of a haystack


@dataclass(frozen=True)
class PasskeyDocuments:
    """`count` documents with `keys` pass keys of `words` words in text of `haystack`, and all of them asked for.

    Arrangement as in DuoAttention (arXiv 2410.10819): depths are drawn from 1,000 between 5 and 95 %, sizes from 50
    between `least` and `most` characters (a token is about four), and only the questions and answers at the end are
    trained on. A haystack starts anywhere in its text and goes on through the texts behind it.
    """

    haystack: Source
    count: int = 2000
    keys: int = 10
    words: int = 32
    least: int = 4_000
    most: int = 128_000
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        if not 1 <= self.keys <= len(ORDINALS) or self.words < 1 or self.count < 1:
            raise DataError(
                f"PasskeyDocuments: keys {self.keys} must be 1 to {len(ORDINALS)}, words {self.words} and count "
                f"{self.count} at least 1"
            )
        if not 0 < self.least <= self.most:
            raise DataError(f"PasskeyDocuments: least {self.least} must be positive and at most most {self.most}")

    def open(self, data_dir: str | Path) -> "_Documents":
        """The documents, made as they are read."""
        return _Documents(self, self.haystack.open(data_dir))


class _Documents(MadeTexts):
    def __init__(self, source: PasskeyDocuments, hay: Corpus):
        self._source, self._hay = source, hay
        plain = {name: value for name, value in vars(source).items() if name != "haystack"}
        super().__init__(source.count, f"{plain} {hay.fingerprint}")

    def text(self, index: int) -> Scored:
        source, rng = self._source, Random(f"{self._source.seed}-{index}")
        level = rng.randrange(LENGTHS) / max(LENGTHS - 1, 1)
        text = self._straw(rng, int(source.least + level * (source.most - source.least)))
        keys = [" ".join(rng.choices(ALPHABET, k=source.words)) for _ in range(source.keys)]
        depths = sorted(0.05 + 0.9 * rng.randrange(DEPTHS) / (DEPTHS - 1) for _ in keys)
        facts = [f"The {nth} pass key is: {key}." for nth, key in zip(ORDINALS, keys, strict=False)]
        body = _planted(text, facts, depths)
        asked = [
            f"\n\nQuestion: What is the {nth} pass key?\nAnswer: {fact}"
            for nth, fact in zip(ORDINALS, facts, strict=False)
        ]
        return Scored(body + "".join(asked), len(body))

    def _straw(self, rng: Random, size: int) -> str:
        """Text of the haystack from a random place on."""
        at = rng.randrange(len(self._hay))
        text = self._hay[at]
        text = text[rng.randrange(max(len(text), 1)) :]
        while len(text) < size:
            at = (at + 1) % len(self._hay)
            text += "\n" + self._hay[at]
        return text[:size]


def _planted(text: str, facts: list[str], depths: list[float]) -> str:
    """The text with each fact between two words, near its share of the way through."""
    borders = [i for i, c in enumerate(text) if c.isspace()] or [len(text)]
    places = [borders[min(bisect_left(borders, int(depth * len(text))), len(borders) - 1)] for depth in depths]
    parts, begin = [], 0
    for place, fact in zip(places, facts, strict=True):
        parts += [text[begin:place], f"\n{fact}\n"]
        begin = place
    return "".join([*parts, text[begin:]])
