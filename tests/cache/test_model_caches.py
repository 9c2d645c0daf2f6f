"""Cached decoding of whole models: every mixer kind, any chunks, ragged batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.cache import DenseCache, RecurrentCache, RingCache, cache_bytes, init_caches
from lcjax.models.decoder import Decoder
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec

B, T, CHUNK = 2, 40, 12
PATTERNS = {
    "full": (Attention(), Attention(rope=None, soft_cap=5.0, sink_logits=True)),
    "window": (Attention(window=9), Attention(window=7, sink=2)),
    "linear": (GatedLinear(), GatedLinear(conv_width=4, decay="scalar", feature_map="elu", normalise=True)),
}


def build(pattern):
    spec = ModelSpec(
        vocab_size=61, width=24, mlp_width=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
        pattern=pattern, dtype="float32",
    )  # fmt: skip
    return spec, *nnx.split(Decoder(spec, rngs=nnx.Rngs(1)), nnx.Param)


@partial(jax.jit, static_argnums=0)
def step(graphdef, params, tokens, caches, valid=None):
    model = nnx.merge(graphdef, params)
    x, caches = model.hidden(tokens, caches=caches, valid=valid)
    return model.logits(x), caches


@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_and_single_tokens_equal_one_shot(name):
    spec, graphdef, params = build(PATTERNS[name])
    tokens = jax.random.randint(jax.random.key(2), (B, T), 0, spec.vocab_size)
    want = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))(params, tokens)
    caches, place, got = init_caches(spec, B, T, chunk=CHUNK), 0, []
    for size in (CHUNK, CHUNK, *(1,) * (T - 2 * CHUNK)):
        logits, caches = step(graphdef, params, tokens[:, place : place + size], caches)
        got.append(logits)
        place += size
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=3e-5)
    # Padded chunks: rows of 19 and 24 tokens.
    lengths = np.array([19, 24])
    caches = init_caches(spec, B, T, chunk=CHUNK)
    for begin in (0, CHUNK):
        valid = jnp.asarray(np.arange(begin, begin + CHUNK) < lengths[:, None])
        _, caches = step(graphdef, params, tokens[:, begin : begin + CHUNK], caches, valid)
    following = jnp.stack([tokens[row, n] for row, n in enumerate(lengths)])[:, None]
    logits, caches = step(graphdef, params, following, caches)
    assert caches[0].length.tolist() == [20, 25]
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits[row, 0], want[row, n], atol=3e-5)


def test_one_cache_per_mixer():
    spec, *_ = build((Attention(), Attention(window=9, sink=2)))
    dense, ring = init_caches(spec, B, 64, chunk=CHUNK)
    assert (type(dense), type(ring)) == (DenseCache, RingCache)
    assert cache_bytes((dense, ring)) == dense.bytes + ring.bytes
    assert ring.bytes == 2 * B * (2 + 9 + CHUNK - 1) * spec.num_kv_heads * spec.head_dim * 4
    assert all(isinstance(cache, DenseCache) for cache in init_caches(spec, B, 16, chunk=CHUNK))
    linear = init_caches(build(PATTERNS["linear"])[0], B, 64)
    assert all(isinstance(cache, RecurrentCache) for cache in linear)
    assert linear[0].bytes == B * 6 * 8 * 8 * 4
    with pytest.raises(ValueError, match="capacity must be positive, got 0"):
        init_caches(spec, B, 0)
