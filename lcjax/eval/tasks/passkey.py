"""Passkey retrieval by length and depth: a number hidden in dull text, asked for at the end.

The test of Mohtashami and Jaggi (2023, arXiv 2305.16300) in our own words, with keys of five digits at fixed depths.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from lcjax.eval.budget import Draft
from lcjax.eval.tasks.base import GeneratedTask

OPENING = (
    "An important fact hides in a lot of idle text below: a pass key. Find it and memorise it, I will ask for it later."
)
FILLER = "The grass is green. The sky is blue. The sun is bright. Off we go, there and back once more."
NEEDLE = "The pass key is {key}. Remember it. The pass key is {key}."
QUESTION = "What is the pass key?"
ANSWER = "The pass key is"


@dataclass(frozen=True, kw_only=True)
class Passkey(GeneratedTask):
    """Depths (0: at the start, 1: at the end) take turns from example to example. A unit is a line of filler.

    Score: the first number of the answer is the key. Chat models get the plain text too, unless `chat` says otherwise.
    """

    num_examples: int = 10
    chat: bool | None = False
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    kind: ClassVar[str] = "passkey"
    metric: ClassVar[str] = "first_integer_match"

    def __post_init__(self) -> None:
        if bad := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise ValueError(f"passkey.depths must lie in 0..1, got {bad[0]}")
        if not self.depths:
            raise ValueError("passkey.depths is empty; give at least one depth, such as (0.5,)")

    @property
    def least(self) -> int:
        """The key alone."""
        return 0

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The key after its share of the filler."""
        depth = self.depths[index % len(self.depths)]
        key = str(rng.randrange(10_000, 100_000))
        before = round(depth * units)
        lines = [OPENING, *[FILLER] * before, NEEDLE.format(key=key), *[FILLER] * (units - before), QUESTION]
        return Draft("\n".join(lines), (key,), 12, ANSWER, metadata={"depth": depth})
