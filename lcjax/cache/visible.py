"""Which cached tokens a query may see, for positions in any order (a ring holds them rotated)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.plan import Plan


def visible(
    plan: Plan,
    rows: Int[Array, "B T"],
    columns: Int[Array, "B S"],
) -> Bool[Array, "B #H T S"]:
    """The plan's normal form at absolute query positions `rows` and key positions `columns` (-1: an empty slot)."""
    i, j = rows[:, None, :, None], columns[:, None, None, :]
    held = j >= 0
    if plan.causal:
        held = held & (j <= i)
    per_pattern = lambda number: jnp.asarray(number)[None, :, None, None]  # [1,P,1,1]
    allow = (j < per_pattern(plan.sink)) | (i - j < per_pattern(plan.window))
    block = jnp.maximum(columns, 0) // plan.block_k
    if plan.expiry is not None:
        allow = allow | (i < _at_block(plan.expiry, block))
    if plan.second is not None:
        begin, end = _at_block(plan.second[..., 0], block), _at_block(plan.second[..., 1], block)
        allow = allow | ((begin <= i) & (i < end))
    allow = allow & held  # [B,P,T,S]
    if allow.shape[1] == 1:
        return allow
    return allow[:, jnp.asarray(plan.pattern_of_head)]


def _at_block(table: Array | np.ndarray, block: Int[Array, "B S"]) -> Array:
    """`[P,nK]` looked up per slot -> `[B,P,1,S]`."""
    return jnp.moveaxis(jnp.asarray(table)[:, block], 0, 1)[:, :, None, :]
