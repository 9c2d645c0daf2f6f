"""Corpora that are made as they are read."""

import hashlib

import numpy as np


class MadeTexts:
    """A `lcjax.data` corpus of `count` texts; a subclass says what each of them is. Nothing is kept or written."""

    def __init__(self, count: int, described: str):
        """described: all that the texts depend on, for the fingerprint."""
        self._count = count
        self.fingerprint = hashlib.sha256(f"{described} {self[0]}".encode()).hexdigest()

    def text(self, index: int) -> str:
        """Text `index`, the same whenever it is asked for."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self.text(index)

    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of every text, int64."""
        return np.array([len(self[i].encode()) for i in range(len(self))], np.int64)
