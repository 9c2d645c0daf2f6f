"""One count of tokens for all caches of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcjax.cache import CacheLayout, Selection, init_caches
from lcjax.cache.base import known_empty
from lcjax.cache.counts import FIELDS, counted, uncounted
from lcjax.models.patterns import Spans, Strided
from lcjax.models.spec import Attention, ModelSpec

PATTERNS = Spans((0, 1), (None, 4)), Strided(block=4, local=2, every=2)
SPEC = ModelSpec(
    name="toy", vocab_size=8, width=8, mlp_width=8, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=4,
    pattern=(Attention(), Attention(window=4), *(Attention(pattern=pattern) for pattern in PATTERNS)),
)  # fmt: skip
LAYOUTS = {
    "dense": CacheLayout(),
    "int8 pages": CacheLayout(kind="paged", page=4, dtype="int8"),
    "selected": CacheLayout(selection=Selection(tokens=8, sink=1, window=2, block=4)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_caches_of_every_kind_give_their_count_away_and_take_it_back(layout):
    caches = init_caches(SPEC, 3, 32, layout)
    bare, length = uncounted(caches)
    names = {getattr(path[-1], "name", None) for path, _ in jax.tree_util.tree_leaves_with_path(bare)}
    assert names.isdisjoint(FIELDS)
    assert known_empty(length)  # so the first chunk needs no look at the cache
    held = jnp.array([5, 0, 7])
    again = counted(bare, held)
    assert jax.tree.structure(again) == jax.tree.structure(caches)
    assert all(cache.length is held and cache.start is held for cache in again)
    np.testing.assert_array_equal(uncounted(again)[1], held)
