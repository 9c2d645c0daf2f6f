"""The two programs of decoding, as pure functions of fixed shapes: read a chunk of the prompts, write some tokens.

Jit them with the state donated: caches are then updated in place. Rows are independent; `active` and `valid` say which
take part, so a batch of prompts of different lengths, some of them finished, runs the same program.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int

from lcjax.cache.base import Counts
from lcjax.cache.counts import counted, uncounted
from lcjax.cache.placing import constrained
from lcjax.serve.sampling import SamplingArrays, sample


class DecodeState(NamedTuple):
    """What a batch carries from program to program."""

    caches: tuple[Any, ...]  # without their counts of tokens: see `lcjax.cache.counts`
    length: Counts  # tokens that every layer's cache holds
    token: Int[Array, "B"]  # sampled, not yet read by the model
    count: Int[Array, "B"]  # tokens sampled so far
    active: Bool[Array, "B"]


class Limits(NamedTuple):
    """When a row ends: after `tokens[B]`, or at one of the ids in `ends[E]` (-1: none).

    length: tokens of a row's prompt and its longest answer. Laws that follow the length take it from the first chunk
    to the last token, so that an answer depends neither on the chunks nor on the batch.
    """

    tokens: Int[Array, "B"]
    ends: Int[Array, "E"]
    length: Int[Array, "B"]


def prefill(
    graphdef: Any,
    params: Any,
    state: DecodeState,
    tokens: Int[Array, "B C"],
    valid: Bool[Array, "B C"],
    last: Bool[Array, "B"],
    sampling: SamplingArrays,
    limits: Limits,
) -> DecodeState:
    """Read one chunk of every prompt; the rows whose prompt ends here (`last`) sample their first token."""
    model = nnx.merge(graphdef, params)
    caches = counted(state.caches, state.length)
    hidden, caches = model.hidden(tokens, caches=caches, valid=valid, lengths=limits.length)
    end = jnp.maximum(jnp.sum(valid, axis=1) - 1, 0)
    final = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
    token = jnp.where(last, sample(model.logits(final), sampling, state.count), state.token)
    count = state.count + last
    active = jnp.where(last, _goes_on(token, count, limits), state.active)
    return constrained(DecodeState(*uncounted(caches), token, count, active))


def decode(
    graphdef: Any, params: Any, state: DecodeState, sampling: SamplingArrays, limits: Limits, *, steps: int
) -> tuple[DecodeState, Int[Array, "B N"]]:
    """Write up to `steps` tokens a row in one dispatch; -1 stands where a row has ended."""
    model = nnx.merge(graphdef, params)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        valid = state.active
        caches = counted(state.caches, state.length)
        hidden, caches = model.hidden(state.token[:, None], caches=caches, valid=valid[:, None], lengths=limits.length)
        token = jnp.where(valid, sample(model.logits(hidden[:, 0]), sampling, state.count), state.token)
        count = state.count + valid
        new = DecodeState(*uncounted(caches), token, count, valid & _goes_on(token, count, limits))
        return constrained(new), jnp.where(valid, token, -1)

    state, written = lax.scan(step, state, length=steps)
    return state, written.T


def _goes_on(token: Array, count: Array, limits: Limits) -> Bool[Array, "B"]:
    return (count < limits.tokens) & ~jnp.any(token[:, None] == limits.ends, axis=1)
