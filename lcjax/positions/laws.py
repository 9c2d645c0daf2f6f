"""Rotary frequency laws. A law maps (head_dim, running length) to per-pair frequencies in radians per token.

Frequencies are worked out in float64 on the host and rounded once to float32. Only laws that follow the running length
(`follows_length`) return a JAX array, and only when the length itself is traced: `[..., d/2]` for lengths `[...]`.

Adjusted base frequency (ABF; Xiong et al., arXiv 2309.16039) is no law of its own: it is `Rope` with a larger `base`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

type Length = int | jax.Array | None
type Frequencies = tuple[np.ndarray | jax.Array, float | jax.Array]


def require(condition: bool, law: object, message: str) -> None:
    """Raise a ValueError that names the law when `condition` is false."""
    if not condition:
        raise ValueError(f"{type(law).__name__}: {message}")


@dataclass(frozen=True)
class Rope:
    """Plain rotary embedding (Su et al., arXiv 2104.09864): frequency of pair i is base^(-2i/d).

    `partial` is the share of the head that rotates (d = int(head_dim * partial)); the rest passes through.
    """

    base: float = 10_000.0
    partial: float = 1.0

    follows_length: ClassVar[bool] = False  # frequencies depend on the running length: keys are rotated when read

    def __post_init__(self):
        require(self.base > 1, self, f"base must be above 1, got {self.base}")
        require(0 < self.partial <= 1, self, f"partial must lie in (0, 1], got {self.partial}")

    def rotary_dim(self, head_dim: int) -> int:
        """How many leading features of a head rotate."""
        dim = int(head_dim * self.partial)
        require(
            dim >= 2 and dim % 2 == 0,
            self,
            f"{dim} rotary features of head_dim {head_dim} are not a positive even number",
        )
        return dim

    def plain(self, head_dim: int) -> np.ndarray:
        """float64 frequencies [d/2] before any scaling."""
        dim = self.rotary_dim(head_dim)
        return 1.0 / self.base ** (np.arange(0, dim, 2) / dim)

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        """Frequencies float32 [d/2] in radians per token, and the factor that multiplies cos and sin.

        `length` is the number of tokens seen so far (largest position + 1); laws that don't follow it ignore it.
        """
        del length
        return self.plain(head_dim).astype(np.float32), 1.0


@dataclass(frozen=True)
class Scaled(Rope):
    """A law with a stretch factor; factor 1 is plain rotary, bit for bit."""

    factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self.factor >= 1, self, f"factor must be at least 1, got {self.factor}")


def ntk_exponents(law: object, dim: int) -> np.ndarray:
    """Powers of the growth that divide each pair's frequency: d/(d-2) of the base change, folded into 2i/d."""
    require(dim > 2, law, f"needs more than 2 rotary features, got {dim}")
    return np.arange(0, dim, 2) / (dim - 2)


@dataclass(frozen=True)
class Linear(Scaled):
    """Position interpolation (Chen et al., arXiv 2306.15595): every frequency divided by `factor`."""

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        del length
        return (self.plain(head_dim) / self.factor).astype(np.float32), 1.0


@dataclass(frozen=True)
class NTK(Scaled):
    """NTK-aware scaling (Peng et al., arXiv 2309.00071, section 3.1): base b becomes b * factor^(d / (d - 2)).

    The first pair keeps its frequency, the last is divided by `factor`.
    """

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        del length
        plain = self.plain(head_dim)
        return (plain / self.factor ** ntk_exponents(self, 2 * len(plain))).astype(np.float32), 1.0


@dataclass(frozen=True)
class DynamicNTK(Scaled):
    """NTK-aware base change that follows the running length; equals plain rotary up to `original_length`.

    Base b becomes b * (factor * l / L - (factor - 1))^(d / (d - 2)) for l = max(length, L), as in HF transformers. All
    keys turn with the frequencies of the length at which they are read (HF keeps those of the step that wrote them).
    """

    original_length: int = 0

    follows_length: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self.original_length > 0, self, f"original_length must be positive, got {self.original_length}")

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        plain = self.plain(head_dim)
        exponents = ntk_exponents(self, 2 * len(plain))
        if length is None or (isinstance(length, int) and length <= self.original_length):
            return plain.astype(np.float32), 1.0
        if isinstance(length, int):
            growth = self.factor * length / self.original_length - (self.factor - 1)
            return (plain / growth**exponents).astype(np.float32), 1.0
        length = length[..., None]
        growth = self.factor * length.astype(jnp.float32) / self.original_length - (self.factor - 1)
        scaled = plain.astype(np.float32) * jnp.maximum(growth, 1.0) ** -exponents.astype(np.float32)
        return jnp.where(length > self.original_length, scaled, plain.astype(np.float32)), 1.0


@dataclass(frozen=True)
class YaRN(Scaled):
    """YaRN (Peng et al., arXiv 2309.00071) with the ramp of the authors' code and of HF: linear in the pair index.

    `attention_factor`, else mscale / mscale_all_dim, else 0.1 ln(factor) + 1 multiplies cos and sin.
    """

    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.original_length > 0, self, f"original_length must be positive, got {self.original_length}")
        require(
            self.beta_fast > self.beta_slow > 0,
            self,
            f"needs beta_fast > beta_slow > 0, got {self.beta_fast}, {self.beta_slow}",
        )

    def _turning_pair(self, turns: float, dim: int) -> float:
        """Index of the pair that makes `turns` turns within the original length."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

    @property
    def magnitude(self) -> float:
        """What multiplies cos and sin."""

        def growth(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        del length
        plain = self.plain(head_dim)
        if self.factor == 1:
            return plain.astype(np.float32), self.magnitude
        return self.mixed(plain, self.factor).astype(np.float32), self.magnitude

    def mixed(self, plain: np.ndarray, factor: float) -> np.ndarray:
        """The frequencies `plain` [d/2] stretched by `factor`, float64."""
        dim = 2 * len(plain)
        low, high = self._turning_pair(self.beta_fast, dim), self._turning_pair(self.beta_slow, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        return plain / factor * ramp + plain * (1 - ramp)


@dataclass(frozen=True)
class ByParts(Scaled):
    """NTK-by-parts (arXiv 2309.00071, section 3.2): by the turns a pair makes within `original_length`.

    Below `low_turns` (the paper's alpha) its frequency is divided by `factor`, above `high_turns` (beta) it is kept, in
    between the two are mixed, linear in turns. YaRN's code, and `YaRN` here, mixes linear in the pair's index instead.
    """

    original_length: int = 0
    low_turns: float = 1.0
    high_turns: float = 32.0

    def __post_init__(self):
        super().__post_init__()
        require(self.original_length > 0, self, f"original_length must be positive, got {self.original_length}")
        require(
            self.high_turns > self.low_turns > 0,
            self,
            f"needs high_turns > low_turns > 0, got {self.high_turns}, {self.low_turns}",
        )

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        del length
        plain = self.plain(head_dim)
        if self.factor == 1:
            return plain.astype(np.float32), 1.0
        turns = self.original_length * plain / (2 * math.pi)
        kept = np.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0, 1)
        return ((1 - kept) * plain / self.factor + kept * plain).astype(np.float32), 1.0


@dataclass(frozen=True)
class Llama3(ByParts):
    """Llama 3.1's settings of `ByParts`."""

    high_turns: float = 4.0


@dataclass(frozen=True)
class LongRoPE(Rope):
    """LongRoPE (Ding et al., arXiv 2402.13753): searched divisors per pair, other ones beyond the original length.

    cos and sin are multiplied by `attention_factor`, else sqrt(1 + ln(factor) / ln(original_length)), at every length.
    """

    original_length: int = 0
    factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None

    follows_length: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self.original_length > 1, self, f"original_length must be above 1, got {self.original_length}")
        require(self.factor >= 1, self, f"factor must be at least 1, got {self.factor}")

    @property
    def magnitude(self) -> float:
        """What multiplies cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        plain = self.plain(head_dim)
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            require(len(factors) == len(plain), self, f"{name} needs {len(plain)} entries, got {len(factors)}")
        short = (plain / np.array(self.short_factor)).astype(np.float32)
        long = (plain / np.array(self.long_factor)).astype(np.float32)
        if length is None or isinstance(length, int):
            return (long if (length or 0) > self.original_length else short), self.magnitude
        return jnp.where(length[..., None] > self.original_length, long, short), self.magnitude


@dataclass(frozen=True)
class Proportional(Scaled):
    """HF's `proportional`: the first share `partial` of the pairs turn at full-head exponents, the rest stand still."""

    def frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        del length
        rotating = int(self.partial * head_dim // 2)
        require(
            head_dim % 2 == 0 and rotating >= 1,
            self,
            f"no pair of head_dim {head_dim} rotates at partial {self.partial}",
        )
        moving = 1.0 / self.base ** (np.arange(0, 2 * rotating, 2) / head_dim) / self.factor
        return np.concatenate([moving, np.zeros(head_dim // 2 - rotating)]).astype(np.float32), 1.0
