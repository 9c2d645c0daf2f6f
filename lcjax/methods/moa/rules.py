"""MoA's search space (arXiv 2406.14909): the spans alpha + beta N that a head may get, what each keeps and loses."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lcjax.models.elastic import kept_tokens


class Rule(NamedTuple):
    """A head keeps alpha + beta N tokens of requests of N tokens."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class SearchSpace:
    """Which plans are looked at, and what they may keep.

    profiles: lengths in tokens whose influence is measured. lengths: those at which the density is bounded. density:
    the most that is kept of all keys and values, as a mean over heads; at least `fill` of it is kept.
    rules_per_layer: different rules that one layer's KV heads may have (None: any number). step: tokens between two
    alphas. betas: how many, from 0 to 1. block: tokens.
    """

    profiles: tuple[int, ...] = (2048, 4096, 8192)
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    density: float = 0.5
    fill: float = 0.9
    rules_per_layer: int | None = 2
    step: int = 1024
    betas: int = 9
    block: int = 64

    def __post_init__(self):
        for name in ("profiles", "lengths"):
            found = getattr(self, name)
            if not found or any(n < 2 * self.block or n % self.block for n in found):
                raise ValueError(
                    f"SearchSpace.{name} is {found}; give lengths of at least two blocks that are multiples of "
                    f"SearchSpace.block={self.block}"
                )
        if not 0 < self.density <= 1 or not 0 <= self.fill < 1:
            raise ValueError(
                f"SearchSpace.density {self.density} must lie in (0, 1] and SearchSpace.fill {self.fill} in [0, 1)"
            )
        for name, least in (("step", 1), ("betas", 2), ("block", 1), ("rules_per_layer", 1)):
            if (number := getattr(self, name)) is not None and number < least:
                raise ValueError(f"SearchSpace.{name} is {number}; it must be at least {least}")

    def rules(self) -> tuple[Rule, ...]:
        """Rules that keep something of the shortest text and no more than all of the longest; of equals the first."""
        shortest, longest = min(*self.profiles, *self.lengths), max(self.profiles)
        alphas = np.linspace(-shortest, longest, (longest + shortest) // self.step + 1)
        different: dict[tuple[int, ...], Rule] = {}
        for beta in np.linspace(0.0, 1.0, self.betas):
            for alpha in alphas:
                fits = all(alpha + beta * n <= n for n in (longest, max(self.lengths)))
                if fits and alpha + beta * shortest > 0:
                    rule = Rule(float(alpha), float(beta))
                    keeps = tuple(kept_tokens(*rule, n, self.block) for n in {*self.profiles, *self.lengths})
                    different.setdefault(keeps, rule)
        return tuple(different.values())

    def kept_blocks(self, length: int) -> Int[np.ndarray, " R"]:
        """Blocks that each rule keeps of `length` tokens, its sink's among them: what its cache holds at the end."""
        return np.array([kept_tokens(*rule, length, self.block) // self.block for rule in self.rules()])

    def densities(self) -> Float[np.ndarray, "N R"]:
        """Share of the blocks that each rule keeps at each of `lengths`."""
        return np.stack([self.kept_blocks(length) / (length // self.block) for length in self.lengths])


def lost_influence(influence: Float[np.ndarray, "K n n"], kept_blocks: Int[np.ndarray, " R"]) -> np.ndarray:
    """Influence `[K,R]` of the blocks that are lost when the first block and the last `kept - 1` before a query stay.

    influence: of each block of queries (second axis) on each block of keys, zero above the diagonal.
    """
    heads, blocks, _ = influence.shape
    behind_sink = np.where(np.arange(blocks) > 0, influence, 0.0)
    at_distance = np.stack([np.trace(behind_sink, -d, 1, 2) for d in range(blocks)], axis=1)
    beyond = np.zeros((heads, blocks + 1))
    beyond[:, :-1] = np.cumsum(at_distance[:, ::-1], axis=1)[:, ::-1]  # at this distance or further
    return beyond[:, np.minimum(kept_blocks - 1, blocks)]
