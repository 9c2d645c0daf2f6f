"""DPE, dimension-wise positional embeddings manipulation (Lu et al., arXiv 2504.18857), and how its numbers are found.

1. `pair_contributions` and `select_pairs`: the pairs of each head that carry most of its scores.
2. `detect_factors`: for each group of pairs, the compression under which the model still finds needles.
3. `DPE`: beyond a window, those pairs turn to positions compressed by their group's factor.

`lcjax.eval.dpe` does the first two for a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcjax.positions.remap import Keys, Queries, SelfExtend, Where


@dataclass(frozen=True)
class ByPair(SelfExtend):
    """Base: Self-Extend with a factor for each pair, on chosen pairs of each head; `group` stays 1."""

    @property
    def factor_of_pair(self) -> Int[Array | np.ndarray, " n"]:
        """By how much positions are divided beyond the window."""
        raise NotImplementedError

    def chosen(self, heads: int) -> Bool[Array | np.ndarray, "H n"] | None:
        """Which pairs of each query head are compressed, the others keep their true positions; None: all are."""
        raise NotImplementedError

    def queries(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        factor = self.factor_of_pair
        return positions, positions[..., None] // factor + (self.window - self.window // factor)

    def keys(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        return positions, positions[..., None] // self.factor_of_pair

    def far(self, queries: Queries, keys: Keys) -> tuple[Float[Array, "B T H E"], Float[Array, "B S K E"]]:
        """One dot product over both rotations: a head's query is zero where it does not use one of them."""
        (true, scaled), chosen = queries, self.chosen(queries[0].shape[2])
        if chosen is None:
            return super().far(queries, keys)
        rest = true.shape[-1] - 2 * chosen.shape[-1]  # features that do not turn, once
        chosen = jnp.pad(jnp.tile(chosen, 2), ((0, 0), (0, rest)))  # [H,D]
        q = jnp.concatenate([jnp.where(chosen, scaled, 0), jnp.where(chosen, 0, true)], axis=-1)
        return q, jnp.concatenate([keys[1], keys[0]], axis=-1)


@dataclass(frozen=True)
class DPE(ByPair):
    """Self-Extend with a factor for each group of pairs, on chosen pairs of each head.

    factors: one whole number a group; the groups are equal runs of the pairs, fast ones first. selected: for each query
    head the pairs that are compressed (None: all); the others keep their true positions. Factors must divide `window`.
    `group` stays 1. Factors of 1 are plain rotary attention.
    """

    factors: tuple[int, ...] = (1,)
    pairs: int = 32
    selected: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.group != 1:
            raise ValueError(f"DPE.group is {self.group}; set DPE.factors instead")
        if not self.factors or min(self.factors) < 1:
            raise ValueError(f"DPE.factors must be at least 1, got {self.factors}")
        if self.pairs % len(self.factors):
            raise ValueError(f"DPE: {len(self.factors)} factors do not divide {self.pairs} pairs into equal groups")
        if bad := [g for g in self.factors if self.window % g]:
            raise ValueError(f"DPE.window {self.window} does not fit: the factor {bad[0]} must divide it")
        if self.selected is not None and any(not 0 <= p < self.pairs for head in self.selected for p in head):
            raise ValueError(f"DPE.selected must name pairs in 0..{self.pairs - 1}")

    @property
    def factor_of_pair(self) -> Int[np.ndarray, " n"]:
        """The factor of each pair's group."""
        return np.repeat(np.asarray(self.factors, np.int32), self.pairs // len(self.factors))

    def chosen(self, heads: int) -> Bool[np.ndarray, "H n"] | None:
        """The selected pairs as a mask."""
        if self.selected is None:
            return None
        if len(self.selected) != heads:
            raise ValueError(f"DPE.selected lists {len(self.selected)} heads, the model has {heads}")
        return np.array([np.isin(np.arange(self.pairs), head) for head in self.selected])


@dataclass(frozen=True, eq=False)
class Trial(ByPair):
    """DPE whose numbers are still sought and may be traced: `factor` `[n]` of each pair, `mask` `[H,n]` as in `chosen`.

    Its positions (`queries`, `keys`) need no mask.
    """

    factor: Any = 1
    mask: Any = None

    @property
    def factor_of_pair(self) -> Int[Array, " n"]:
        """As given."""
        return self.factor

    def chosen(self, heads: int) -> Bool[Array, "H n"] | None:
        """As given."""
        return self.mask


def pair_contributions(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]) -> Float[Array, "H n"]:
    """Mean over tokens of |q_t of the pair| |k_t of the pair|, per query head; rotation leaves it as it is."""

    def norms(x: Array) -> Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.sqrt(first**2 + second**2)

    return jnp.mean(norms(q) * jnp.repeat(norms(k), q.shape[2] // k.shape[2], axis=2), axis=(0, 1))


def select_pairs(contributions: Float[Array | np.ndarray, "H n"], count: int) -> tuple[tuple[int, ...], ...]:
    """The `count` strongest pairs of each head, ascending."""
    values = np.asarray(contributions)
    if not 1 <= count <= values.shape[1]:
        raise ValueError(f"select_pairs: count {count} must lie in 1..{values.shape[1]}")
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return tuple(tuple(sorted(map(int, head))) for head in order)


def detect_factors(
    score: Callable[[tuple[int, ...]], float], *, groups: int, length: int, trained: int, least: int = 1024
) -> tuple[int, ...]:
    """The factor of each group under which `score(factors)` (a needle test at `length` tokens, say) is best.

    One group is probed at a time with length / l for l = length, length / 2... down to `least` tokens, while the others
    stay at 2 length / trained; of equal scores the smaller factor wins.
    """
    if not 0 < least <= length or not 0 < trained <= length:
        raise ValueError(f"detect_factors: least {least} and trained {trained} must lie in 1..{length}, the length")
    background = max(2 * length // trained, 1)
    tried: Sequence[int] = [2**n for n in range((length // least).bit_length())]
    best = []
    for group in range(groups):
        factors = lambda g, group=group: tuple(g if n == group else background for n in range(groups))
        best.append(max(tried, key=lambda g: (score(factors(g)), -g)))
    return tuple(best)
