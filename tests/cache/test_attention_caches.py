"""Every cache against one-shot attention under the same mask, whatever the chunks, forks and evictions."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from lcjax.cache import (
    DenseCache,
    GroupedCache,
    PagedCache,
    RingCache,
    SelectedCache,
    Selection,
    StridedCache,
    Stripes,
)
from lcjax.cache.encoding import decode, encode
from pallas_kernels import block_sparse_attention
from pallas_kernels.checks import debug_checks
from pallas_kernels.head_masks import over_groups
from pallas_kernels.masks import Causal, Intervals, Sink, Window, per_head

B, T, H, K, D = 2, 48, 4, 2, 8
SINK, WINDOW, CHUNK, PAGE = 3, 10, 16, 8
WINDOWED = Causal() & (Sink(SINK) | Window(WINDOW))
EVERYTHING = Selection(tokens=T + 16, block=PAGE, window=PAGE, sink=0, every=1)


def dense(dtype=jnp.float32):
    return DenseCache.init(B, T, K, D, dtype)


def ring(dtype=jnp.float32):
    return RingCache.init(B, WINDOW, K, D, dtype, sink=SINK)


def paged(dtype=jnp.float32):
    """Pages in an arbitrary order, in a pool with some to spare."""
    cache = PagedCache.init(B, T, K, D, dtype, page=PAGE, pool=2 * B * T // PAGE).reserve(T)
    order = jnp.asarray(np.random.default_rng(0).permutation(cache.pool), jnp.int32)
    return replace(cache, table=order[cache.table])


def selected(dtype=jnp.float32):
    """A choice of all pages: capacity 4 T, so that it is not simply everything."""
    inner = PagedCache.init(B, 4 * T, K, D, dtype, page=PAGE)
    return SelectedCache.around(inner, EVERYTHING, K)


STRIPES = Stripes(block=4, local=2, every=5, sink_blocks=1, offsets=(0, 3))


def strided(dtype=jnp.float32):
    return StridedCache.init(B, T, D, dtype, STRIPES)


def grouped(dtype=jnp.float32):
    """KV head 0 in a ring, head 1 with everything, in int8."""
    ring = RingCache.init(B, WINDOW, 1, D, jnp.float32, sink=SINK)
    return GroupedCache.of([DenseCache.init(B, T, 1, D, dtype), ring], [(1,), (0,)])


CACHES = {
    "dense": (dense, Causal()),
    "dense int8": (partial(dense, jnp.int8), Causal()),
    "ring": (ring, WINDOWED),
    "paged": (paged, Causal()),
    "paged int8": (partial(paged, jnp.int8), Causal()),
    "selected": (selected, Causal()),
    "strided": (strided, over_groups(STRIPES.masks, H)),
    "grouped": (grouped, over_groups([WINDOWED, Causal()], H)),
}
MASKS = {
    "windowed": WINDOWED,
    "per head": per_head([Causal(), WINDOWED, Causal() & Window(5), Causal()]),
    "strided": Causal() & (Window(4) | Intervals(8, jnp.array([2**31 - 1, 20, 0, 40, 0, 0], jnp.int32))),
}
slow = partial(pytest.param, marks=pytest.mark.slow)
each_cache = pytest.mark.parametrize("name", CACHES)


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (B, T, n, D)) for key, n in zip(keys, (H, K, K), strict=True))


def expected(name, qkv, mask, **options):
    """One shot over what the cache can hold of the keys and values: int8 loses, nothing else does."""
    q, *stored = qkv
    if "int8" in name:
        k, v, factors = encode(*stored, jnp.int8)
        stored = decode(k, v, factors.swapaxes(1, 2), jnp.float32)
    return block_sparse_attention(q, *stored, mask, return_lse=True, implementation="reference", **options)


@partial(jax.jit, static_argnames=("soft_cap",))
def step(cache, mask, q, k, v, valid=None, sink_logits=None, soft_cap=None):
    cache = cache.append(k, v, valid).prepare(q)
    return cache, *cache.attend(q, mask, soft_cap=soft_cap, sink_logits=sink_logits)


def run(cache, mask, qkv, sizes, **options):
    outs, place = [], 0
    for size in sizes:
        part = [x[:, place : place + size] for x in qkv]
        cache, o, lse = step(cache, mask, *part, **options)
        outs.append((o, lse))
        place += size
    return cache, jnp.concatenate([o for o, _ in outs], 1), jnp.concatenate([lse for _, lse in outs], 2)


def check(got, want):
    """The first rows of what is wanted, as many as there are."""
    rows = got[0].shape[1]
    for g, w in zip(got, (want[0][:, :rows], want[1][:, :, :rows]), strict=True):
        np.testing.assert_allclose(g, w, atol=4e-6)


@each_cache
@pytest.mark.parametrize("sizes", [(16, 3, 1, 16, 3, 3, 3, 3), (1,) * T], ids=["chunks", "token by token"])
def test_any_chunks_equal_one_shot(qkv, name, sizes):
    init, mask = CACHES[name]
    cache, *got = run(init(), mask, qkv, sizes)
    check(got, expected(name, qkv, mask))
    assert cache.length.tolist() == [T, T]


@pytest.mark.parametrize(("name", "mask"), [*(("dense", mask) for mask in MASKS), ("paged int8", "per head")])
def test_masks(qkv, name, mask):
    _, *got = run(CACHES[name][0](), MASKS[mask], qkv, (16, 1, 16))
    check(got, expected(name, qkv, MASKS[mask]))


@pytest.mark.parametrize("name", [slow("dense"), slow("ring"), "paged int8", "strided", "grouped"])
def test_soft_cap_and_sink_logits(qkv, name):
    init, mask = CACHES[name]
    options = {"soft_cap": 2.0, "sink_logits": jnp.array([0.5, -1.0, 2.0, 0.0])}
    _, *got = run(init(), mask, qkv, (16, 1, 16), **options)
    check(got, expected(name, qkv, mask, **options))


@each_cache
def test_ragged_rows_equal_single_requests(qkv, name):
    """Rows of 40 and 23 tokens in chunks padded on the right, then one token each."""
    init, mask = CACHES[name]
    lengths = np.array([40, 23])
    cache, rows = init(), [[], []]
    for begin in range(0, 48, CHUNK):
        valid = np.arange(begin, begin + CHUNK) < lengths[:, None]
        part = [x[:, begin : begin + CHUNK] for x in qkv]
        cache, o, _ = step(cache, mask, *part, jnp.asarray(valid))
        for row in range(B):
            rows[row].append(o[row][valid[row]])
    assert cache.length.tolist() == lengths.tolist()
    token = [jnp.stack([x[row, lengths[row]] for row in range(B)])[:, None] for x in qkv]
    cache, o, _ = step(cache, mask, *token)
    want, _ = expected(name, qkv, mask)
    for row in range(B):
        got = jnp.concatenate([*rows[row], o[row]])
        np.testing.assert_allclose(got, want[row, : lengths[row] + 1], atol=4e-6)


@each_cache
def test_forks_continue_one_request_each_in_its_own_way(qkv, name):
    """Both continue request 1 from token 21 on, in the middle of a page: one with its own tokens, one with 0's."""
    init, mask = CACHES[name]
    cache, _, _ = run(init(), mask, qkv, (16, 3, 1, 1))
    cache = jax.jit(lambda cache: cache.fork(np.array([1, 1])))(cache)
    tails = [jnp.stack([x[1, 21:], x[0, 21:]]) for x in qkv]
    _, *got = run(cache, mask, tails, (3, 16, 1))
    whole = [jnp.concatenate([jnp.stack([x[1, :21]] * 2), tail], 1) for x, tail in zip(qkv, tails, strict=True)]
    want = expected(name, whole, mask)
    check(got, (want[0][:, 21:41], want[1][:, :, 21:41]))


def evict_first(cache):
    """Without request 0, and with room for another in its place."""
    cache = cache.evict(jnp.array([True, False]))
    if isinstance(cache, SelectedCache):
        return replace(cache, inner=cache.inner.reserve(jnp.array([T, 0])))
    return cache.reserve(jnp.array([T, 0])) if isinstance(cache, PagedCache) else cache


@each_cache
def test_an_evicted_row_starts_anew(qkv, name):
    init, mask = CACHES[name]
    cache, _, _ = run(init(), mask, qkv, (16, 3, 1, 1))
    cache = jax.jit(evict_first)(cache)
    assert cache.length.tolist() == [0, 21]
    parts = [jnp.stack([x[0, :20], x[1, 21:41]]) for x in qkv]
    _, *got = run(cache, mask, parts, (3, 16, 1))
    o, lse = expected(name, qkv, mask)
    check(got, (jnp.stack([o[0, :20], o[1, 21:41]]), jnp.stack([lse[0, :, :20], lse[1, :, 21:41]])))


def test_pages_come_back_and_run_out(qkv):
    cache = PagedCache.init(B, T, K, D, jnp.float32, page=PAGE, pool=8).reserve(jnp.array([T, 2 * PAGE]))
    with pytest.raises(ValueError, match="a request reaches 24 tokens, more than its pages of 8 hold"):
        cache.append(*(x[:, :24] for x in qkv[1:]))
    with pytest.raises(ValueError, match="1 pages are needed and fewer of 8 are free"):
        cache.reserve(jnp.array([0, 3 * PAGE]))
    cache = cache.evict(jnp.array([True, False])).reserve(jnp.array([0, 3 * PAGE]))
    assert cache.pages.tolist() == [0, 3]
    with pytest.raises(ValueError, match="7 pages of 8 tokens pass the capacity of 48"):
        cache.reserve(jnp.array([T + 1, 0]))


def test_running_out_of_pages_under_jit_is_caught_and_harms_nobody(qkv):
    """Request 1 has two pages and brings 24 tokens: the last eight go nowhere, and the debug checks name the number."""
    cache = PagedCache.init(B, T, K, D, jnp.float32, page=PAGE, pool=8).reserve(jnp.array([T, 2 * PAGE]))
    k, v = (x[:, :24] for x in qkv[1:])
    fits, too_many = (jnp.arange(24) < jnp.array([[24], [count]]) for count in (16, 24))
    append = lambda cache, valid: cache.append(k, v, valid)
    for buffer in ("k", "v"):
        want, got = (getattr(jax.jit(append)(cache, valid), buffer) for valid in (fits, too_many))
        np.testing.assert_array_equal(got, want)
    with debug_checks():
        checked = jax.jit(checkify.checkify(append))
        checked(cache, fits)[0].throw()
        with pytest.raises(checkify.JaxRuntimeError, match="reaches 24 tokens, more than its pages of 8 hold"):
            checked(cache, too_many)[0].throw()
        error, _ = jax.jit(checkify.checkify(lambda cache: cache.reserve(jnp.array([0, 3 * PAGE]))))(cache)
        with pytest.raises(checkify.JaxRuntimeError, match="1 pages are needed and fewer of 8 are free"):
            error.throw()


@pytest.mark.parametrize("name", ["dense", "paged int8"])
def test_writing_past_the_end_under_jit_is_caught_by_the_debug_checks(qkv, name):
    """And otherwise dropped: what is held stays as it was."""
    cache = CACHES[name][0]().append(*(x[:, :40] for x in qkv[1:]))
    more = [x[:, :16] for x in qkv[1:]]
    append = lambda cache, valid: cache.append(*more, valid)
    eight, all_of_them = (jnp.broadcast_to(jnp.arange(16) < count, (B, 16)) for count in (8, 16))
    with debug_checks():
        checked = jax.jit(checkify.checkify(append))
        error, want = checked(cache, eight)
        error.throw()
        error, got = checked(cache, all_of_them)
        with pytest.raises(checkify.JaxRuntimeError, match="reaches 56 tokens, but the capacity is 48"):
            error.throw()
    np.testing.assert_array_equal(got.k, want.k)
    np.testing.assert_array_equal(got.v, want.v)


def test_forks_share_full_pages(qkv):
    cache = PagedCache.init(B, T, K, D, jnp.float32, page=PAGE, pool=8).reserve(jnp.array([3 * PAGE, 0]))
    cache, _, _ = step(cache, Causal(), *(x[:, :21] for x in qkv), jnp.array([[True] * 21, [False] * 21]))
    forked = cache.fork(jnp.array([0, 0]))
    assert (forked.table[0, :2] == forked.table[1, :2]).all()
    assert forked.table[0, 2] != forked.table[1, 2]
    assert int((forked._uses() > 0).sum()) == 4


def test_a_choice_is_used_for_several_steps_and_is_the_best(qkv):
    """Of six blocks of eight, two are read beside the window; the choice of step 0 serves four steps."""
    q, k, v = qkv
    inner = DenseCache.init(B, 2 * T, K, D, jnp.float32)
    cache = SelectedCache.around(inner, Selection(tokens=24, sink=0, window=8, block=8, every=4), K)
    cache, _, _ = run(cache, Causal(), [x[:, :40] for x in qkv], (40,))
    choices = []
    for n in range(40, 46):
        cache, o, _ = step(cache, Causal(), *(x[:, n : n + 1] for x in qkv))
        choices.append(np.asarray(cache.chosen))
        read = np.zeros((B, K, T), bool)
        for b, g, block in np.ndindex(choices[-1].shape):
            read[b, g, choices[-1][b, g, block] * 8 :][:8] = True
        read[:, :, n - 7 :] = True
        read[:, :, n + 1 :] = False
        s = jnp.einsum("bgrd,bsgd->bgrs", q[:, n].reshape(B, K, H // K, D), k) * D**-0.5
        p = jax.nn.softmax(jnp.where(read[:, :, None], s, -jnp.inf))
        np.testing.assert_allclose(o[:, 0].reshape(B, K, H // K, D), jnp.einsum("bgrs,bsgd->bgrd", p, v), atol=4e-6)
    assert all((choices[0] == c).all() for c in choices[1:4])
    assert (choices[0] != choices[4]).any()
    blocks = k[:, :40].reshape(B, 5, 8, K, 1, D)  # those with a token older than the window
    heads = q[:, 40].reshape(B, 1, K, H // K, D)
    bound = jnp.maximum(heads * blocks.min(2), heads * blocks.max(2)).sum(-1).max(-1)
    np.testing.assert_array_equal(np.sort(np.argsort(bound, 1)[:, -2:].swapaxes(1, 2)), choices[0])


def test_the_first_chunk_needs_no_offset(qkv):
    """An empty cache whose length is known while tracing attends to the chunk alone."""
    first = jax.jit(lambda *part: step.__wrapped__(dense(), Causal(), *part)[1])
    o = first(*(x[:, :CHUNK] for x in qkv))
    np.testing.assert_allclose(o, expected("dense", qkv, Causal())[0][:, :CHUNK], atol=2e-6)
    eager = dense().append(*(x[:, :CHUNK] for x in qkv[1:]))
    np.testing.assert_allclose(eager.attend(qkv[0][:, :CHUNK], Causal())[0], o, atol=2e-6)


def test_lse_only_on_request(qkv):
    cache = ring().append(*(x[:, :12] for x in qkv[1:]))
    assert cache.attend(qkv[0][:, :12], WINDOWED, return_lse=False)[1] is None


@pytest.mark.parametrize("init", [dense, paged])
def test_low_precision_cache_under_full_precision_queries(qkv, init):
    _, o, lse = run(init(jnp.bfloat16), Causal(), qkv, (16, 16, 1))
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(o, expected("dense", qkv, Causal())[0][:, :33], atol=3e-2)


@pytest.mark.parametrize("init", [dense, paged])
def test_what_no_token_was_written_to_is_never_read(qkv, init):
    cache, _, _ = run(init(), Causal(), qkv, (16,))
    part = [x[:, 16:17] for x in qkv]
    if init is dense:
        dirty = replace(cache, k=cache.k.at[:, 17:].set(1e6), v=cache.v.at[:, 17:].set(1e6))
    else:  # pages of nobody
        used = jnp.zeros(cache.pool, bool).at[cache.table].set(True)[:, None, None, None]
        dirty = replace(cache, k=jnp.where(used, cache.k, jnp.nan), v=jnp.where(used, cache.v, jnp.nan))
    np.testing.assert_array_equal(step(cache, Causal(), *part)[1], step(dirty, Causal(), *part)[1])


def test_bytes_are_the_formula():
    assert DenseCache.init(B, 100, K, D, jnp.bfloat16).bytes == 2 * B * 100 * K * D * 2
    assert DenseCache.init(B, 100, K, D, jnp.int8).bytes == 2 * B * 100 * K * (D + 2)
    assert ring().bytes == 2 * B * (SINK + WINDOW) * K * D * 4
    assert grouped().bytes == 2 * B * (SINK + WINDOW + T) * D * 4
    # of 12 blocks of 4 tokens: 0, 5 and 10, and 0, 2 and 7; and a ring of two
    assert strided().bytes == 2 * B * K * (2 + 3) * 4 * D * 4
    pages = PagedCache.init(B, 100, K, D, jnp.bfloat16, page=16, pool=9)
    assert pages.bytes == 2 * 9 * K * 16 * D * 2 + 4 * B * 7
    assert PagedCache.init(B, 100, K, D, jnp.int8, page=16).bytes == 2 * 14 * K * 16 * (D + 2) + 4 * B * 7
    assert selected().bytes == selected().inner.bytes + 2 * B * (4 * T // PAGE) * K * D * 4


@pytest.mark.parametrize("name", [name for name in CACHES if name != "ring"])  # which has no end
def test_writing_past_the_end_is_an_error(qkv, name):
    cache = CACHES[name][0]()
    cache = replace(cache, inner=dense()) if name == "selected" else cache
    cache = cache.append(*(x[:, :40] for x in qkv[1:]))
    with pytest.raises(ValueError, match="reaches 56 tokens, but the capacity is 48"):
        cache.append(*(x[:, :16] for x in qkv[1:]))


def test_ring_refuses_what_it_cannot_hold(qkv):
    cache = ring().append(*(x[:, :4] for x in qkv[1:]))
    with pytest.raises(ValueError, match="the mask's window is 11 and the ring's 10"):
        cache.attend(qkv[0][:, :4], Causal() & (Sink(SINK) | Window(11)))
    with pytest.raises(ValueError, match="use a dense cache"):
        cache.attend(qkv[0][:, :4], Causal() & Intervals(8, jnp.zeros(6, jnp.int32)))
    with pytest.raises(ValueError, match="must be positive"):
        RingCache.init(B, 0, K, D, jnp.float32)


def test_selection_refuses_what_it_cannot_do(qkv):
    with pytest.raises(ValueError, match="leaves no block of 64 beside sink=64 and window=256"):
        Selection(tokens=320)
    with pytest.raises(ValueError, match="is not Causal"):
        selected().append(*(x[:, :4] for x in qkv[1:])).attend(qkv[0][:, :4], WINDOWED)


LARGE = {
    "dense": lambda: DenseCache.init(1, 32768, 2, 64, jnp.float32),
    "dense int8": lambda: DenseCache.init(1, 65536, 2, 64, jnp.int8),
    "paged": lambda: PagedCache.init(1, 32768, 2, 64, jnp.float32),
    "paged int8": lambda: PagedCache.init(1, 65536, 2, 64, jnp.int8),
    "selected": lambda: SelectedCache.around(PagedCache.init(1, 32768, 2, 64, jnp.float32), Selection(), 2),
}


@pytest.mark.parametrize("name", LARGE)
def test_decoding_is_in_place_with_small_temporaries(name):
    """Two layers over several tokens: the caches are aliased and nothing of their size is made beside them."""
    caches = jax.eval_shape(lambda: tuple(jax.tree.map(jnp.asarray, LARGE[name]()) for _ in range(2)))

    def write(caches, x):
        def token(caches, _):
            new = tuple(cache.append(x[:, :, :2], x[:, :, :2]).prepare(x) for cache in caches)
            return new, sum(cache.attend(x, Causal(), return_lse=False)[0] for cache in new)

        return jax.lax.scan(token, caches, length=3)

    memory = jax.jit(write, donate_argnums=0).lower(caches, jnp.ones((1, 1, 4, 64))).compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 0.05 * held


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_a_stretch_is_a_cache_of_its_own(dtype):
    """From another slot in each request; a stretch beyond the capacity holds what is there, as its length says."""
    k, v = jax.random.normal(jax.random.key(0), (2, B, T, K, D))
    cache = dense(dtype).append(k[:, :40], v[:, :40]).append(k[:, 40:42], v[:, 40:42])
    found = cache.stretch(jnp.array([16, 36]), 16)
    np.testing.assert_array_equal(found.length, [26, 6])
    np.testing.assert_array_equal(found.start, [24, 4])
    for mine, whole in zip(found.floats(jnp.float32), cache.floats(jnp.float32), strict=True):
        np.testing.assert_array_equal(mine[0], whole[0, 16:32])
        np.testing.assert_array_equal(mine[1, :12], whole[1, 36:])
