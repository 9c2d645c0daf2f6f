"""Exact token budgets: how a prompt becomes ids, how many haystack units fit, and the named truncation policies.

The budget of an example is its prompt ids (chat template, BOS and answer prefix included) plus its new tokens. Nothing
here estimates: the ids that are counted are the ids that the model gets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from lcjax.eval.task import Prompt

type Truncation = Literal["error", "drop", "head", "tail", "middle"]
TRUNCATIONS: tuple[Truncation, ...] = ("error", "drop", "head", "tail", "middle")


class BudgetError(ValueError):
    """An example does not fit its budget, or a planted truncation was found."""


@runtime_checkable
class Encoder(Protocol):
    """The part of a tokenizer that budgets need."""

    adds_bos: bool
    chat_template: str | None

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str: ...


@dataclass(frozen=True)
class Draft:
    """A question before it is known whether it fits.

    `answer` is a text that scores 1 (default: the references in a row); `max_new_tokens` grows where it is longer.
    """

    body: str
    references: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    answer: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def ideal(self) -> str:
        """A text that scores 1."""
        return self.answer or ", ".join(self.references)

    def prompt(self, chat: bool) -> Prompt:
        """Chat messages with the answer prefix as an open assistant turn, or one text that ends with the prefix."""
        if not chat:
            return f"{self.body}\n{self.answer_prefix}" if self.answer_prefix else self.body
        messages = [{"role": "user", "content": self.body}]
        if self.answer_prefix:
            messages.append({"role": "assistant", "content": self.answer_prefix})
        return messages


def prompt_ids(tokenizer: Encoder, prompt: Prompt) -> list[int]:
    """Ids of a prompt, as the model gets them.

    Chat messages go through the tokenizer's template, which brings its own BOS; a last message of the role "assistant"
    is left open, so that decoding continues it. A plain text gets a BOS where the tokenizer adds one.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt, add_bos=tokenizer.adds_bos))
    opened = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    messages = prompt[:-1] if opened else prompt
    return list(tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True) + opened))


def require_fit(name: str, tokens: int, max_new_tokens: int, budget: int) -> None:
    """Raise BudgetError unless prompt and answer fit."""
    if tokens + max_new_tokens > budget:
        raise BudgetError(
            f"{name} needs {tokens} prompt tokens + {max_new_tokens} new tokens = {tokens + max_new_tokens}, "
            f"but its budget is {budget}; raise the budget or name a truncation policy"
        )


def require_whole(tokenizer: Encoder, prompt: Prompt, ids: Sequence[int], name: str) -> None:
    """Raise BudgetError unless `ids` are all the ids of `prompt`: the guard against a silent cut before the model."""
    whole = prompt_ids(tokenizer, prompt)
    if list(ids) != whole:
        raise BudgetError(
            f"{name}: the model was given {len(ids)} ids but its prompt has {len(whole)}; "
            "something cut or changed the prompt after it was built"
        )


@dataclass
class Fitter:
    """Finds the number of haystack units that fills a budget; remembers it, so that later examples need one encoding.

    A result never passes the budget, and is at most `tolerance` of it under, or less than one unit under.
    """

    tokenizer: Encoder
    budget: int
    chat: bool
    tolerance: float = 0.008
    answer_slack: int = 4
    _guess: int | None = None
    _slope: float | None = None

    def measure(self, draft: Draft) -> tuple[Draft, int]:
        """The draft with enough new tokens for its ideal answer, and its prompt tokens."""
        answer = len(self.tokenizer.encode(draft.ideal)) + self.answer_slack
        draft = replace(draft, max_new_tokens=max(answer, draft.max_new_tokens))
        return draft, len(prompt_ids(self.tokenizer, draft.prompt(self.chat)))

    def fit(
        self, build: Callable[[int], Draft], name: str, *, minimum: int = 0, maximum: int | None = None, step: int = 16
    ) -> tuple[Draft, int]:
        """The filled draft and its prompt tokens. Raises BudgetError when `minimum` units are already too many."""
        low: tuple[int, int, Draft] | None = None
        high: tuple[int, int] | None = None
        units = max(minimum, self._guess) if self._guess is not None else minimum
        if maximum is not None:
            units = min(units, maximum)
        last: tuple[int, int] | None = None
        for attempt in range(60):
            draft, tokens = self.measure(build(units))
            total = tokens + draft.max_new_tokens
            if last is not None and abs(units - last[0]) > 0.1 * units:  # neighbours tell little of the others
                self._slope = max((total - last[1]) / (units - last[0]), 1e-3)
            last = (units, total)
            if total > self.budget:
                if units <= minimum:
                    require_fit(f"{name} ({units} haystack units)", tokens, draft.max_new_tokens, self.budget)
                high = (units, total)
            elif low is None or units >= low[0]:
                low = (units, total, draft)
                if self.budget - total <= self.tolerance * self.budget or units == maximum:
                    break
            if low is not None and high is not None and high[0] - low[0] <= 1:
                break
            units = self._next(low, high, attempt, minimum, maximum, step)
        if low is None:
            raise BudgetError(f"{name}: no haystack of {minimum} or more units fits the budget of {self.budget} tokens")
        self._guess = low[0]
        return low[2], low[1] - low[2].max_new_tokens

    def _next(
        self,
        low: tuple[int, int, Draft] | None,
        high: tuple[int, int] | None,
        attempt: int,
        minimum: int,
        maximum: int | None,
        step: int,
    ) -> int:
        """Along the bracket's chord, else the slope, towards 0.3 % under the budget; bisection when that is slow."""
        target = self.budget * (1 - self.tolerance * 0.4)
        floor = low[0] + 1 if low else minimum
        ceiling = high[0] - 1 if high else maximum
        if low and high and attempt > 12:
            return (low[0] + high[0]) // 2
        if self._slope is None:
            guess = floor + step
        elif low and high:
            guess = int(low[0] + (target - low[1]) * (high[0] - low[0]) / (high[1] - low[1]))
        else:
            units, total = (low[0], low[1]) if low else high or (minimum, 0)
            guess = int(units + (target - total) / self._slope)
            if high is None and low and attempt < 3 and low[0] < 20 * step:
                guess = min(guess, max(low[0] * 8, low[0] + 8 * step))
        guess = max(guess, floor)
        return guess if ceiling is None else min(guess, max(ceiling, minimum))


def truncate_text(
    tokenizer: Encoder, text: str, build: Callable[[str], Draft], budget: int, chat: bool, policy: Truncation, name: str
) -> tuple[Draft, int] | None:
    """`build(text)` where it fits; otherwise what the policy says. Returns the draft and its prompt tokens.

    "error" raises BudgetError; "drop" returns None; "head" keeps the start of the text, "tail" its end, "middle" its
    first and last half. Only `text` is cut: instruction and question stay whole. The metadata say what was cut.
    """
    if policy not in TRUNCATIONS:
        raise ValueError(f"unknown truncation policy {policy!r}; known: {', '.join(TRUNCATIONS)}")
    draft = build(text)
    tokens = len(prompt_ids(tokenizer, draft.prompt(chat)))
    if tokens + draft.max_new_tokens <= budget:
        return draft, tokens
    if policy == "error":
        require_fit(name, tokens, draft.max_new_tokens, budget)
    if policy == "drop":
        return None
    ids = list(tokenizer.encode(text))
    keep = len(ids) - (tokens + draft.max_new_tokens - budget)
    for _ in range(20):
        if keep < 0:
            break
        draft = build(_cut(tokenizer, ids, keep, policy))
        tokens = len(prompt_ids(tokenizer, draft.prompt(chat)))
        over = tokens + draft.max_new_tokens - budget
        if over <= 0:
            return replace(
                draft, metadata={**draft.metadata, "truncation": policy, "kept": keep, "of": len(ids)}
            ), tokens
        keep -= over
    empty = build("")
    least = len(prompt_ids(tokenizer, empty.prompt(chat)))
    require_fit(f"{name} without its document", least, empty.max_new_tokens, budget)
    raise BudgetError(f"{name}: cutting the document did not bring the prompt under the budget of {budget} tokens")


def _cut(tokenizer: Encoder, ids: list[int], keep: int, policy: Truncation) -> str:
    if policy == "head":
        return tokenizer.decode(ids[:keep])
    if policy == "tail":
        return tokenizer.decode(ids[len(ids) - keep :])
    front = (keep + 1) // 2
    return tokenizer.decode(ids[:front]) + tokenizer.decode(ids[len(ids) - (keep - front) :])
