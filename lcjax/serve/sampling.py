"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, with a seed per request.

Every number is an array over the batch, so requests with different settings share one compiled step, and a request's
random numbers depend on its own seed and step alone: it gets the same text in any batch (up to rounding of logits).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32


@dataclass(frozen=True)
class Sampling:
    """Settings of one request. Temperature 0 is greedy; the filters apply in the order top-k, top-p, min-p.

    top_k: keep the k likeliest tokens (0: all). top_p: keep the likeliest tokens that together reach this probability.
    min_p: keep tokens at least this fraction as likely as the likeliest. A tie at the border keeps both.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"Sampling.temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling.min_p must lie in [0, 1], got {self.min_p}")


class SamplingArrays(NamedTuple):
    """The settings of a batch on the device."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]


def stack(settings: Sequence[Sampling]) -> SamplingArrays:
    """One entry per request."""
    column = lambda name, dtype: jnp.asarray(np.array([getattr(s, name) for s in settings], dtype))
    return SamplingArrays(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        seed=jnp.asarray(np.array([s.seed % 2**32 for s in settings], np.uint32)),
    )


def sample(logits: Float[Array, "B V"], settings: SamplingArrays, step: Int[Array, "B"]) -> Int[Array, "B"]:
    """The next token of each request; `step[B]` counts the tokens it has been given so far."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    greedy = settings.temperature == 0
    draw = lambda: _draw(logits.astype(jnp.float32), settings, step)
    return lax.cond(jnp.all(greedy), lambda: best, lambda: jnp.where(greedy, best, draw()))


def _draw(logits: Array, settings: SamplingArrays, step: Array) -> Int[Array, "B"]:
    scaled = logits / jnp.where(settings.temperature == 0, 1.0, settings.temperature)[:, None]
    kept = jnp.where(_kept(scaled, settings), scaled, -jnp.inf)
    noise = jax.vmap(lambda seed, n: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), n), logits.shape[1:]))
    return jnp.argmax(kept + noise(settings.seed, step), axis=-1).astype(jnp.int32)


def _kept(scaled: Float[Array, "B V"], settings: SamplingArrays) -> Bool[Array, "B V"]:
    """Which tokens the filters leave."""
    filtered = jnp.any((settings.top_k > 0) | (settings.top_p < 1))
    border = lax.cond(filtered, lambda: _border(scaled, settings), lambda: jnp.full(scaled.shape[:1], -jnp.inf))
    likeliest = jnp.max(scaled, axis=-1)
    border = jnp.maximum(border, likeliest + jnp.log(settings.min_p))
    return scaled >= border[:, None]


def _border(scaled: Float[Array, "B V"], settings: SamplingArrays) -> Float[Array, "B"]:
    """The lowest logit that top-k and then top-p keep."""
    vocab = scaled.shape[1]
    falling = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
    k = jnp.where(settings.top_k == 0, vocab, jnp.minimum(settings.top_k, vocab))
    first = jnp.where(jnp.arange(vocab) < k[:, None], falling, -jnp.inf)
    probability = jax.nn.softmax(first, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the likelier tokens
    count = jnp.sum((before < settings.top_p[:, None]) & (first > -jnp.inf), axis=-1)
    return jnp.take_along_axis(falling, count[:, None] - 1, axis=1)[:, 0]
