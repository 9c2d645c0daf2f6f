"""Passkey retrieval by length and depth: a number hidden in dull text, asked for at the end.

The test of Mohtashami and Jaggi (arXiv 2305.16300) in our own words.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcjax.data.tokenizers import Tokenizer
from lcjax.eval.plots import heat_map
from lcjax.eval.task import Example, Scored, Task, mean

OPENING = "A pass key is hidden somewhere in the long and dull text below. Find it and remember it.\n"
FILLER = "The meadow is green. The sea is blue. The sun is warm. A road leads out, and a road leads home again.\n"
NEEDLE = "The pass key is {key}. Remember it: {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is the number"


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """`trials` keys at each of `depths` (0: at the start, 1: at the end) for each of `lengths` in tokens."""

    lengths: tuple[int, ...] = (1024,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 4
    new_tokens: int = 12
    name: str = "passkey"

    def __post_init__(self):
        if not self.lengths or not self.depths or self.trials < 1 or self.new_tokens < 1:
            raise ValueError("passkey: lengths and depths must name something, trials and new_tokens be positive")
        if bad := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise ValueError(f"passkey.depths must lie in 0..1, got {bad[0]}")

    def examples(self, tokenizer: Tokenizer, budget: int, seed: int) -> Iterator[Example]:
        """One per depth and trial, filled up to the budget with whole lines of filler."""
        for place, depth in enumerate(self.depths):
            for trial in range(self.trials):
                key = str(np.random.default_rng([seed, budget, place, trial]).integers(10_000, 100_000))
                prompt = self._fill(tokenizer, budget, depth, key)
                yield Example(prompt, key, self.new_tokens, {"depth": depth, "trial": trial})

    def _fill(self, tokenizer: Tokenizer, budget: int, depth: float, key: str) -> tuple[int, ...]:
        """The longest prompt whose tokens, with the answer's, are within the budget."""

        def prompt(lines: int) -> list[int]:
            before = round(depth * lines)
            text = OPENING + FILLER * before + NEEDLE.format(key=key) + FILLER * (lines - before) + QUESTION
            return tokenizer.encode(text, add_bos=tokenizer.adds_bos)

        room = budget - self.new_tokens
        if (least := len(prompt(0))) > room:
            raise ValueError(
                f"passkey: a length of {budget} is too small: the question alone has {least} tokens "
                f"and the answer may take {self.new_tokens}"
            )
        each = max((len(prompt(64)) - least) / 64, 1e-3)
        lines = int((room - least) / each)
        while len(prompt(lines)) > room:
            lines -= 1
        while len(prompt(lines + 1)) <= room:
            lines += 1
        return tuple(prompt(lines))

    def score(self, example: Example, text: str) -> float:
        """1 if the first number of the answer is the key."""
        found = re.search(r"\d+", text)
        return float(found is not None and found.group() == example.answer)

    def plot(self, scored: Mapping[int, list[Scored]], output: Path) -> None:
        """Accuracy by length (columns) and depth (rows)."""
        grid = [
            [mean(s for s in scored[length] if s.example.fields["depth"] == depth) for length in self.lengths]
            for depth in self.depths
        ]
        heat_map(
            np.array(grid),
            columns=[f"{length:,}" for length in self.lengths],
            rows=[f"{depth:.0%}" for depth in self.depths],
            title="Passkey retrieval",
            labels=("context, tokens", "depth of the key", "share found"),
            path=output / f"{self.name}.png",
        )
