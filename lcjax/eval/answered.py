"""Texts with a question and the model's own answer, all of one length: what a model is calibrated on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lcjax.data.tokenizers.base import around
from lcjax.eval.haystack import read_text
from lcjax.serve.engine import Generator, Request
from lcjax.serve.source import Loaded

CHARACTERS = 2_000_000


class Answered(NamedTuple):
    """Rows of tokens whose last A are an answer; `answered` is 1 on it and 0 on what fills up a shorter one."""

    tokens: Int[np.ndarray, "B T"]
    answered: Float[np.ndarray, "B A"]


@dataclass(frozen=True, kw_only=True)
class CalibrationTexts(ABC):
    """`count` stretches of `text` (see `read_text`) that a model goes on from by itself, for up to `answer` tokens."""

    text: str = "python"
    count: int = 16
    answer: int = 128
    seed: int = 0

    def __post_init__(self):
        if self.count < 1 or self.answer < 1:
            name = type(self).__name__
            raise ValueError(f"{name}.count {self.count} and {name}.answer {self.answer} must be positive")

    def ask(self, model: Loaded, generator: Generator, length: int) -> Answered:
        """The rows of `length` tokens, answered greedily by `generator`, which is of `model`.

        Raises ValueError where no room is left for text, and where the model has no answer to any.
        """
        prompts = list(self.prompts(model, length - self.answer))
        replies = generator.generate([Request(prompt, self.answer) for prompt in prompts])
        said = [reply.tokens for reply in replies]
        if not any(said):
            raise ValueError(f"{type(self).__name__}: {model.source} answers none of {self.count} texts; change them")
        fill = model.tokenizer.eos_id or 0
        rows = [
            [*prompt, *reply, *[fill] * (self.answer - len(reply))]
            for prompt, reply in zip(prompts, said, strict=True)
            if reply
        ]
        answered = [np.arange(self.answer) < len(reply) for reply in said if reply]
        return Answered(np.array(rows, np.int32), np.array(answered, np.float32))

    def stretches(self, model: Loaded, room: int) -> Iterator[tuple[Random, Sequence[int]]]:
        """`room` tokens of each text from a random place on, and the generator that drew it."""
        ids = model.tokenizer.encode(read_text(self.text)[:CHARACTERS], special=False)
        if len(ids) < room:
            name = f"{type(self).__name__}.text"
            raise ValueError(f"{name} {self.text!r} has {len(ids)} tokens, and {room} are needed: give more")
        for i in range(self.count):
            rng = Random(f"calibration-{self.seed}-{room}-{i}")
            start = rng.randrange(len(ids) - room + 1)
            yield rng, ids[start : start + room]

    @abstractmethod
    def prompts(self, model: Loaded, room: int) -> Iterator[tuple[int, ...]]:
        """One prompt a text, of exactly `room` tokens."""


@dataclass(frozen=True, kw_only=True)
class Questions(CalibrationTexts):
    """Texts with a question about them. chat: render text and question as a user's message."""

    question: str = "What is the text above about? Name its main points and where each of them comes up."
    chat: bool = True

    def prompts(self, model: Loaded, room: int) -> Iterator[tuple[int, ...]]:
        tokenizer = model.tokenizer
        asked = f"\n\n{self.question}"
        before, after = around(tokenizer, "", asked) if self.chat else ("", f"{asked}\n")
        head = tokenizer.encode(before, add_bos=tokenizer.adds_bos and not self.chat)
        tail = tokenizer.encode(after)
        room -= len(head) + len(tail)
        if room < 1:
            raise ValueError(f"Questions: the question alone takes {len(head) + len(tail)} tokens; choose longer texts")
        for _, text in self.stretches(model, room):
            yield (*head, *text, *tail)


@dataclass(frozen=True, kw_only=True)
class Quotations(CalibrationTexts):
    """Texts that end in the first `cue` tokens of a passage which stands in them, at any distance, once before.

    A model goes on with the passage: even a small one that answers no question about a long text shows this way which
    of its heads read far back.
    """

    cue: int = 16

    def prompts(self, model: Loaded, room: int) -> Iterator[tuple[int, ...]]:
        tokenizer = model.tokenizer
        head = tokenizer.encode("", add_bos=tokenizer.adds_bos)
        gap = tokenizer.encode("\n\n")
        least = self.cue + self.answer  # tokens that a passage takes
        size = room - len(head) - len(gap) - self.cue
        if size < least:
            raise ValueError(f"Quotations: {size} tokens of text hold no passage of {least}; choose longer texts")
        for rng, text in self.stretches(model, size):
            start = rng.randrange(size - least + 1)
            yield (*head, *text, *gap, *text[start : start + self.cue])
