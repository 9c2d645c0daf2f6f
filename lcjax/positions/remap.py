"""Remaps: the key a query meets decides which of several rotations of the query, or of both, makes the score.

A remap cuts the causal keys of a query into parts and names, for each part, the positions that query and key turn to;
the parts' softmaxes are merged exactly. It works with any frequency law. Positions are those in the row or cache, not
in a packed document: distances are the same, and the borders of the parts lie where the masks have them.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from lcjax.parallel import ops
from pallas_kernels.masks import Causal, Window

type Where = Int[Array, "B T"] | Int[Array, "B T n"]
type Queries = tuple[Float[Array, "B T H D"], ...]
type Keys = tuple[Float[Array, "B S K D"], ...]


@dataclass(frozen=True)
class Remap:
    """Base: how to place the parts and how to attend, over arrays or over a cache."""

    rotates_at_read: ClassVar[bool] = True  # keys turn differently in different parts: caches hold them unrotated

    def queries(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        """The position of a query in each part."""
        raise NotImplementedError

    def keys(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        """The position of a key in each part, or one for all parts."""
        raise NotImplementedError

    def attend(
        self, queries: Queries, keys: Keys, v: Float[Array, "B T K Dv"], **options: Any
    ) -> Float[Array, "B T H Dv"]:
        """Causal self-attention over the rotated parts; options as `pallas_kernels.block_sparse_attention`."""
        raise NotImplementedError

    def attend_cached(self, queries: Queries, keys: Keys, cache: Any, **options: Any) -> Float[Array, "B T H Dv"]:
        """The same for the last tokens of a cache; `keys` are the rotated slots of each part (rotates_at_read)."""
        raise NotImplementedError


@dataclass(frozen=True)
class DualChunk(Remap):
    """Dual chunk attention (An et al., arXiv 2402.17463): distances up to `local` + 1 are exact, none exceeds `size`.

    Keys turn to their position modulo the chunk of size - local tokens; a query to its own position modulo the chunk
    for keys of its chunk, one chunk further (at most `size`) for the chunk before, to `size` for older ones. For a
    model trained to L the authors take size 3L/4 and local L/8. A text within one chunk is plain rotary attention.
    """

    rotates_at_read: ClassVar[bool] = False

    size: int = 6144
    local: int = 1024

    def __post_init__(self):
        if self.local < 1 or self.size <= self.local:
            raise ValueError(
                f"DualChunk: size {self.size} does not fit: it must be above local {self.local}, and that at least 1"
            )
        if self.size > 2 * self.chunk:
            raise ValueError(
                f"DualChunk: local {self.local} is more than half of size {self.size}; chunks of {self.chunk} tokens "
                "would leave distances beyond two chunks"
            )

    @property
    def chunk(self) -> int:
        """Tokens after which key positions start again."""
        return self.size - self.local

    def queries(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        own = positions % self.chunk
        return own, jnp.minimum(own + self.chunk, self.size), jnp.full_like(positions, self.size)

    def keys(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        return (positions % self.chunk,)

    def attend(
        self, queries: Queries, keys: Keys, v: Float[Array, "B T K Dv"], **options: Any
    ) -> Float[Array, "B T H Dv"]:
        return ops.dual_chunk_attention(queries, keys[0], v, chunk=self.chunk, **options)

    def attend_cached(self, queries: Queries, keys: Keys, cache: Any, **options: Any) -> Float[Array, "B T H Dv"]:
        if queries[0].shape[1] == 1:
            return self._step(queries, cache, **options)
        masks = pk.chunk_masks(self.chunk, cache.capacity)
        sinks = options.pop("sink_logits", None)
        parts = [
            cache.attend(q, mask, sink_logits=sinks if n == 0 else None, **options)
            for n, (q, mask) in enumerate(zip(queries, masks, strict=True))
        ]
        return pk.merge_attention(*parts)[0]

    def _step(self, queries: Queries, cache: Any, **options: Any) -> Float[Array, "B 1 H Dv"]:
        """One new token a request: each part is a run of keys that ends a cache, so that no key is read for another.

        Requests are at different places in their chunks: the keys of their own chunk are copied to one place.
        """
        if cache.capacity <= self.chunk:
            return cache.attend(queries[0], Causal(), **options | {"return_lse": False})[0]
        place = jnp.asarray(cache.start)
        begin = place - place % self.chunk
        parts = [cache.stretch(begin, self.chunk).attend(queries[0], Causal(), **options)]
        options.pop("sink_logits", None)
        for n, mask in enumerate((Causal() & Window(self.chunk), Causal())):
            end = jnp.maximum(begin - n * self.chunk, 0)
            parts.append(replace(cache, start=end - 1, length=end).attend(queries[n + 1], mask, **options))
        return pk.merge_attention(*parts)[0]


@dataclass(frozen=True)
class SelfExtend(Remap):
    """Self-Extend (Jin et al., arXiv 2401.01325): the last `window` keys at their distance, older ones by groups.

    Beyond the window positions are divided by `group` and rounded down; a query is shifted so that a distance of
    `window` stays `window` where `group` divides it. group 1 is plain rotary attention.
    """

    group: int = 1
    window: int = 1024

    def __post_init__(self):
        if self.group < 1 or self.window < 1:
            raise ValueError(f"SelfExtend: group {self.group} and window {self.window} must be at least 1")

    def queries(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        return positions, positions // self.group + (self.window - self.window // self.group)

    def keys(self, positions: Int[Array, "B T"]) -> tuple[Where, ...]:
        return positions, positions // self.group

    def far(self, queries: Queries, keys: Keys) -> tuple[Float[Array, "B T H E"], Float[Array, "B S K E"]]:
        """What makes the scores beyond the window."""
        return queries[1], keys[1]

    def attend(
        self, queries: Queries, keys: Keys, v: Float[Array, "B T K Dv"], **options: Any
    ) -> Float[Array, "B T H Dv"]:
        length, lag = v.shape[1], self.window
        if length <= lag:
            return cast(jax.Array, ops.attention(queries[0], keys[0], v, Causal(), **options))
        options["scale"] = options.get("scale") or v.shape[-1] ** -0.5
        near = ops.attention(queries[0], keys[0], v, Causal() & Window(lag), return_lse=True, **options)
        ids = options.pop("segment_ids", None)
        options.pop("sink_logits", None)  # they joined the near part
        q, k = self.far(queries, keys)  # row r of the far queries, at position r + lag, sees keys up to r
        q, k, v = q[:, lag:], k[:, :-lag], v[:, :-lag]
        pair = None if ids is None else (ids[:, lag:], ids[:, :-lag])
        far = ops.attention(q, k, v, Causal(), segment_ids=pair, return_lse=True, **options)
        o, lse = cast(tuple[jax.Array, jax.Array], far)
        o = jnp.pad(o, ((0, 0), (lag, 0), (0, 0), (0, 0)))
        lse = jnp.pad(lse, ((0, 0), (0, 0), (lag, 0)), constant_values=-jnp.inf)
        return pk.merge_attention(cast(Any, near), (o, lse))[0]

    def attend_cached(self, queries: Queries, keys: Keys, cache: Any, **options: Any) -> Float[Array, "B T H Dv"]:
        tokens = queries[0].shape[1]
        options["scale"] = options.get("scale") or queries[0].shape[-1] ** -0.5
        near = cache.with_keys(keys[0]).attend(queries[0], Causal() & Window(self.window), **options)
        options.pop("sink_logits", None)
        q, k = self.far(queries, keys)
        # A cache that ends `window` tokens earlier: rows before its beginning see nothing.
        start = jnp.maximum(jnp.asarray(cache.start) - self.window, -tokens)
        held = jnp.maximum(jnp.asarray(cache.length) - self.window, 0)
        far = replace(cache.with_keys(k), start=start, length=held).attend(q, Causal(), **options)
        return pk.merge_attention(near, far)[0]
