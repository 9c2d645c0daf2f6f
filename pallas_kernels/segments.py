"""Packed rows: where each key stands in its document, and which tiles hold a document's sinks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

NONE = 2**30  # no such tile


def key_places(ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Index of each key in its segment, a run of equal ids: 0, 1, 2, ... from the run's first key.

    A query reads only keys of its own segment, so these are also distances from the start of the query's segment.
    """
    at = jnp.arange(ids.shape[1], dtype=jnp.int32)
    begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return at - lax.cummax(jnp.where(begins, at, 0), axis=1)


def sink_tiles(places: Int[Array, "B S"], sink: Int[Array | np.ndarray, " P"], tile: int) -> Bool[Array, "B P nK"]:
    """Which tiles of `tile` keys hold a sink of some segment, for each pattern's number of sinks."""
    places = jnp.pad(places, ((0, 0), (0, -places.shape[1] % tile)), constant_values=2**31 - 1)
    return places.reshape(places.shape[0], 1, -1, tile).min(-1) < jnp.asarray(sink)[:, None]


def first_run(some: Bool[Array, "*shape n"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
    """[begin, end) of the first run along the last axis; both are n where there is none."""
    at = jnp.arange(some.shape[-1], dtype=jnp.int32)
    least = lambda some: jnp.where(some, at, some.shape[-1]).min(-1)
    begin = least(some)
    return begin, least(~some & (at > begin[..., None]))


def sink_runs(wanted: Bool[Array, "B P nQ nK"]) -> tuple[Array, Array, Array, Array]:
    """Two runs of key tiles over what each query tile wants: (begin, stop, begin, stop), each int32 [B,P,nQ].

    The first run holds the sinks of the tile's first segment and has no holes. The second spans all others, which
    begin inside the tile: near its diagonal. An empty run begins at NONE and stops at 0.
    """
    tiles = wanted.shape[-1]
    at = jnp.arange(tiles, dtype=jnp.int32)
    begin, hole = first_run(wanted)
    rest = wanted & (at > hole[..., None])
    rest_begin, rest_stop = jnp.where(rest, at, NONE).min(-1), jnp.where(rest, at + 1, 0).max(-1)
    return jnp.where(begin < tiles, begin, NONE), jnp.where(begin < tiles, hole, 0), rest_begin, rest_stop
