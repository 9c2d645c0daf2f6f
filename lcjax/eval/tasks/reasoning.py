"""Reasoning in a haystack: chains of one to three facts hidden in filler text (after arXiv 2406.18312)."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from lcjax.eval.budget import Draft
from lcjax.eval.haystack import insert_at
from lcjax.eval.tasks.base import GeneratedTask, haystack_facts
from lcjax.eval.words import NOUNS, endless_words

_FLOORS = ("cellar", "ground", "first", "second", "third", "fourth", "attic")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True, kw_only=True)
class HaystackReasoning(GeneratedTask):
    """Who keeps what in which room, on which floor, cleaned on which day: `steps` look-ups lead to one word.

    `people` chains are told, so that the answer cannot be guessed from the only day in the text. Facts lie at
    independent depths, or all within 5 % of the text where `clustered`. A unit is a sentence. Score: the first line is
    the word.
    """

    steps: int = 2
    people: int = 4
    clustered: bool = False
    metric: ClassVar[str] = "first_line_match"
    step: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 3) or self.people < 1:
            raise ValueError(
                f"reasoning.steps is {self.steps} and people {self.people}; choose 1, 2 or 3 and at least 1"
            )

    @property
    def name(self) -> str:
        """reasoning_1, reasoning_2, reasoning_3."""
        return f"reasoning_{self.steps}"

    @property
    def least(self) -> int:
        """The facts alone."""
        return 0

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """All chains, shuffled into the text, and the question about the first person."""
        words = endless_words(rng)
        chains = [
            (next(words).title(), rng.choice(NOUNS), f"{next(words).title()}", rng.choice(_FLOORS), rng.choice(_DAYS))
            for _ in range(self.people)
        ]
        facts = [fact for chain in chains for fact in self._tell(*chain)]
        mine = facts[: self.steps]
        rng.shuffle(facts)
        haystack = self.text()
        sentences = haystack.take(units, haystack.random_start(rng))  # before draws that depend on `units`
        places = self._places(rng, units, len(facts))
        context = " ".join(insert_at(sentences, facts, places))
        person, thing, room, floor, day = chains[0]
        ask, answer = (
            (f"In which room does {person} keep the {thing}?", room),
            (f"On which floor is the room in which {person} keeps the {thing}?", floor),
            (f"On which day is the floor cleaned on which {person} keeps the {thing}?", day),
        )[self.steps - 1]
        body = (
            f"Some sentences about people, rooms and floors are hidden in the text below.\n\n{context}\n\n"
            f"{ask} Reply with one word."
        )
        depths = sorted(places[facts.index(fact)] / max(units, 1) for fact in mine)
        more = haystack_facts(haystack, depth=depths[0], depths=depths, steps=self.steps)
        return Draft(body, (answer,), 16, "Answer:", metadata=more)

    def _tell(self, person: str, thing: str, room: str, floor: str, day: str) -> list[str]:
        return [
            f"{person} keeps the {thing} in the room called {room}.",
            f"The room called {room} is on the {floor} floor.",
            f"On the way to the room called {room}, everyone knows its floor is cleaned on {day}.",
        ][: self.steps]

    def _places(self, rng: Random, units: int, count: int) -> list[int]:
        if not self.clustered:
            return sorted(rng.choices(range(units + 1), k=count))
        width = max(1, round(0.05 * units))
        start = rng.randrange(units - width + 1) if units > width else 0
        return sorted(start + rng.randrange(min(width, units) + 1) for _ in range(count))


def reasoning(*, num_examples: int = 20, chat: bool | None = None, haystack: str = "python") -> list[GeneratedTask]:
    """One, two and three steps."""
    return [HaystackReasoning(steps=k, num_examples=num_examples, chat=chat, haystack=haystack) for k in (1, 2, 3)]
