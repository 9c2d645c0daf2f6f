"""Rotary positions with several axes: M-RoPE (Qwen2-VL, arXiv 2409.12191) and M-RoPE++ (GIRAFFE, arXiv 2412.12735).

Each pair of a head turns with one of three positions (time, row, column). On text all three are equal, and the law is
plain rotary.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lcjax.positions.laws import Frequencies, Length, Rope, require


@dataclass(frozen=True)
class MRope(Rope):
    """The first sections[0] pairs turn with the first axis, the next sections[1] with the second, and so on."""

    sections: tuple[int, ...] = (16, 24, 24)

    def __post_init__(self):
        super().__post_init__()
        require(min(self.sections, default=0) > 0, self, f"sections must be positive, got {self.sections}")

    def axis_of_pair(self, head_dim: int) -> np.ndarray:
        """int [d/2]."""
        pairs = self.rotary_dim(head_dim) // 2
        require(sum(self.sections) == pairs, self, f"sections {self.sections} must sum to {pairs} pairs")
        return np.repeat(np.arange(len(self.sections)), self.sections)

    def spread(self, positions: Int[Array, "A B T"], head_dim: int) -> Int[Array, "B T n"]:
        """The position of every pair, from one position per axis."""
        return jnp.moveaxis(positions[self.axis_of_pair(head_dim)], 0, -1)


@dataclass(frozen=True)
class MRopePlus(MRope):
    """M-RoPE++: time pairs keep their frequency, column pairs are divided by `factor`, row pairs go over between them.

    ramp: 'turns' mixes linear in the turns that a pair makes within the target length (section 3.2), 'index' in its
    index. Three sections. factor 1 is M-RoPE.
    """

    factor: float = 1.0
    ramp: Literal["turns", "index"] = "turns"

    def __post_init__(self):
        super().__post_init__()
        require(self.factor >= 1, self, f"factor must be at least 1, got {self.factor}")
        require(len(self.sections) == 3, self, f"needs three sections, got {self.sections}")

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        del length
        plain = self.plain(head_dim)
        if self.factor == 1:
            return plain.astype(np.float32), 1.0
        self.axis_of_pair(head_dim)
        first, last = self.sections[0], self.sections[0] + self.sections[1]
        along = plain if self.ramp == "turns" else -np.arange(len(plain), dtype=np.float64)
        kept = np.clip((along - along[last]) / (along[first] - along[last]), 0, 1)
        kept[:first] = 1.0
        return (plain * (1 / self.factor + (1 - 1 / self.factor) * kept)).astype(np.float32), 1.0


def grid_positions(parts: tuple[int | tuple[int, int, int], ...]) -> tuple[np.ndarray, int]:
    """Positions int32 [3,T] of a sequence of text runs (a number of tokens) and grids (time, rows, columns).

    Text counts on alike on all axes; a grid starts where the text stopped, its tokens in row-major order; text after it
    goes on one past the largest position. Also returns the delta that turns a token's index, beyond the end, into its
    position on every axis.
    """
    found: list[np.ndarray] = []
    start = 0
    for part in parts:
        axes = [np.arange(n, dtype=np.int32) for n in ((part,) if isinstance(part, int) else part)]
        block = np.stack(axes * 3 if len(axes) == 1 else np.meshgrid(*axes, indexing="ij"))
        found.append(block.reshape(3, -1) + start)
        start = int(found[-1].max()) + 1
    positions = np.concatenate(found, axis=1)
    return positions, start - positions.shape[1]
