"""A source that needs no disk, for tests of the pipeline alone."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class MemoryCorpus:
    """Texts in a tuple; counts how often each is read."""

    def __init__(self, texts: tuple[str, ...]):
        self.texts = texts
        self.reads = [0] * len(texts)
        self.fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        self.reads[index] += 1
        return self.texts[index]

    def sizes(self) -> np.ndarray:
        return np.array([len(text.encode()) for text in self.texts], np.int64)


@dataclass(frozen=True)
class Memory:
    """A `Source` over given texts."""

    texts: tuple[str, ...]
    split: str = "train"

    def open(self, data_dir: str | Path) -> MemoryCorpus:
        del data_dir
        return MemoryCorpus(self.texts)


def texts(count: int, low: int, high: int, letter: str = "x", seed: int = 0) -> tuple[str, ...]:
    """Texts of random sizes, each beginning with its number."""
    rng = np.random.default_rng(seed)
    return tuple(f"{i:04d}" + letter * int(n) for i, n in enumerate(rng.integers(low, high, count)))
