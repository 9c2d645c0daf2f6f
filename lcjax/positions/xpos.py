"""xPos (Sun et al., arXiv 2212.10554): rotary scores that decay with distance, faster for the quicker pairs."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcjax.positions.laws import Rope, require

WIDEST = 80.0  # |ln| of a factor that float32 holds with room to spare


@dataclass(frozen=True)
class XPos(Rope):
    """The score of pair i at distance m - n is multiplied by zeta_i^((m - n) / scale_base).

    zeta_i = (2i/d + gamma) / (1 + gamma). Queries carry the positive and keys the negative power, counted from the
    middle of the text at hand or, where keys are cached unrotated, from its end: the origin cancels. scale_base None
    switches the decay off: plain rotary.
    """

    scale_base: float | None = 512.0
    gamma: float = 0.4

    follows_length: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("scale_base", "gamma"):
            value = getattr(self, name)
            require(value is None or value > 0, self, f"{name} must be positive, got {value}")

    def powers(
        self, head_dim: int, positions: Int[Array, "B T"], origin: int | Int[Array, " B"], span: int
    ) -> Float[Array, "B T n"]:
        """ln of a query's factor at each position (a key's is its negative).

        span: how far from the origin, against the direction of decay, a position may lie. Raises ValueError where
        float32 could not hold the factors of such a span.
        """
        assert self.scale_base is not None
        dim = self.rotary_dim(head_dim)
        decay = np.log((np.arange(0, dim, 2) / dim + self.gamma) / (1 + self.gamma))
        least = math.ceil(float(-decay[0]) * span / WIDEST)
        require(
            self.scale_base >= least,
            self,
            f"scale_base {self.scale_base} is too small for {span} tokens from the origin; use at least {least}",
        )
        origin = jnp.asarray(origin)
        distance = (positions - (origin if origin.ndim == 0 else origin[:, None])).astype(jnp.float32)
        return distance[..., None] * (decay / self.scale_base).astype(np.float32)
