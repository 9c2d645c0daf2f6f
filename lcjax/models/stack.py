"""Running a list of blocks: one by one, rematerialised, or stacked and scanned."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcjax.parallel.work import checkpoint
from pallas_kernels.attention.call import KEPT

POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`function` under the named remat policy: 'none', 'full', 'attention' or 'dots'."""
    if remat not in POLICIES:
        raise ValueError(f"remat is {remat!r}; choose one of {', '.join(map(repr, POLICIES))}")
    return function if remat == "none" else checkpoint(function, POLICIES[remat])


def runs(kinds: list[Any]) -> list[tuple[int, int, int]]:
    """Cut a list into (start, period, repeats): from the left, each time the longest stretch of equal periods."""
    cut, start = [], 0
    while start < len(kinds):
        best = (1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            repeats = 1
            while kinds[start + repeats * period : start + (repeats + 1) * period] == kinds[start : start + period]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        cut.append((start, *best))
        start += best[0] * best[1]
    return cut


def scanned(kinds: list[Any]) -> list[tuple[int, ...]]:
    """The layers, by number, that take turns in one body of `fold`'s scans; those that run alone are in none."""
    return [
        tuple(range(start + offset, start + period * repeats, period))
        for start, period, repeats in runs(kinds)
        if repeats > 1
        for offset in range(period)
    ]


def fold(
    kinds: list[Any],
    states: list[Any],
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    x: Any,
    scan: bool,
) -> tuple[Any, list[Any]]:
    """Pass x, arrays, through layers, `body(kind, state, x) -> (x, out)` each; also the outs, one a layer.

    With `scan`, equal periods of kinds share one traced body over stacked states.
    """
    outs: list[Any] = []
    for start, period, repeats in runs(kinds) if scan else [(0, len(kinds), 1)]:
        bodies = [functools.partial(body, kind) for kind in kinds[start : start + period]]
        mine = states[start : start + period * repeats]
        if repeats == 1:
            x, found = _in_turn(bodies, mine, x)
            outs += found
            continue
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *mine[j::period]) for j in range(period)]
        step = lambda x, period_states, bodies=bodies: _in_turn(bodies, period_states, x)
        x, found = jax.lax.scan(step, x, stacked)
        outs += [jax.tree.map(lambda y, i=i: y[i], found[j]) for i in range(repeats) for j in range(period)]
    return x, outs


def _in_turn(bodies: list[Any], states: list[Any], x: Any) -> tuple[Any, list[Any]]:
    outs = []
    for body, state in zip(bodies, states, strict=True):
        x, out = body(state, x)
        outs.append(out)
    return x, outs


def parts(blocks: list[Any]) -> tuple[list[Any], list[Any]]:
    """Graph definitions and states of blocks, as `fold` takes them."""
    split = [nnx.split(block) for block in blocks]
    return [kind for kind, _ in split], [state for _, state in split]


def apply_stacked(blocks: list[Any], x: jax.Array, context: Any, remat: str, scan: bool) -> jax.Array:
    """Pass x through uncached blocks, rematerialised and scanned as asked."""
    kinds, states = parts(blocks)

    def body(kind: Any, state: Any, x: jax.Array) -> tuple[jax.Array, None]:
        apply = lambda state, x: nnx.merge(kind, state)(x, context)[0]
        return rematerialised(apply, remat)(state, x), None

    return fold(kinds, states, body, x, scan)[0]
