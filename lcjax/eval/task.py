"""What `evaluate.py` can run.

A `Measure` turns a model into numbers by length. A `Task` is the measure that most suites need: it makes examples that
fit a token budget, lets the engine answer them, and scores the answers. The budget counts prompt and answer together,
in the model's own tokens; nothing is ever cut.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lcjax.data.tokenizers import Tokenizer
from lcjax.serve.engine import Engine, Generator, Request
from lcjax.serve.source import Loaded

type Table = Mapping[str, float]  # length -> value


@runtime_checkable
class Measure(Protocol):
    """One entry of an evaluation."""

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{result name: {length: value}}; plots and single results go into the folder `output`."""
        ...


@dataclass(frozen=True)
class Example:
    """One question. `prompt` and `new_tokens` together are within the budget; `fields` place it in plots."""

    prompt: tuple[int, ...]
    answer: str
    new_tokens: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A hash of what was asked, to find the example again."""
        return hashlib.sha256(json.dumps([*self.prompt, self.new_tokens]).encode()).hexdigest()[:16]


class Scored(NamedTuple):
    """An example, the model's answer and its score in 0..1."""

    example: Example
    text: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Base of generated-answer tasks; a subclass is a frozen dataclass too, with its own defaults."""

    name: str
    lengths: tuple[int, ...]
    seed: int = 0
    engine: Engine = field(default_factory=Engine)

    @abstractmethod
    def examples(self, tokenizer: Tokenizer, budget: int, seed: int) -> Iterable[Example]:
        """Questions of at most `budget` tokens, the answer included; the same seed gives the same bytes."""

    @abstractmethod
    def score(self, example: Example, text: str) -> float:
        """How right `text` is, in 0..1."""

    @abstractmethod
    def plot(self, scored: Mapping[int, list[Scored]], output: Path) -> None:
        """Draw the results, a list for each length, into the folder `output`."""

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """Answer and score everything; the mean score by length."""
        generator = Generator(model.graphdef, model.params, model.spec, model.tokenizer, self.engine)
        scored = {}
        for length in self.lengths:
            examples = list(self.examples(model.tokenizer, length, self.seed))
            for example in examples:
                check_budget(self.name, example, length)
            answers = generator.generate([Request(e.prompt, max_new_tokens=e.new_tokens) for e in examples])
            scored[length] = [
                Scored(example, answer.text, self.score(example, answer.text))
                for example, answer in zip(examples, answers, strict=True)
            ]
            print(
                f"{self.name} at {length}: {mean(scored[length]):.3f} of {len(examples)} examples; {generator.report}"
            )
        write_examples(output / f"{self.name}.jsonl", scored)
        self.plot(scored, output)
        return {self.name: {str(length): mean(found) for length, found in scored.items()}}


def check_budget(name: str, example: Example, budget: int) -> None:
    """Refuse an example that would not fit: cutting it would make a wrong score look right."""
    needed = len(example.prompt) + example.new_tokens
    if needed > budget:
        raise ValueError(
            f"{name}: an example needs {needed} tokens ({len(example.prompt)} of prompt and {example.new_tokens} of "
            f"answer), over its budget of {budget}; ask for a larger length"
        )


def mean(scored: Iterable[Scored]) -> float:
    """The mean score."""
    scores = [s.score for s in scored]
    return sum(scores) / len(scores)


def write_examples(path: Path, scored: Mapping[int, list[Scored]]) -> None:
    """One JSON object a line: length, key, fields, answer, text, score."""
    with path.open("w", encoding="utf-8") as file:
        for length, found in scored.items():
            for example, text, score in found:
                row = {"length": length, "key": example.key, "tokens": len(example.prompt), **example.fields}
                file.write(json.dumps({**row, "answer": example.answer, "text": text, "score": score}) + "\n")
