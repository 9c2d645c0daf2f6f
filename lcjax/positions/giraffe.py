"""Giraffe's frequency edits (Pal et al., arXiv 2308.10882): linear scaling, power scaling, truncated basis."""

import math
from dataclasses import dataclass

import numpy as np

from lcjax.positions.laws import Frequencies, Length, Scaled, require


@dataclass(frozen=True)
class Giraffe(Scaled):
    """In this order: divide by `factor`; multiply pair i by (1 - i/n)^power; truncate the basis at `truncate` tokens.

    Truncation keeps pairs that turn once or more within `truncate` tokens, makes those down to an eighth of a turn turn
    once in 16 x `truncate`, and stops the rest. power 0 and truncate 0 switch those edits off.
    """

    power: float = 0.0
    truncate: int = 0

    def __post_init__(self):
        super().__post_init__()
        require(self.power >= 0, self, f"power must not be negative, got {self.power}")
        require(self.truncate >= 0, self, f"truncate must not be negative, got {self.truncate}")

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        del length
        scaled = self.plain(head_dim) / self.factor
        n = len(scaled)
        scaled = scaled * (1 - np.arange(n) / n) ** self.power
        if self.truncate:
            turn = 2 * math.pi / self.truncate
            scaled = np.where(scaled >= turn, scaled, np.where(scaled >= turn / 8, turn / 16, 0.0))
        return scaled.astype(np.float32), 1.0
