"""Texts with a question and the model's own answer, all of one length: what a model is calibrated on."""

from collections.abc import Iterator
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


@dataclass(frozen=True)
class Questions:
    """Where calibration texts come from: `count` stretches of `text` (as in `read_text`), each with the question.

    answer: most tokens of an answer. chat: render text and question as a user's message.
    """

    text: str = "python"
    question: str = "What is the text above about? Name its main points and where each of them comes up."
    count: int = 16
    answer: int = 128
    chat: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.count < 1 or self.answer < 1:
            raise ValueError(f"Questions.count {self.count} and Questions.answer {self.answer} must be positive")

    def ask(self, model: Loaded, generator: Generator, length: int) -> Answered:
        """The rows of `length` tokens, answered greedily by `generator`, which is of `model`.

        Raises ValueError where the question leaves no room for text, and where the model has no answer to any.
        """
        prompts = list(self.prompts(model, length - self.answer))
        replies = generator.generate([Request(prompt, self.answer) for prompt in prompts])
        said = [reply.tokens for reply in replies]
        if not any(said):
            raise ValueError(f"Questions: {model.source} answers none of {self.count} texts; ask another question")
        fill = model.tokenizer.eos_id or 0
        rows = [
            [*prompt, *reply, *[fill] * (self.answer - len(reply))]
            for prompt, reply in zip(prompts, said, strict=True)
            if reply
        ]
        answered = [np.arange(self.answer) < len(reply) for reply in said if reply]
        return Answered(np.array(rows, np.int32), np.array(answered, np.float32))

    def prompts(self, model: Loaded, room: int) -> Iterator[tuple[int, ...]]:
        """One prompt a text, of exactly `room` tokens."""
        tokenizer = model.tokenizer
        asked = f"\n\n{self.question}"
        before, after = around(tokenizer, "", asked) if self.chat else ("", f"{asked}\n")
        head = tokenizer.encode(before, add_bos=tokenizer.adds_bos and not self.chat)
        tail = tokenizer.encode(after)
        room -= len(head) + len(tail)
        if room < 1:
            raise ValueError(f"Questions: the question alone takes {len(head) + len(tail)} tokens; choose longer texts")
        ids = tokenizer.encode(read_text(self.text)[:CHARACTERS], special=False)
        if len(ids) < room:
            raise ValueError(f"Questions.text {self.text!r} has {len(ids)} tokens, and {room} are needed: give more")
        for i in range(self.count):
            start = Random(f"calibration-{self.seed}-{room}-{i}").randrange(len(ids) - room + 1)
            yield (*head, *ids[start : start + room], *tail)
