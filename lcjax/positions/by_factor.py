"""Laws whose whole factor follows the running length: t = ceil(length / original_length), from 1 to `max_factor`.

Row t - 1 of a small table holds the frequencies of factor t. Row 0 is plain rotary, so nothing changes within the
trained length, and angles stay exact because a row is a constant. All keys turn with the row of the length at which
they are read: caches hold them unrotated.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lcjax.positions.laws import Frequencies, Length, Rope, YaRN, ntk_exponents, require


@dataclass(frozen=True)
class ByFactor(Rope):
    """Base of these laws; by itself every row is plain."""

    original_length: int = 0
    max_factor: int = 1

    follows_length: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self.original_length > 0, self, f"original_length must be positive, got {self.original_length}")
        require(self.max_factor >= 1, self, f"max_factor must be at least 1, got {self.max_factor}")

    def row(self, plain: np.ndarray, factor: int) -> np.ndarray:
        """float64 frequencies [d/2] of one factor above 1."""
        del factor
        return plain

    def attention(self, factor: int) -> float:
        """What multiplies cos and sin at one factor above 1."""
        del factor
        return 1.0

    def table(self, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 frequencies [max_factor, d/2] and attention factors [max_factor]."""
        plain = self.plain(head_dim)
        factors = range(2, self.max_factor + 1)
        rows = np.stack([plain, *(self.row(plain, t) for t in factors)])
        return rows.astype(np.float32), np.array([1.0, *map(self.attention, factors)], np.float32)

    def index(self, length: Length) -> int | jax.Array:
        """The table's row for a running length."""
        if length is None or isinstance(length, int):
            return min(max(-(-(length or 1) // self.original_length), 1), self.max_factor) - 1
        return jnp.clip(-(-length // self.original_length), 1, self.max_factor) - 1

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        rows, attention = self.table(head_dim)
        at = self.index(length)
        if isinstance(at, int):
            return rows[at], float(attention[at])
        return jnp.asarray(rows)[at], jnp.asarray(attention)[at]


@dataclass(frozen=True)
class DynamicLinear(ByFactor):
    """Every frequency divided by t: E2-LLM's inference (Liu et al., arXiv 2401.06951), one model for many lengths."""

    def row(self, plain: np.ndarray, factor: int) -> np.ndarray:
        return plain / factor


@dataclass(frozen=True)
class DynamicYaRN(ByFactor):
    """YaRN with factor t, temperature included (arXiv 2309.00071, section 3.4, with whole factors)."""

    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._yarn(1)

    def _yarn(self, factor: int) -> YaRN:
        return YaRN(self.base, self.partial, float(factor), self.original_length, self.beta_fast, self.beta_slow)

    def row(self, plain: np.ndarray, factor: int) -> np.ndarray:
        return self._yarn(factor).mixed(plain, float(factor))

    def attention(self, factor: int) -> float:
        return self._yarn(factor).magnitude


@dataclass(frozen=True)
class Tabulated(ByFactor):
    """Rows for t = 2, 3... as numbers: how a solved `CLEX` flow is kept for decoding."""

    rows: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        require(
            len(self.rows) == self.max_factor - 1,
            self,
            f"rows must hold the factors 2..{self.max_factor}, got {len(self.rows)} rows",
        )

    def row(self, plain: np.ndarray, factor: int) -> np.ndarray:
        row = np.array(self.rows[factor - 2])
        require(len(row) == len(plain), self, f"a row needs {len(plain)} frequencies, got {len(row)}")
        return row


@dataclass(frozen=True)
class CLEX(ByFactor):
    """CLEX (Chen et al., arXiv 2310.16450): log-frequencies flow along dz/dt = f(z, t) + d log(NTK frequency)/dt.

    f is learnt (`lcjax.positions.clex.Flow`) and starts at zero, where row t is NTK-aware scaling by 2t - 1. Train with
    positions from `CLEXPositions`: the largest of a row tells its t, as the running length does afterwards.

    width: f's hidden features as a multiple of the rotary features. steps: Runge-Kutta steps for one unit of t.
    time_base: base of the frequencies that tell f the time.
    """

    max_factor: int = 16
    width: int = 1
    steps: int = 100
    time_base: float = 10_000.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("width", "steps"):
            require(getattr(self, name) >= 1, self, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.time_base > 1, self, f"time_base must be above 1, got {self.time_base}")

    def row(self, plain: np.ndarray, factor: int) -> np.ndarray:
        return plain / (2.0 * factor - 1.0) ** ntk_exponents(self, 2 * len(plain))
