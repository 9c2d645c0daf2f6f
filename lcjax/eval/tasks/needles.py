"""RULER's eight needle tasks (Hsieh et al., 2024, arXiv 2404.06654), in our wording: needles with magic values in noise
lines, in an essay, or among other needles."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from lcjax.eval.budget import Draft
from lcjax.eval.haystack import at_depths, insert_at
from lcjax.eval.tasks.base import GeneratedTask, haystack_facts, spread_depths
from lcjax.eval.words import FILLER, compound, digits, distinct, listing, uuid

type Straw = Literal["noise", "essay", "needles"]

_DRAW = {"word": compound, "uuid": uuid, "number": lambda rng: digits(rng, 7)}
_KIND = {"word": "word", "uuid": "code", "number": "number"}


@dataclass(frozen=True, kw_only=True)
class Needle(GeneratedTask):
    """Find the values of one or more keys.

    `keys` keys with `values` values each are hidden, and `queries` of the keys are asked for. A unit is a word of the
    essay, or a line of the other kinds. Score: share of the values that the answer holds.
    """

    straw: Straw = "essay"
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: Literal["word", "uuid"] = "word"
    value_kind: Literal["number", "uuid"] = "number"

    kind: ClassVar[str] = "needle"

    @property
    def least(self) -> int:
        """As many places as needles."""
        return 0 if self.straw == "essay" else self.keys * self.values

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The needles among `units` words or lines, then the question."""
        keys = distinct(_DRAW[self.key_kind](rng) for _ in iter(int, 1))
        values = distinct(_DRAW[self.value_kind](rng) for _ in iter(int, 1))
        pairs = {next(keys): [next(values) for _ in range(self.values)] for _ in range(self.keys)}
        needles = [self._needle(key, value) for key, hidden in pairs.items() for value in hidden]
        order = Random("needles")
        order.shuffle(needles)
        asked = rng.sample(sorted(pairs), self.queries)
        references = tuple(value for key in asked for value in pairs[key])
        if self.straw == "essay":
            haystack = self.text()
            depths = spread_depths(rng, len(needles))
            straw = haystack.take_words(units, haystack.random_start(rng))
            facts = haystack_facts(haystack, depths=depths)
            context = " ".join(insert_at(straw, needles, at_depths(straw, depths)))
        else:
            other: list[str] = [" ".join(FILLER)] * units
            if self.straw == "needles":
                drawn = (_DRAW[self.key_kind](rng) for _ in iter(int, 1))
                decoys = (key for key in drawn if key not in pairs)
                other = [self._needle(next(decoys), next(values)) for _ in range(units)]
            places = sorted(rng.sample(range(units + 1), len(needles)))
            facts = {"depths": [place / max(units, 1) for place in places]}
            context = "\n".join(insert_at(other, needles, places))
        kind = _KIND[self.value_kind] + ("s" if len(references) > 1 else "")
        verb = "are" if len(references) > 1 else "is"
        body = (
            f"The text below hides secret {kind}. Remember them: you will be asked afterwards.\n\n{context}\n\n"
            f"What {verb} the secret {kind} of {listing(asked)} in the text above?"
        )
        prefix = f"The secret {kind} of {listing(asked)} in the text {verb}"
        if len(references) == 1:  # several answers lie at several depths
            facts["depth"] = facts["depths"][next(j for j, needle in enumerate(needles) if references[0] in needle)]
        return Draft(body, references, 128, prefix, metadata=facts)

    def _needle(self, key: str, value: str) -> str:
        return f"One secret {_KIND[self.value_kind]} of {key} is {value}."


@dataclass(frozen=True, kw_only=True)
class NiahSingle1(Needle):
    """One number in noise lines."""

    straw: Straw = "noise"
    kind: ClassVar[str] = "niah_single_1"


@dataclass(frozen=True, kw_only=True)
class NiahSingle2(Needle):
    """One number in an essay."""

    kind: ClassVar[str] = "niah_single_2"


@dataclass(frozen=True, kw_only=True)
class NiahSingle3(Needle):
    """One UUID in an essay."""

    value_kind: Literal["number", "uuid"] = "uuid"
    kind: ClassVar[str] = "niah_single_3"


@dataclass(frozen=True, kw_only=True)
class NiahMultikey1(Needle):
    """Four keys in an essay, one asked for."""

    keys: int = 4
    kind: ClassVar[str] = "niah_multikey_1"


@dataclass(frozen=True, kw_only=True)
class NiahMultikey2(Needle):
    """One key among lines that are all needles."""

    straw: Straw = "needles"
    kind: ClassVar[str] = "niah_multikey_2"


@dataclass(frozen=True, kw_only=True)
class NiahMultikey3(Needle):
    """The same with UUIDs as keys and values."""

    straw: Straw = "needles"
    key_kind: Literal["word", "uuid"] = "uuid"
    value_kind: Literal["number", "uuid"] = "uuid"
    kind: ClassVar[str] = "niah_multikey_3"


@dataclass(frozen=True, kw_only=True)
class NiahMultivalue(Needle):
    """One key with four values in an essay."""

    values: int = 4
    kind: ClassVar[str] = "niah_multivalue"


@dataclass(frozen=True, kw_only=True)
class NiahMultiquery(Needle):
    """Four keys in an essay, all asked for."""

    keys: int = 4
    queries: int = 4
    kind: ClassVar[str] = "niah_multiquery"
