"""Values that do not fit are refused when known, and under jit by the debug checks."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import pallas_kernels as pk
from pallas_kernels.checks import debug_checks
from pallas_kernels.masks import Causal, Window

X = jnp.ones((1, 8, 2, 4))
LINEAR = X[..., 0]
PAGES = jnp.ones((3, 2, 4, 8))


def _attend(**kw: Any) -> jax.Array:
    return pk.block_sparse_attention(X, X, X, Causal() & Window(2), **kw)


def _lists(idx: jax.Array, count: jax.Array) -> jax.Array:
    lists = pk.BlockList(idx, count, block_q=8, block_k=4)
    return pk.block_sparse_attention(X, X, X, Causal() & Window(2), lists=lists)


def _paged(table: jax.Array, lengths: jax.Array) -> jax.Array:
    return pk.decode_attention(jnp.ones((1, 1, 2, 8)), pk.KVCache(PAGES, PAGES, lengths, page_table=table))


def _i32(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


ONE = jnp.ones((1, 1, 1), jnp.int32)
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], str]] = {
    "kv_length": (lambda n: _attend(kv_length=n), (_i32(8),), (_i32(9),), "kv_length: 9 is outside 0..8"),
    "q_offset": (lambda n: _attend(q_offset=n), (_i32(3),), (_i32(-1),), "q_offset: -1 is negative"),
    "block": (_lists, (_i32(1).reshape(1, 1, 1, 1), ONE), (_i32(2).reshape(1, 1, 1, 1), ONE), "block index 2 is"),
    "count": (_lists, (_i32(1).reshape(1, 1, 1, 1), ONE), (_i32(1).reshape(1, 1, 1, 1), 2 * ONE), "count 2 is"),
    "order": (
        _lists,
        (_i32(0, 1).reshape(1, 1, 1, 2), 2 * ONE),
        (_i32(1, 1).reshape(1, 1, 1, 2), 2 * ONE),
        "must ascend without repeats inside each query block; 1 does not",
    ),
    "page": (_paged, (_i32(2, 0)[None], _i32(5)), (_i32(0, 3)[None], _i32(5)), "page_table names page 3, there are 3"),
    "length": (_paged, (_i32(2, 0)[None], _i32(8)), (_i32(0, 1)[None], _i32(9)), "length 9 is outside 1..8"),
    "decay": (
        lambda g: pk.gated_linear_attention(X, X, X, g)[0],
        (-LINEAR,),
        (LINEAR.at[0, 3, 1].set(0.5),),
        "log_decay has the value",
    ),
    "segments": (
        lambda ids: pk.gated_linear_attention(X, X, X, segment_ids=ids)[0],
        (_i32(1, 1, 2, 2, 2, 2, 0, 0)[None],),
        (_i32(1, 3, 2, 2, 2, 2, 0, 0)[None],),
        "segment_ids decreases to 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_known_values(name: str):
    call, good, bad, message = CASES[name]
    jax.block_until_ready(call(*good))
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*bad)


@pytest.mark.parametrize("name", CASES)
def test_traced_values(name: str):
    call, good, bad, message = CASES[name]
    with debug_checks():
        checked = jax.jit(checkify.checkify(call))
        checked(*good)[0].throw()
        with pytest.raises(checkify.JaxRuntimeError, match=re.escape(message)):
            checked(*bad)[0].throw()


def test_unused_entries_may_hold_anything():
    idx = np.array([0, -1, 77], np.int32).reshape(1, 1, 1, 3)
    assert np.isfinite(_lists(jnp.asarray(idx), ONE)).all()
    assert np.isfinite(_paged(_i32(2, 99)[None], _i32(4))).all()
