"""Which cache each mixer gets, and its bytes. What whole models do with them: `tests/zoo`."""

import pytest

from lcjax.cache import DenseCache, RecurrentCache, RingCache, cache_bytes, init_caches
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec

B = 2


def spec_of(*pattern):
    return ModelSpec(
        vocab_size=61, width=24, mlp_width=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
        pattern=pattern, dtype="float32",
    )  # fmt: skip


def test_one_cache_per_mixer():
    spec = spec_of(Attention(), Attention(window=9, sink=2))
    dense, ring = init_caches(spec, B, 64)
    assert (type(dense), type(ring)) == (DenseCache, RingCache)
    assert cache_bytes((dense, ring)) == dense.bytes + ring.bytes
    assert ring.bytes == 2 * B * (2 + 9) * spec.num_kv_heads * spec.head_dim * 4
    assert all(isinstance(cache, DenseCache) for cache in init_caches(spec, B, 11))
    linear = init_caches(spec_of(GatedLinear()), B, 64)
    assert all(isinstance(cache, RecurrentCache) for cache in linear)
    assert linear[0].bytes == B * 6 * 8 * 8 * 4
    with pytest.raises(ValueError, match="capacity must be positive, got 0"):
        init_caches(spec, B, 0)
