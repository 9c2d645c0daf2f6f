"""Dense and ring caches against one-shot attention under the same mask, whatever the chunks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcjax.cache import DenseCache, RingCache
from pallas_kernels import block_sparse_attention
from pallas_kernels.masks import Causal, Intervals, Sink, Window, per_head

B, T, H, K, D = 2, 48, 4, 2, 8
SINK, WINDOW, CHUNK = 3, 10, 16
WINDOWED = Causal() & (Sink(SINK) | Window(WINDOW))

CASES = {
    "dense, causal": (lambda dtype: DenseCache.init(B, T, K, D, dtype), Causal()),
    "dense, windowed": (lambda dtype: DenseCache.init(B, T, K, D, dtype), WINDOWED),
    "dense, per head": (
        lambda dtype: DenseCache.init(B, T, K, D, dtype),
        per_head([Causal(), WINDOWED, Causal() & Window(5), Causal()]),
    ),
    "dense, strided": (
        lambda dtype: DenseCache.init(B, T, K, D, dtype),
        Causal() & (Window(4) | Intervals(8, jnp.array([2**31 - 1, 20, 0, 40, 0, 0], jnp.int32))),
    ),
    "ring": (lambda dtype: RingCache.init(B, WINDOW, K, D, dtype, sink=SINK, chunk=CHUNK), WINDOWED),
    "ring, no sink": (lambda dtype: RingCache.init(B, WINDOW, K, D, dtype, chunk=CHUNK), Causal() & Window(WINDOW)),
}


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (B, T, n, D)) for key, n in zip(keys, (H, K, K), strict=True))


def expected(qkv, mask, **options):
    return block_sparse_attention(*qkv, mask, return_lse=True, implementation="reference", **options)


@partial(jax.jit, static_argnames=("soft_cap",))
def step(cache, mask, q, k, v, valid=None, sink_logits=None, soft_cap=None):
    cache = cache.append(k, v, valid)
    return cache, *cache.attend(q, mask, soft_cap=soft_cap, sink_logits=sink_logits)


def run(cache, mask, qkv, sizes, **options):
    outs, place = [], 0
    for size in sizes:
        part = [x[:, place : place + size] for x in qkv]
        cache, o, lse = step(cache, mask, *part, **options)
        outs.append((o, lse))
        place += size
    return cache, jnp.concatenate([o for o, _ in outs], 1), jnp.concatenate([lse for _, lse in outs], 2)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [*((case, (16, 3, 1, 16, 3, 3, 3, 3)) for case in CASES), ("dense, causal", (1,) * T), ("ring", (1,) * T)],
)
def test_any_chunks_equal_one_shot(qkv, case, sizes):
    init, mask = CASES[case]
    cache, o, lse = run(init(jnp.float32), mask, qkv, sizes)
    want_o, want_lse = expected(qkv, mask)
    np.testing.assert_allclose(o, want_o, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    assert cache.length.tolist() == [T, T]


@pytest.mark.parametrize("case", ["dense, causal", "ring"])
def test_soft_cap_and_sink_logits(qkv, case):
    init, mask = CASES[case]
    options = {"soft_cap": 2.0, "sink_logits": jnp.array([0.5, -1.0, 2.0, 0.0])}
    _, o, lse = run(init(jnp.float32), mask, qkv, (16, 1, 3, 12, 16), **options)
    want_o, want_lse = expected(qkv, mask, **options)
    np.testing.assert_allclose(o, want_o, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


@pytest.mark.parametrize("case", ["dense, causal", "ring"])
def test_ragged_rows_equal_single_requests(qkv, case):
    """Rows of 40 and 23 tokens in chunks padded on the right, then one token each."""
    init, mask = CASES[case]
    lengths = np.array([40, 23])
    cache, rows = init(jnp.float32), [[], []]
    for begin in range(0, 48, CHUNK):
        valid = np.arange(begin, begin + CHUNK) < lengths[:, None]
        part = [x[:, begin : begin + CHUNK] for x in qkv]
        cache, o, _ = step(cache, mask, *part, jnp.asarray(valid))
        for row in range(B):
            rows[row].append(o[row][valid[row]])
    assert cache.length.tolist() == lengths.tolist()
    token = [jnp.stack([x[row, lengths[row]] for row in range(B)])[:, None] for x in qkv]
    cache, o, _ = step(cache, mask, *token)
    want, _ = expected(qkv, mask)
    for row in range(B):
        got = jnp.concatenate([*rows[row], o[row]])
        np.testing.assert_allclose(got, want[row, : lengths[row] + 1], atol=2e-6)


def test_the_first_chunk_needs_no_offset(qkv):
    """An empty cache whose length is known while tracing attends to the chunk alone."""
    init, mask = CASES["dense, causal"]
    first = jax.jit(lambda *part: step(init(jnp.float32), mask, *part)[1])
    o = first(*(x[:, :CHUNK] for x in qkv))
    np.testing.assert_allclose(o, expected(qkv, mask)[0][:, :CHUNK], atol=2e-6)
    eager = init(jnp.float32).append(*(x[:, :CHUNK] for x in qkv[1:]))
    np.testing.assert_allclose(eager.attend(qkv[0][:, :CHUNK], mask)[0], o, atol=2e-6)


def test_lse_only_on_request(qkv):
    cache = CASES["ring"][0](jnp.float32).append(*(x[:, :12] for x in qkv[1:]))
    assert cache.attend(qkv[0][:, :12], WINDOWED, return_lse=False)[1] is None


def test_low_precision_cache_under_full_precision_queries(qkv):
    init, mask = CASES["dense, causal"]
    _, o, lse = run(init(jnp.bfloat16), mask, qkv, (16, 16, 1, 3, 12))
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(o, expected(qkv, mask)[0], atol=3e-2)


def test_stale_slots_have_no_effect(qkv):
    """What lies beyond a request's length, as after an earlier request, is never read."""
    init, mask = CASES["dense, causal"]
    cache, _, _ = run(init(jnp.float32), mask, qkv, (16,))
    dirty = jax.tree.map(lambda x: x, cache)
    dirty = type(cache)(dirty.k.at[:, 17:].set(1e6), dirty.v.at[:, 17:].set(1e6), dirty.length, dirty.start)
    part = [x[:, 16:17] for x in qkv]
    np.testing.assert_array_equal(step(cache, mask, *part)[1], step(dirty, mask, *part)[1])


def test_bytes_are_the_formula():
    assert DenseCache.init(B, 100, K, D, jnp.bfloat16).bytes == 2 * B * 100 * K * D * 2
    ring = RingCache.init(B, WINDOW, K, D, jnp.float32, sink=SINK, chunk=CHUNK)
    assert ring.bytes == 2 * B * (SINK + WINDOW + CHUNK - 1) * K * D * 4


def test_writing_past_the_end_is_an_error(qkv):
    cache = DenseCache.init(B, 20, K, D, jnp.float32).append(*(x[:, :16] for x in qkv[1:]))
    with pytest.raises(ValueError, match="reaches 24 tokens, but the capacity is 20"):
        cache.append(*(x[:, :8] for x in qkv[1:]))


def test_ring_refuses_what_it_cannot_hold(qkv):
    ring = CASES["ring"][0](jnp.float32)
    with pytest.raises(ValueError, match="an append of 17 tokens is longer than its chunk of 16"):
        ring.append(*(x[:, :17] for x in qkv[1:]))
    ring = ring.append(*(x[:, :4] for x in qkv[1:]))
    with pytest.raises(ValueError, match="the mask's window is 11 and the ring's 10"):
        ring.attend(qkv[0][:, :4], Causal() & (Sink(SINK) | Window(11)))
    with pytest.raises(ValueError, match="use a dense cache"):
        ring.attend(qkv[0][:, :4], Causal() & Intervals(8, jnp.zeros(6, jnp.int32)))
    with pytest.raises(ValueError, match="must be positive"):
        RingCache.init(B, 0, K, D, jnp.float32)


def test_decoding_is_in_place_with_small_temporaries():
    """Four layers over several tokens: the caches are aliased and nothing of their size is made beside them."""
    caches = tuple(DenseCache.init(1, 4096, 2, 64, jnp.float32) for _ in range(4))

    def write(caches, x):
        def token(caches, _):
            new = tuple(cache.append(x[:, :, :2], x[:, :, :2]) for cache in caches)
            return new, sum(cache.attend(x, Causal(), return_lse=False)[0] for cache in new)

        return jax.lax.scan(token, caches, length=3)

    compiled = jax.jit(write, donate_argnums=0).lower(caches, jnp.ones((1, 1, 4, 64))).compile()
    memory = compiled.memory_analysis()
    held = sum(cache.bytes for cache in caches)
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 0.05 * held
