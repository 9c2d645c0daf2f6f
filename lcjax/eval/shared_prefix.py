"""Prompts that begin alike, read once: the common part is prefilled for one row and its caches are copied."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from lcjax.cache import cache_bytes
from lcjax.serve.engine import Completion, Generator, Request
from lcjax.serve.programs import Programs
from lcjax.serve.report import Report
from lcjax.serve.sampling import Sampling, stack


@runtime_checkable
class Answers(Protocol):
    """What a run of a suite needs of an engine: greedy answers in order, and a report of the tokens that were read."""

    report: Report

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Ids that all prompts share from their start on."""
    first, last = min(prompts), max(prompts)
    count = 0
    while count < min(len(first), len(last)) and first[count] == last[count]:
        count += 1
    return count


class SharedPrefixGenerator(Generator):
    """A `Generator` whose batches skip what their prompts have in common.

    Only whole chunks are shared, and every prompt keeps at least one token of its own, so that the programs and the
    numbers are those of the plain engine: the chunk borders are the same. With a paged cache nothing is shared: its
    pool has no axis of requests along which the caches of one could be copied. Nor with a law that follows the length,
    under which a prefix depends on what comes after it.
    """

    shared_tokens = 0  # prompt tokens that were not read again

    def _run(self, rows: list[Any]) -> Iterator[Any]:
        size = self._engine.chunk
        shared = min(common_prefix([row.ids for row in rows]), min(len(row.ids) for row in rows) - 1) // size * size
        follows = any(law.follows_length for law, _ in self._spec.laws)
        if len(rows) == 1 or shared < size or follows or self._engine.cache.kind == "paged":
            yield from super()._run(rows)
            return
        batch, capacity = self._size(rows)
        sampling = stack([row.request.sampling for row in rows] + [Sampling()] * (batch - len(rows)))
        settings = sampling, self._limits(rows, batch)
        programs = self._programs_for(batch, capacity)
        programs.prepare(*settings, extend=True)
        self.report.compile_seconds += programs.compile_seconds

        one, alone = self._prefix_programs(rows[0], capacity)
        began = time.perf_counter()
        state = jax.tree.map(lambda leaf: jnp.repeat(leaf, batch, axis=0), self._read(one, alone, rows[0].ids[:shared]))
        for tokens, valid, last in list(self._chunks(rows, batch))[shared // size :]:
            state = programs.extend(state, tokens, valid, last, *settings)
        written = np.asarray(state.token)[:, None]
        read = shared + sum(len(row.ids) - shared for row in rows)
        self.report.add_prefill(read, time.perf_counter() - began)
        self.report.cache_bytes = max(self.report.cache_bytes, cache_bytes(state.caches))
        self.shared_tokens += shared * (len(rows) - 1)
        yield from self._decode(rows, programs, settings, state, written)

    def _prefix_programs(self, row: Any, capacity: int) -> tuple[Programs, tuple[Any, Any]]:
        """Programs of one row with caches of the batch's size."""
        settings = stack([row.request.sampling]), self._limits([row], 1)
        programs = self._programs_for(1, capacity)
        programs.prepare(*settings, extend=True)
        self.report.compile_seconds += programs.compile_seconds
        return programs, settings

    def _read(self, programs: Programs, settings: tuple[Any, Any], ids: list[int]) -> Any:
        """State after whole chunks of `ids`; no token is sampled."""
        size = self._engine.chunk
        whole, none = jnp.ones((1, size), bool), jnp.zeros((1,), bool)
        state = None
        for begin in range(0, len(ids), size):
            tokens = jnp.asarray([ids[begin : begin + size]], jnp.int32)
            if state is None:
                state = programs.begin(tokens, whole, none, *settings)
            else:
                state = programs.extend(state, tokens, whole, none, *settings)
        return state


def answer_batch(generator: Answers, prompts: Sequence[tuple[int, ...]], limits: Sequence[int]) -> list[Completion]:
    """Greedy answers to prompt ids, in order, with at most `limits` new tokens each."""
    requests = [Request(ids, max_new_tokens=limit) for ids, limit in zip(prompts, limits, strict=True)]
    return generator.generate(requests)
