"""From a mask's disjunction of leaves to a plan's numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.plan import INF, Ints, Plan, namespace

type Rows = tuple[Ints, Ints | None]  # of each key block: rows below an expiry, and one later interval


@dataclasses.dataclass(frozen=True)
class Form:
    """Normal form before the sizes of a call are known: causal AND same segment AND any of `terms`.

    A term is a tuple of leaf masks that must all hold; `terms` is None where every key is allowed.
    """

    causal: bool = False
    segments: bool = False
    terms: tuple[tuple[Any, ...], ...] | None = None


def plan_of(forms: Sequence[Form], heads: Any, keys: int, block_k: int) -> Plan:
    """The plan of `keys` keys for one form per pattern; its block divides `block_k` and every block of the leaves."""
    atoms = [atom for form in forms for term in form.terms or () for atom in term]
    grain = math.gcd(block_k, *(atom.block for atom in atoms if atom.kind == "columns"))
    parts = [_numbers(form, keys, grain) for form in forms]
    count = -(-keys // grain)
    expiry = _stack_rows([rows and rows[0] for _, _, rows in parts], (count,))
    second = _stack_rows([rows and rows[1] for _, _, rows in parts], (count, 2))
    sink, window = _stack([part[0] for part in parts]), _stack([part[1] for part in parts])
    return Plan(forms[0].causal, grain, sink, window, expiry, second, heads)


def _numbers(form: Form, keys: int, grain: int) -> tuple[Any, Any, Rows | None]:
    """(sink, window, (expiry, second) or None) of one pattern, columns in blocks of `grain` keys."""
    if form.terms is None:
        return np.int32(INF), np.int32(0), None
    sink, window, rows = np.int32(0), np.int32(0 if form.causal else -INF), None
    for term in form.terms:
        kinds = {atom.kind for atom in term}
        if kinds == {"sink"}:
            sink = _extreme(max, [sink, _extreme(min, [a.n for a in term])])
        elif kinds == {"window"}:
            window = _extreme(max, [window, _extreme(min, [a.n for a in term])])
        elif kinds == {"lists"} and len(term) == 1:
            continue
        elif kinds <= {"sink", "columns"}:
            mine = functools.reduce(_intersect, [_atom_rows(atom, keys, grain) for atom in term])
            rows = mine if rows is None else _unite(rows, mine)
        else:
            raise ValueError(
                f"mask: {' & '.join(map(str, term))} does not reduce to the normal form (a window or a list cannot be"
                " intersected with another kind)"
            )
    return sink, window, rows


def _extreme(choose: Callable, values: list) -> Any:
    if all(isinstance(v, int | np.integer) for v in values):
        return np.int32(choose(values))
    combine = jnp.maximum if choose is max else jnp.minimum
    total = jnp.asarray(values[0], jnp.int32)
    for value in values[1:]:
        total = combine(total, jnp.asarray(value, jnp.int32))
    return total


def _atom_rows(atom: Any, keys: int, grain: int) -> Rows:
    count = -(-keys // grain)
    if atom.kind == "sink":
        if not isinstance(atom.n, int | np.integer) or (atom.n % grain and atom.n < keys):
            raise ValueError(f"mask: Sink({atom.n}) intersected with blocks must be a known multiple of {grain} keys")
        return np.where(np.arange(count) * grain < atom.n, np.int32(INF), np.int32(0)), None
    expiry, second = atom.rows(keys)
    xp = namespace(expiry, second)
    expiry = xp.repeat(expiry, atom.block // grain, axis=0)[:count].astype(np.int32)
    if second is not None:
        second = xp.repeat(second, atom.block // grain, axis=0)[:count].astype(np.int32)
    return expiry, second


def _unite(a: Rows, b: Rows) -> Rows:
    """Union of two row sets per column, each rows < expiry and one interval; refused if two apart intervals remain."""
    xp = namespace(*a, *b)
    expiry = xp.maximum(a[0], b[0])
    spans = [s for s in (a[1], b[1]) if s is not None]
    if len(spans) < 2:
        return expiry, spans[0] if spans else None
    if xp is jnp:
        raise ValueError("mask: two Intervals with second intervals can be united only when their numbers are known")
    for s in spans * 2:  # twice: the first may reach the second only after it grew
        expiry = np.where((s[:, 0] <= expiry) & (s[:, 0] < s[:, 1]), np.maximum(expiry, s[:, 1]), expiry)
    left, right = (np.where((s[:, 1] > np.maximum(s[:, 0], expiry))[:, None], s, 0) for s in spans)
    empty = [s[:, 0] >= s[:, 1] for s in (left, right)]
    apart = ~empty[0] & ~empty[1] & (np.maximum(left[:, 0], right[:, 0]) > np.minimum(left[:, 1], right[:, 1]))
    if apart.any():
        raise ValueError(f"mask: key block {int(np.argmax(apart))} would need three intervals of rows, two fit")
    hull = np.stack([np.minimum(left[:, 0], right[:, 0]), np.maximum(left[:, 1], right[:, 1])], -1)
    both = (~empty[0] & ~empty[1])[:, None]
    return expiry, np.where(both, hull, np.where(empty[0][:, None], right, left)).astype(np.int32)


def _intersect(a: Rows, b: Rows) -> Rows:
    xp = namespace(*a, *b)
    total = (xp.minimum(a[0], b[0]), None)
    pieces = [xp.stack([s[:, 0], xp.minimum(s[:, 1], e)], -1) for s, e in ((a[1], b[0]), (b[1], a[0])) if s is not None]
    if a[1] is not None and b[1] is not None:
        pieces.append(xp.stack([xp.maximum(a[1][:, 0], b[1][:, 0]), xp.minimum(a[1][:, 1], b[1][:, 1])], -1))
    for piece in pieces:
        total = _unite(total, (xp.zeros_like(total[0]), piece))
    return total


def _stack(values: list) -> Ints:
    xp = namespace(*values)
    return xp.stack([xp.asarray(v, np.int32) for v in values])


def _stack_rows(rows: list, shape: tuple[int, ...]) -> Ints | None:
    if all(row is None for row in rows):
        return None
    xp = namespace(*rows)
    return xp.stack([xp.zeros(shape, np.int32) if row is None else row for row in rows]).astype(np.int32)
