"""Needle Threading (Roberts et al., ICLR 2025, arXiv 2411.05000): single and many needles, and threads that hop from
value to key, in one JSON object of random strings.

A haystack is `json.dumps` of n pairs drawn in the order key, value, key, value, ...; with UUIDs it has exactly 80
characters a pair whatever is re-linked, except for branched threads. A unit is a pair. The score is the share of the
wanted strings in the answer; a single one must stand at its very beginning. `lcjax.eval.contour` turns scores over
(length, needles) into the effective context.
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

from lcjax.eval.budget import Draft
from lcjax.eval.metrics.text import prefix_match
from lcjax.eval.task import Example
from lcjax.eval.tasks.base import GeneratedTask, depth_grid
from lcjax.eval.words import letters, uuid

type Direction = Literal["forward", "backward", "random"]

_UUID = re.compile(r"[0-9a-f*]{8}-[0-9a-f*]{4}-[0-9a-f*]{4}-[0-9a-f*]{4}-[0-9a-f*]{12}")
_SHORT = re.compile(r"\b[a-z]{6}\b")
_OPENING = "Here is a JSON object of keys and values.\n"


@dataclass(frozen=True, kw_only=True)
class ThreadTask(GeneratedTask):
    """Base: `short_keys` uses six letters instead of UUIDs, for small models (a UUID pair costs SmolLM2 70 tokens)."""

    short_keys: bool = False
    step: ClassVar[int] = 8

    def _string(self, rng: Random) -> str:
        return letters(rng, 6) if self.short_keys else uuid(rng)

    def pairs(self, rng: Random, count: int) -> list[list[str]]:
        """`count` [key, value] pairs of strings that are all different."""
        seen: set[str] = set()

        def fresh() -> str:
            while (value := self._string(rng)) in seen:
                pass
            seen.add(value)
            return value

        return [[fresh(), fresh()] for _ in range(count)]

    def ask(self, pairs: list[list[Any]], question: str, references: list[str], facts: dict[str, Any]) -> Draft:
        """The haystack and the question. The haystack text alone is as long as the paper's."""
        context = json.dumps(dict(pairs))
        found = {"pairs": len(pairs), "characters": len(context), **facts}
        answer = references[0] if len(references) == 1 else "\n".join(references)
        return Draft(f"{_OPENING}{context}\n{question}", tuple(references), 48, "", answer, found)

    def score(self, example: Example, text: str) -> float:
        """Share of the wanted strings among the strings of the answer; a single one must open the answer."""
        if len(example.references) == 1:
            return prefix_match(text, example.references)
        found = set((_SHORT if self.short_keys else _UUID).findall(text))
        return len(found & set(example.references)) / len(example.references)


@dataclass(frozen=True, kw_only=True)
class SingleNeedle(ThreadTask):
    """The value of one key; the depth steps over an even grid of 11 from example to example."""

    kind: ClassVar[str] = "single_needle"

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """Ask for the pair at depth index % 11."""
        pairs = self.pairs(rng, units)
        key, value = pairs[int(depth_grid(index) * (units - 1))]
        question = f'What is the value of the key "{key}"? Reply with the value alone.'
        return self.ask(pairs, question, [value], {"depth": depth_grid(index), "needles": 1})


def place(rng: Random, count: int, needles: int, clustered: bool) -> list[int]:
    """Ascending pair indices of the needles: anywhere, or next to each other."""
    if clustered:
        start = rng.randrange(count - needles + 1)
        return list(range(start, start + needles))
    return sorted(rng.sample(range(count), needles))


@dataclass(frozen=True, kw_only=True)
class MultiNeedle(ThreadTask):
    """The values of `needles` keys, at random places or in one cluster."""

    needles: int = 5
    clustered: bool = False
    kind: ClassVar[str] = "multi_needle"

    @property
    def least(self) -> int:
        """One pair a needle."""
        return self.needles

    @property
    def name(self) -> str:
        """Such as multi_needle_5 or conditional_needle_5_clustered."""
        return f"{self.kind}_{self.needles}" + ("_clustered" if self.clustered else "")

    def depth(self, places: list[int], units: int) -> dict[str, float]:
        """Where the needles are, when that is one place."""
        return {"depth": places[0] / units} if self.clustered or self.needles == 1 else {}

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """Ask for the values in the order of the haystack."""
        pairs = self.pairs(rng, units)
        places = place(rng, units, self.needles, self.clustered)
        keys = ", ".join(f'"{pairs[i][0]}"' for i in places)
        question = f"What are the values of the keys {keys}? Reply with the values alone, one a line."
        facts = {"needles": self.needles, "clustered": self.clustered, **self.depth(places, units)}
        return self.ask(pairs, question, [pairs[i][1] for i in places], facts)


@dataclass(frozen=True, kw_only=True)
class ConditionalNeedle(MultiNeedle):
    """The values of all keys that hold a symbol; the keys are not listed."""

    symbol: str = "*"
    kind: ClassVar[str] = "conditional_needle"

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """One character of each wanted key becomes the symbol."""
        pairs = self.pairs(rng, units)
        places = place(rng, units, self.needles, self.clustered)
        for i in places:
            key = pairs[i][0]
            spot = rng.choice([j for j, character in enumerate(key) if character != "-"])
            pairs[i][0] = key[:spot] + self.symbol + key[spot + 1 :]
        question = (
            f'What are the values of all keys that contain "{self.symbol}"? Reply with the values alone, one a line.'
        )
        facts = {"needles": self.needles, "clustered": self.clustered, **self.depth(places, units)}
        return self.ask(pairs, question, [pairs[i][1] for i in places], facts)


@dataclass(frozen=True, kw_only=True)
class Threads(ThreadTask):
    """Follow `threads` chains of `length` pairs: a value is the next key. The final values are asked for.

    Direction: "forward" threads run down the haystack, "backward" up, "random" both ways.
    """

    threads: int = 1
    length: int = 3
    direction: Direction = "forward"
    kind: ClassVar[str] = "threads"

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "backward", "random"):
            raise ValueError(f"{self.kind}.direction is {self.direction!r}; choose 'forward', 'backward' or 'random'")
        if self.length < 2 or self.threads < 1:
            raise ValueError(f"{self.kind} needs threads >= 1 and length >= 2, got {self.threads} and {self.length}")

    @property
    def least(self) -> int:
        """One pair a hop."""
        return self.threads * self.length

    @property
    def name(self) -> str:
        """Such as single_thread_5_forward, multi_thread_3x5_forward."""
        size = f"{self.threads}x{self.length}" if self.threads > 1 else str(self.length)
        return f"{self.kind}_{size}_{self.direction}"

    def routes(self, rng: Random, units: int) -> list[list[int]]:
        """Pair indices of every thread in the order of its hops."""
        chosen = rng.sample(range(units), self.threads * self.length)
        routes = [chosen[i :: self.threads] for i in range(self.threads)]
        if self.direction != "random":
            routes = [sorted(route, reverse=self.direction == "backward") for route in routes]
        return routes

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """Link the pairs of every thread and ask for the ends."""
        pairs = self.pairs(rng, units)
        routes = self.routes(rng, units)
        for route in routes:
            for here, there in itertools.pairwise(route):
                pairs[there][0] = pairs[here][1]
        starts = ", ".join(f'"{pairs[route[0]][0]}"' for route in routes)
        facts: dict[str, Any] = {"threads": self.threads, "thread_length": self.length, "direction": self.direction}
        facts |= {"depth": routes[0][-1] / units} if self.threads == 1 else {}
        return self.ask(pairs, self._question(starts), [pairs[route[-1]][1] for route in routes], facts)

    def _question(self, starts: str) -> str:
        each = "Start at the key" if self.threads == 1 else "Start once at each of the keys"
        ends = "the final value alone" if self.threads == 1 else "the final values alone, one a line"
        return (
            f"{each} {starts}. Look up its value; where that is a key too, look it up, and go on until the value "
            f"is no key. Reply with {ends}."
        )


@dataclass(frozen=True, kw_only=True)
class SingleThread(Threads):
    """One thread."""

    kind: ClassVar[str] = "single_thread"


@dataclass(frozen=True, kw_only=True)
class MultiThread(Threads):
    """Several threads at once."""

    threads: int = 3
    kind: ClassVar[str] = "multi_thread"


@dataclass(frozen=True, kw_only=True)
class BranchedThread(Threads):
    """One thread whose values are lists of `branches` strings, of which exactly one goes on; the last one is a leaf."""

    branches: int = 2
    kind: ClassVar[str] = "branched_thread"

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The value of each thread pair becomes a list; the last value stays a single string."""
        pairs: list[list[Any]] = [list(pair) for pair in self.pairs(rng, units)]
        (route,) = self.routes(rng, units)
        for here, there in itertools.pairwise(route):
            options = [self._string(rng) for _ in range(self.branches)]
            pairs[here][1], pairs[there][0] = options, rng.choice(options)
        question = (
            f'Start at the key "{pairs[route[0]][0]}". Where a value is a list, one of its strings is a key again: '
            "look it up, and go on until the value is a single string that is no key. Reply with that string alone."
        )
        facts = {"branches": self.branches, "thread_length": self.length, "direction": self.direction}
        return self.ask(pairs, question, [pairs[route[-1]][1]], {**facts, "depth": route[-1] / units})


def needle_threading(
    *,
    num_examples: int = 11,
    needles: tuple[int, ...] = (2, 5, 10),
    thread_lengths: tuple[int, ...] = (2, 5, 10),
    directions: tuple[Direction, ...] = ("forward", "backward"),
    short_keys: bool = False,
) -> list[GeneratedTask]:
    """The whole suite: every task over its sweep; names say the variant."""
    more: dict[str, Any] = {"num_examples": num_examples, "short_keys": short_keys}
    tasks: list[GeneratedTask] = [SingleNeedle(**more)]
    kinds: tuple[Callable[..., GeneratedTask], ...] = (MultiNeedle, ConditionalNeedle)
    tasks += [kind(needles=m, clustered=c, **more) for kind in kinds for m in needles for c in (False, True)]
    tasks += [SingleThread(length=n, direction=d, **more) for n in thread_lengths for d in directions]
    tasks += [MultiThread(threads=m, direction=d, **more) for m in needles for d in directions]
    return [*tasks, *(BranchedThread(length=n, **more) for n in thread_lengths)]
