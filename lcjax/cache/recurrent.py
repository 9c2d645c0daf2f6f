"""The cache of a recurrent mixer: a state of fixed size, whatever the length."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcjax.cache.base import appended, no_tokens
from pallas_kernels import LinearState

UNBOUNDED = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentCache:
    """The linear-attention state and, per convolved stream (such as 'q', 'k'), its last W-1 inputs."""

    state: LinearState
    tails: dict[str, Any]  # [B,W-1,C]
    length: Any  # int32 [B]
    start: Any  # int32 [B]

    @classmethod
    def init(cls, state: LinearState, tails: dict[str, Array]) -> "RecurrentCache":
        """From the zero state and zero tails of a mixer."""
        batch = state.s.shape[0]
        return cls(state, tails, no_tokens(batch), no_tokens(batch))

    @property
    def capacity(self) -> int:
        """Tokens that one request may reach: the state never fills (positions are int32)."""
        return UNBOUNDED

    @property
    def bytes(self) -> int:
        """Bytes of state, normaliser and convolution tails."""
        return sum(x.nbytes for x in jax.tree.leaves((self.state, self.tails)))

    def advance(
        self, state: LinearState, tails: dict[str, Array], tokens: int, valid: Bool[Array, "B T"] | None = None
    ) -> "RecurrentCache":
        """The cache after `tokens` more tokens, of which `valid` marks the real ones."""
        tails = {name: tail.astype(self.tails[name].dtype) for name, tail in tails.items()}
        count = appended(tokens, valid, self.length.shape[0])
        return replace(self, state=state, tails=tails, length=jnp.asarray(self.length) + count, start=self.length)


def ragged_tail(
    x: Float[Array, "B T C"], tail: Float[Array, "B W C"], valid: Bool[Array, "B T"] | None
) -> Float[Array, "B W C"]:
    """The last W inputs of a causal convolution after the real tokens of `x`, given the W before them."""
    width = tail.shape[1]
    if width == 0:
        return tail
    joined = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    count = jnp.asarray(appended(x.shape[1], valid, x.shape[0]))
    index = count[:, None] + jnp.arange(width, dtype=jnp.int32)
    return jnp.take_along_axis(joined, index[:, :, None], axis=1)


def zero_state(batch: int, heads: int, key_dim: int, value_dim: int, normalise: bool) -> LinearState:
    """The state before the first token."""
    z: Any = jnp.zeros((batch, heads, key_dim), jnp.float32) if normalise else None
    return LinearState(jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32), z)
