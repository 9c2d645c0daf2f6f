"""The rotary tables of one forward pass: for each law and remap, of its queries and of its keys."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from lcjax.positions.laws import Frequencies, Rope
from lcjax.positions.mrope import MRope
from lcjax.positions.remap import Remap
from lcjax.positions.rotary import Positions, Table, table_of
from lcjax.positions.xpos import XPos


class Tables(NamedTuple):
    """One table for each part of a remap; without one, a single part. Keys that turn alike in all parts have one."""

    queries: tuple[Table, ...]
    keys: tuple[Table, ...]


def rotates_at_read(law: Rope | None, remap: Remap | None) -> bool:
    """Whether a cached key turns by what is known only when it is read, so that caches hold keys unrotated."""
    return (law is not None and law.follows_length) or (remap is not None and remap.rotates_at_read)


def of_tokens(
    law: Rope, remap: Remap | None, frequencies: Frequencies, head_dim: int, positions: Positions, origin: int | Array
) -> Tables:
    """Tables of the tokens of a pass. origin: where xPos counts from (see `of_slots`)."""
    if isinstance(law, XPos) and law.scale_base is not None:
        span = positions.shape[-1] if isinstance(origin, int) is False else -(-positions.shape[-1] // 2)
        powers = law.powers(head_dim, positions, origin, span)
        cos, sin = table_of(frequencies, positions)
        up, down = jnp.exp(powers), jnp.exp(-powers)
        return Tables(((cos * up, sin * up),), ((cos * down, sin * down),))
    if isinstance(law, MRope) and positions.ndim == 3:
        positions = law.spread(positions, head_dim)
    if remap is None:
        table = (table_of(frequencies, positions),)
        return Tables(table, table)
    queries, keys = remap.queries(positions), remap.keys(positions)
    return Tables(*(tuple(table_of(frequencies, p) for p in places) for places in (queries, keys)))


def of_slots(
    law: Rope,
    remap: Remap | None,
    frequencies: Frequencies,
    head_dim: int,
    slots: Int[Array, "B S"],
    length: Int[Array, " B"],
) -> tuple[Table, ...]:
    """Tables of cached keys, for each part; xPos counts from the end of the text, where no factor exceeds 1."""
    if isinstance(law, XPos) and law.scale_base is not None:
        down = jnp.exp(-law.powers(head_dim, slots, length, 0))
        cos, sin = table_of(frequencies, slots)
        return ((cos * down, sin * down),)
    places = (slots,) if remap is None else remap.keys(slots)
    return tuple(table_of(frequencies, p) for p in places)
