"""Running a list of blocks: one by one, rematerialised, or stacked and scanned."""

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


def apply_stacked(blocks: list[Any], x: jax.Array, context: Any, remat: str, scan: bool) -> jax.Array:
    """Pass x through uncached blocks. With `scan`, equal periods share one traced body over stacked weights."""
    parts = [nnx.split(block) for block in blocks]
    kinds = [graphdef for graphdef, _ in parts]

    def one(graphdef: Any, state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x, context)[0]

    for start, period, repeats in runs(kinds) if scan else [(0, len(blocks), 1)]:
        block = [
            rematerialised(lambda state, x, kind=kind: one(kind, state, x), remat)
            for kind in kinds[start : start + period]
        ]
        states = [state for _, state in parts[start : start + period * repeats]]
        if repeats == 1:
            for apply, state in zip(block, states, strict=True):
                x = apply(state, x)
            continue
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[j::period]) for j in range(period)]

        def body(x: jax.Array, period_states: Any, block: Any = block) -> tuple[jax.Array, None]:
            for apply, state in zip(block, period_states, strict=True):
                x = apply(state, x)
            return x, None

        x, _ = jax.lax.scan(body, x, stacked)
    return x
