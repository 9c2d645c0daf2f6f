"""Generating text: batches of prompts through a cache of fixed shape."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lcjax.cache import CacheLayout, cache_bytes
from lcjax.models.spec import ModelSpec
from lcjax.parallel.rules import batch_ways
from lcjax.serve.programs import Programs
from lcjax.serve.report import Report
from lcjax.serve.sampling import Sampling, stack
from lcjax.serve.steps import Limits
from lcjax.serve.text import TextStream


@dataclass(frozen=True)
class Request:
    """One prompt (text, or token ids as they are) and how to continue it."""

    prompt: str | tuple[int, ...]
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"Request.max_new_tokens must be positive, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Engine:
    """Sizes of the engine.

    capacity: tokens of prompt and answer that one request may need (None: the model's trained context). Caches are
    made in a few sizes up to it, so that another prompt of similar length compiles nothing.
    batch: most requests at once. chunk: prompt tokens read at a time. steps: tokens written a dispatch.
    slack: cache slots that a batch may get for each one it needs, so as to run a program that is compiled already.
    cache: how keys and values are kept.
    """

    capacity: int | None = None
    batch: int = 8
    chunk: int = 256
    steps: int = 8
    slack: int = 1
    cache: CacheLayout = field(default_factory=CacheLayout)

    def __post_init__(self):
        for name in ("capacity", "batch", "chunk", "steps", "slack"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"Engine.{name} must be positive, got {number}")

    def sizes(self, batch: int, capacity: int) -> dict[str, Any]:
        """The sizes of the programs for `batch` requests of `capacity` tokens."""
        own = {name: getattr(self, name) for name in ("chunk", "steps", "cache")}
        return own | {"batch": batch, "capacity": capacity}


class Piece(NamedTuple):
    """New text of request `index`; `done` with its last piece."""

    index: int
    text: str
    done: bool


@dataclass
class Completion:
    """An answer: its text, its token ids, and why it ended: 'end' (of text), 'stop' (string) or 'length'."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass
class _Row:
    index: int
    ids: list[int]
    request: Request
    stream: TextStream
    completion: Completion


class Generator:
    """Answers requests with one model. Programs are compiled once per (batch size, cache size) and kept."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        spec: ModelSpec,
        tokenizer: Any,
        engine: Engine | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """`graphdef, params = nnx.split(Decoder(...), nnx.Param)`; `tokenizer` as in `lcjax.data`.

        mesh: the one that `params` lie on. Requests are spread over its data and fsdp axes, heads over tensor; a batch
        is filled up with empty rows until it splits. Raises ValueError where `Engine.batch` does not split.
        """
        self._graphdef, self._params, self._spec, self._tokenizer = graphdef, params, spec, tokenizer
        self._engine = engine = engine or Engine()
        self._mesh, self._ways = mesh, batch_ways(mesh)
        if engine.batch % self._ways:
            raise ValueError(
                f"Engine.batch {engine.batch} does not split over the {self._ways} parts of the mesh axes data and "
                f"fsdp: use a multiple of {self._ways}, or lower them in favour of tensor"
            )
        self._programs: dict[tuple[int, int], Programs] = {}
        self.capacity = engine.capacity or spec.max_length
        self.report = Report()

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return sum(len(programs.compiled) for programs in self._programs.values())

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The answers, in the order of the requests."""
        completions = [Completion() for _ in requests]
        for _ in self.stream(requests, completions):
            pass
        return completions

    def stream(self, requests: Sequence[Request], completions: list[Completion] | None = None) -> Iterator[Piece]:
        """Pieces of text as they come; `completions`, where given, is filled in beside."""
        completions = [Completion() for _ in requests] if completions is None else completions
        self.report = Report()
        rows = [self._row(i, request, completions[i]) for i, request in enumerate(requests)]
        rows.sort(key=lambda row: len(row.ids))  # neighbours of similar length share a batch
        for begin in range(0, len(rows), self._engine.batch):
            yield from self._run(rows[begin : begin + self._engine.batch])

    def _row(self, index: int, request: Request, completion: Completion) -> _Row:
        """Tokenize and check one request before anything is launched."""
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt, add_bos=self._tokenizer.adds_bos)
        ids = [int(i) for i in prompt]
        if not ids:
            raise ValueError(f"request {index}: the prompt is empty; give at least one token")
        if max(ids) >= self._spec.vocab_size or min(ids) < 0:
            raise ValueError(
                f"request {index}: token id {max(ids) if min(ids) >= 0 else min(ids)} is not in the model's "
                f"vocabulary of {self._spec.vocab_size}; use the model's own tokenizer"
            )
        if len(ids) + request.max_new_tokens > self.capacity:
            raise ValueError(
                f"request {index}: the prompt has {len(ids)} tokens and up to {request.max_new_tokens} are to follow, "
                f"but the cache holds {self.capacity}; shorten the prompt, lower max_new_tokens, "
                "or raise Engine.capacity"
            )
        return _Row(index, ids, request, TextStream(self._tokenizer, request.stop), completion)

    def _run(self, rows: list[_Row]) -> Iterator[Piece]:
        batch, capacity = self._size(rows)
        settings = stack([row.request.sampling for row in rows] + [Sampling()] * (batch - len(rows)))
        programs = self._programs_for(batch, capacity)
        settings = programs.place((settings, self._limits(rows, batch)))
        chunks = [programs.place(chunk) for chunk in self._chunks(rows, batch)]
        programs.prepare(*settings, extend=len(chunks) > 1)
        self.report.compile_seconds += programs.compile_seconds

        began = time.perf_counter()
        state = programs.begin(*chunks[0], *settings)
        for chunk in chunks[1:]:
            state = programs.extend(state, *chunk, *settings)
        written = on_host(state.token)[:, None]
        self.report.add_prefill(sum(len(row.ids) for row in rows), time.perf_counter() - began)
        self.report.cache_bytes = max(self.report.cache_bytes, cache_bytes(state.caches))
        yield from self._decode(rows, programs, settings, state, written)

    def _decode(
        self, rows: list[Any], programs: Programs, settings: tuple[Any, Any], state: Any, written: np.ndarray
    ) -> Iterator[Piece]:
        """Hand out the tokens `[B,N]` of the prefill, then decode until every row has its reason to end."""
        batch = written.shape[0]
        while True:
            yield from self._take(rows, written)
            active = np.array([i < len(rows) and not rows[i].completion.reason for i in range(batch)])
            if not active.any():
                return
            began = time.perf_counter()
            state = state._replace(active=programs.place(jnp.asarray(active)))
            state, tokens = programs.decode(state, *settings)
            written = on_host(tokens)
            self.report.add_decode(int((written >= 0).sum()), time.perf_counter() - began)

    def _take(self, rows: list[_Row], written: np.ndarray) -> Iterator[Piece]:
        """Hand the new tokens `[B,N]` to their rows."""
        ends = self._tokenizer.stop_ids
        for row, column in zip(rows, written, strict=False):
            done = row.completion
            if done.reason:
                continue
            text = ""
            for token in (int(t) for t in column if t >= 0):
                if token in ends:
                    done.reason = "end"
                    break
                done.tokens.append(token)
                text += row.stream.push([token])
                if row.stream.stopped:
                    done.reason = "stop"
                    break
            if not done.reason and len(done.tokens) >= row.request.max_new_tokens:
                done.reason = "length"
            if done.reason:
                text += row.stream.finish()
            done.text = row.stream.text
            if text or done.reason:
                yield Piece(row.index, text, bool(done.reason))

    def _limits(self, rows: list[_Row], batch: int) -> Limits:
        none = [0] * (batch - len(rows))
        tokens = [row.request.max_new_tokens for row in rows] + none
        lengths = [len(row.ids) + row.request.max_new_tokens for row in rows] + none
        ends = sorted(self._tokenizer.stop_ids) or [-1]
        return Limits(*(jnp.asarray(each, jnp.int32) for each in (tokens, ends, lengths)))

    def _chunks(self, rows: list[_Row], batch: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """(tokens `[B,C]`, valid `[B,C]`, last `[B]`) until every prompt is read; padding on the right."""
        size = self._engine.chunk
        lengths = np.array([len(row.ids) for row in rows] + [0] * (batch - len(rows)))
        padded = np.zeros((batch, -(-int(lengths.max()) // size) * size), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row.ids)] = row.ids
        for begin in range(0, padded.shape[1], size):
            valid = np.arange(begin, begin + size) < lengths[:, None]
            last = (lengths > begin) & (lengths <= begin + size)
            yield jnp.asarray(padded[:, begin : begin + size]), jnp.asarray(valid), jnp.asarray(last)

    def _size(self, rows: list[Any]) -> tuple[int, int]:
        """(batch, capacity) of the smallest compiled programs within the slack, else the bucket that fits."""
        needed = max(len(row.ids) + row.request.max_new_tokens for row in rows)
        batch = min(bucket(-(-len(rows) // self._ways), 1) * self._ways, self._engine.batch)
        capacity = min(bucket(needed, 512), -(-self.capacity // 256) * 256)
        most = self._engine.slack * batch * capacity
        fits = [(b, c) for b, c in self._programs if b >= len(rows) and c >= needed and b * c <= most]
        return min(fits, key=math.prod, default=(batch, capacity))

    def _programs_for(self, batch: int, capacity: int) -> Programs:
        if (batch, capacity) not in self._programs:
            sizes = self._engine.sizes(batch, capacity)
            self._programs[batch, capacity] = Programs(self._graphdef, self._params, self._spec, sizes, self._mesh)
        return self._programs[batch, capacity]


def on_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def bucket(number: int, least: int) -> int:
    """The smallest of least, 1.5 least, 2 least, 3 least, 4 least... that is not below `number` (for least >= 2)."""
    size = least
    while size < number:
        if size >= 2 and size * 3 // 2 >= number:
            return size * 3 // 2
        size *= 2
    return size
