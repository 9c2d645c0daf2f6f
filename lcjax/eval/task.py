"""What a suite is made of: examples at a token budget, and a score for an answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

type Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One question. `prompt` is plain text or chat messages; a last message of the role "assistant" opens the answer.

    `metadata` is JSON-able: where the needle lies, what was cut, the ideal answer.
    """

    id: str
    prompt: Prompt
    references: tuple[str, ...]
    max_new_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A task of a suite. The budget counts prompt ids (chat template and BOS included) plus new tokens, never less."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def category(self) -> str:
        """Tasks of one category weigh as one task in a suite's mean; "" stands for itself."""
        ...

    def examples(self, tokenizer: Any, budget: int, seed: int) -> Iterator[Example]:
        """Examples within the budget; the same seed gives the same bytes. BudgetError when one cannot fit."""
        ...

    def score(self, example: Example, text: str) -> float | Mapping[str, float]:
        """A share in [0, 1], or several by name with the headline first."""
        ...

    def ideal(self, example: Example) -> str:
        """An answer that scores 1: for checks of a suite from end to end."""
        ...
