"""Masks of columns whose rows each read one run of neighbouring keys: no list of key blocks is needed to visit them.

The parts of dual chunk attention are such masks: a query reads its own chunk, the one before, or all older ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.plan import INF, Plan

MOST = 2**22  # pairs of a stretch of rows and a column that are looked at


@dataclass(frozen=True, eq=False)
class OneRun:
    """Keys [begin, stop) that the rows of each stretch read, but for causality; both only grow with the row.

    The stretch n of pattern p has the rows `rows[p,n]` up to `rows[p,n+1]`; the first begins at 0, unused ones at INF.
    """

    rows: Int[np.ndarray, "P E"]
    begin: Int[np.ndarray, "P E"]
    stop: Int[np.ndarray, "P E"]

    def any(self, first: Int[Array, "B 1 n"], last: Int[Array, "B 1 n"]) -> tuple[Array, Array]:
        """[begin, stop) `[B,P,n]` of the keys that some row of first..last reads."""
        return self._at(self.begin, first), self._at(self.stop, last)

    def all(self, first: Int[Array, "B 1 n"], last: Int[Array, "B 1 n"]) -> tuple[Array, Array]:
        """[begin, stop) `[B,P,n]` of the keys that every row of first..last reads; empty if stop <= begin."""
        return self._at(self.begin, last), self._at(self.stop, first)

    def _at(self, values: np.ndarray, row: Array) -> Array:
        patterns = range(values.shape[0])
        found = [jnp.asarray(values[p])[jnp.searchsorted(self.rows[p], row[:, 0], side="right") - 1] for p in patterns]
        return jnp.stack(found, 1)


def one_run(plan: Plan, keys: int) -> OneRun | None:
    """The runs of a mask made of columns alone, or None: not one run a row, or not known on the host."""
    given = [x for x in (plan.expiry, plan.second) if x is not None]
    host = all(isinstance(x, np.ndarray) for x in (plan.sink, plan.window, *given))
    if not given or not host or not plan.causal or (plan.sink > 0).any() or (plan.window > 0).any():
        return None
    found = [_stretches(plan, p, -(-keys // plan.block_k)) for p in range(plan.num_patterns)]
    if any(x is None for x in found):
        return None
    most = max(len(x[0]) for x in found)
    pad = lambda x, fill: np.pad(x, (0, most - len(x)), constant_values=fill).astype(np.int32)
    table = lambda n, fill: np.stack([pad(x[n], fill) for x in found])
    return OneRun(table(0, INF), table(1, 0), table(2, 0))


def _stretches(plan: Plan, pattern: int, columns: int) -> Any:
    """(first rows, begin, stop) of one pattern, or None."""
    expiry = np.zeros(columns, np.int64) if plan.expiry is None else plan.expiry[pattern, :columns]
    start, end = np.zeros((2, columns)) if plan.second is None else plan.second[pattern, :columns].T
    edges = np.unique(np.concatenate([[0], expiry, start, end]))
    edges = edges[(edges >= 0) & (edges < INF)].astype(np.int64)
    if len(edges) * columns > MOST:
        return None
    row = edges[:, None]
    live = (row < expiry) | ((start <= row) & (row < end))
    count, first = live.sum(1), live.argmax(1)
    after = columns - live[:, ::-1].argmax(1)
    if (count != np.where(count > 0, after - first, 0)).any():
        return None
    # Rows that read nothing have an empty run where the last one ended, or where the first one will begin.
    some = np.flatnonzero(count)
    if not len(some):
        return edges, np.zeros_like(edges), np.zeros_like(edges)
    before = np.searchsorted(some, np.arange(len(edges)), side="right") - 1
    rest = np.where(before < 0, first[some[0]], after[some[np.maximum(before, 0)]])
    begin, stop = np.where(count > 0, first, rest), np.where(count > 0, after, rest)
    if (np.diff(begin) < 0).any() or (np.diff(stop) < 0).any():
        return None
    return edges, begin * plan.block_k, np.minimum(stop * plan.block_k, INF)
