"""Passkey questions with their answers as training text, in the wording of the passkey test."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcjax.eval.passkey import FILLER, NEEDLE, OPENING, QUESTION


def passkey_text(key: str, before: int, after: int) -> str:
    """A question whose key stands after `before` and before `after` lines of filler, and its answer."""
    return OPENING + FILLER * before + NEEDLE.format(key=key) + FILLER * after + QUESTION + f" {key}."


@dataclass(frozen=True)
class PasskeyTexts:
    """A `lcjax.data` source of `count` questions with `least` to `most` lines of filler each, depths and keys drawn.

    One line of filler is about 25 tokens. Keys have five digits, as in the test, and come from other draws.
    """

    count: int = 10_000
    least: int = 2
    most: int = 34
    seed: int = 1
    split: str = "train"

    def __post_init__(self):
        if not 0 <= self.least <= self.most or self.count < 1:
            raise ValueError(f"PasskeyTexts: count {self.count} must be positive and {self.least} <= {self.most} lines")

    def open(self, data_dir: str | Path) -> "_Questions":
        """The texts, made as they are read; nothing is written to `data_dir`."""
        return _Questions(self)


class _Questions:
    """A `lcjax.data` corpus."""

    def __init__(self, source: PasskeyTexts):
        self._source = source
        self.fingerprint = hashlib.sha256((repr(source) + passkey_text("", 1, 1)).encode()).hexdigest()

    def __len__(self) -> int:
        return self._source.count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        rng = np.random.default_rng([self._source.seed, index])
        lines = int(rng.integers(self._source.least, self._source.most + 1))
        before = int(rng.integers(0, lines + 1))
        return passkey_text(str(rng.integers(10_000, 100_000)), before, lines - before)

    def sizes(self) -> np.ndarray:
        return np.array([len(self[i].encode()) for i in range(len(self))], np.int64)
