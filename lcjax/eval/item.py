"""What a suite is made of: items at a token budget, and a score for an answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

type Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Item:
    """One question. `prompt` is plain text or chat messages; a last message of the role "assistant" opens the answer.

    `metadata` is JSON-able: where the needle lies, what was cut, the ideal answer.
    """

    id: str
    prompt: Prompt
    references: tuple[str, ...]
    max_new_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class SuiteTask(Protocol):
    """A task of a suite. The budget counts prompt ids (chat template and BOS included) plus new tokens, never less."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    def examples(self, tokenizer: Any, budget: int, seed: int) -> Iterator[Item]:
        """Items within the budget; the same seed gives the same bytes. BudgetError when one cannot fit."""
        ...

    def score(self, example: Item, text: str) -> float | Mapping[str, float]:
        """A share in [0, 1], or several by name with the headline first."""
        ...

    def ideal(self, example: Item) -> str:
        """An answer that scores 1: for checks of a suite from end to end."""
        ...
