"""What a suite is made of: examples at a token budget, and a score for an answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

type Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One question. `prompt` is plain text or chat messages; a last message of the role "assistant" is an answer prefix."""

    id: str
    prompt: Prompt
    references: tuple[str, ...]
    max_new_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A suite's task. The budget counts prompt ids (chat template and BOS included) plus new tokens; it is never passed."""

    name: str

    def examples(self, tokenizer: Any, budget: int, seed: int) -> Iterator[Example]: ...

    def score(self, example: Example, text: str) -> float | Mapping[str, float]: ...
