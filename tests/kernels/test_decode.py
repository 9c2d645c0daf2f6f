"""Decode attention: every backend against the definition, over every kind of cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels import op
from pallas_kernels.decode import api, mosaic_gpu, schedule, xla
from pallas_kernels.decode.cache import KVCache, pack_factors, quantize_tokens, unpack_factors
from pallas_kernels.masks import Causal, Sink, Stride, Window, per_head

KV, GROUP, D = 2, 3, 64
DENSE = None
STREAMING = Causal() & (Sink(5) | Window(40))
MIXED = per_head([STREAMING, Causal()], [0, 0, 0, 1, 0, 0])


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def contiguous(lengths=(200, 64), size=256) -> KVCache:
    """Slots without a token hold NaN."""
    held = (jnp.arange(size) < jnp.array(lengths)[:, None])[..., None, None]
    k, v = (jnp.where(held, draw(len(lengths), size, KV, D, seed=n), jnp.nan) for n in (1, 2))
    return KVCache(k, v, jnp.array(lengths))


def ring() -> KVCache:
    return KVCache(draw(2, 192, KV, D, seed=3), draw(2, 192, KV, D, seed=4), jnp.array([500, 150]), ring=4)


def paged(per_kv_head: bool) -> KVCache:
    """Pages that no request uses hold NaN."""
    table = jnp.array([[3, 1, 0, 5], [7, 2, -1, -1]])
    k, v = (draw(10, KV, 64, D, seed=n).at[jnp.array([4, 6, 8, 9])].set(jnp.nan) for n in (5, 6))
    if per_kv_head:
        table = jnp.stack([table, jnp.array([[1, 3, 5, 0], [2, 7, -1, -1]])], 1)
    return KVCache(k, v, jnp.array([200, 128]), page_table=table)


def quantized() -> KVCache:
    (k, ks), (v, vs) = (quantize_tokens(draw(2, 256, KV, D, seed=n)) for n in (1, 2))
    return KVCache(k, v, jnp.array([200, 64]), pack_factors(ks, vs).swapaxes(1, 2))


def block_list(heads: int = KV) -> pk.BlockList:
    idx = jnp.array([[[[0, 2, -1]], [[1, 2, 3]]], [[[0, 1, -1]], [[1, -1, -1]]]])
    return pk.BlockList(idx[:, :heads], jnp.array([[[2], [3]], [[2], [1]]])[:, :heads], block_q=8, block_k=64)


CASES = {
    "contiguous": (contiguous, 1, DENSE, {}),
    "three new tokens": (contiguous, 3, DENSE, {}),
    "sink and window": (contiguous, 2, STREAMING, {}),
    "a mask per head": (contiguous, 2, MIXED, {}),
    "ring": (ring, 2, Causal() & (Sink(4) | Window(100)), {}),
    "paged": (lambda: paged(False), 1, DENSE, {}),
    "table per KV head": (lambda: paged(True), 2, STREAMING, {}),
    "lists": (lambda: paged(False), 1, DENSE, {"lists": block_list()}),
    "one list for all heads": (contiguous, 1, DENSE, {"lists": block_list(1)}),
    "lists beside a window": (lambda: paged(False), 2, STREAMING, {"lists": block_list()}),
    "int8": (quantized, 1, DENSE, {}),
    "soft cap and sink logits": (contiguous, 1, DENSE, {"soft_cap": 3.0, "sink_logits": jnp.ones(KV * GROUP)}),
}
IN_INTERPRETER = ("ring", "table per KV head", "int8")  # the rest: `-m slow`


def check(case: str, backend):
    make, queries, mask, options = CASES[case]
    cache, q = make(), draw(2, queries, KV * GROUP, D, seed=9)
    expected, expected_lse = pk.decode_attention(q, cache, mask, return_lse=True, implementation="reference", **options)
    o, lse = backend(q, cache, mask, return_lse=True, **options)
    np.testing.assert_allclose(np.float32(o), np.float32(expected), atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_xla(case):
    check(case, lambda *args, **kw: pk.decode_attention(*args, implementation="xla", **kw))


@pytest.fixture
def interpreted(monkeypatch):
    tiles = mosaic_gpu.Tiles(sms=3, programs_per_sm=1)
    monkeypatch.setitem(api.BACKENDS, "mosaic_gpu", jax.jit(lambda call: mosaic_gpu.attend(call, tiles)))
    with op.interpret(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.parametrize("case", [c if c in IN_INTERPRETER else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_mosaic_gpu(case, interpreted):
    check(case, lambda *args, **kw: pk.decode_attention(*args, implementation="mosaic_gpu", **kw))


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (128, jnp.bfloat16),
        (64, jnp.int8),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in ((64, jnp.bfloat16), (128, jnp.int8))),
    ],
)
def test_lowers_for_hopper(dim, dtype):
    def make():
        store = jnp.zeros((2, 4096, 8, dim), dtype)
        factors = jnp.zeros((2, 8, 4096), jnp.int32) if dtype == jnp.int8 else None
        return KVCache(store, store, jnp.zeros(2, jnp.int32), factors)

    cache = jax.eval_shape(make)
    q = jax.ShapeDtypeStruct((2, 1, 32, dim), jnp.bfloat16)
    with op.target_platform("gpu"):
        run = jax.jit(lambda q, cache: pk.decode_attention(q, cache, implementation="mosaic_gpu"))
        assert "mosaic_gpu" in run.trace(q, cache).lower(lowering_platforms=("cuda",)).as_text()


def test_page_order_does_not_matter():
    cache, q = paged(False), draw(2, 1, KV * GROUP, D)
    order = jnp.array([2, 0, 5, 4, 9, 1, 3, 6, 8, 7])  # page p moves to order[p]
    moved = dataclasses.replace(
        cache,
        k=cache.k.at[order].set(cache.k),
        v=cache.v.at[order].set(cache.v),
        page_table=jnp.where(cache.page_table < 0, -1, order[cache.page_table]),
    )
    np.testing.assert_array_equal(pk.decode_attention(q, cache), pk.decode_attention(q, moved))


def test_a_ragged_batch_equals_single_requests():
    cache, q = contiguous(), draw(2, 1, KV * GROUP, D)
    both = pk.decode_attention(q, cache)
    for b in range(2):
        alone = KVCache(cache.k[b : b + 1], cache.v[b : b + 1], cache.lengths[b : b + 1])
        np.testing.assert_allclose(
            np.float32(both[b : b + 1]), np.float32(pk.decode_attention(q[b : b + 1], alone)), atol=1e-2
        )


def test_decoding_equals_the_rows_of_prefill():
    k, v, q = (draw(1, 300, heads, D, seed=n, dtype=jnp.float32) for n, heads in enumerate((KV, KV, KV * GROUP)))
    mask = Causal() & (Sink(4) | Window(70))
    rows = pk.block_sparse_attention(q, k, v, mask)
    for length in (1, 63, 64, 65, 127, 129, 300):
        cache = KVCache(k, v, jnp.array([length]))
        o = pk.decode_attention(q[:, length - 1 : length], cache, mask)
        np.testing.assert_allclose(o, rows[:, length - 1 : length], atol=1e-5)


def test_int8_is_within_its_bound():
    x = draw(4, 100, D, dtype=jnp.float32)
    codes, factor = quantize_tokens(x)
    most = jnp.abs(x).max(-1, keepdims=True)
    step = factor.astype(jnp.float32)[..., None]
    assert (codes >= -127).all()
    assert (step <= most / 127 * (1 + 2**-7)).all()
    assert (jnp.abs(codes * step - x) <= most / 252 + 1e-6).all()


def test_factors_survive_their_words():
    of_k, of_v = (jnp.exp(20 * draw(3, 40, seed=n, dtype=jnp.float32)).astype(jnp.bfloat16) for n in (1, 2))
    for found, wanted in zip(unpack_factors(pack_factors(of_k, of_v)), (of_k, of_v), strict=True):
        np.testing.assert_array_equal(found, wanted.astype(jnp.float32))


@pytest.mark.parametrize("programs", [1, 5, 132])
@pytest.mark.parametrize("repeat", [1, 3])
def test_the_schedule_covers_every_visit_once(programs, repeat):
    visits = np.array([4, 1, 0, 2, 7, 0, 3, 1, 1, 5])
    line = schedule.Line(lambda entry: jnp.asarray(visits, jnp.int32)[entry], len(visits), repeat)
    pairs, total = np.repeat(visits, repeat), int(line.total())
    seen = []
    for program in range(programs):
        begin, work = (int(x) for x in schedule.share(jnp.int32(total), program, programs))
        pair, visit = (int(x) for x in line.locate(jnp.int32(begin)))
        while work:
            n = min(int(pairs[pair]) - visit, work)
            start, held = (int(x) for x in line.start(jnp.int32(pair)))
            assert held == pairs[pair]
            for m in range(visit, visit + n):
                assert int(schedule.program_of(jnp.int32(start + m), jnp.int32(total), programs)) == program
            seen += [(pair, m) for m in range(visit, visit + n)]
            pair, visit, work = pair + 1, 0, work - n
    assert seen == [(p, n) for p in range(len(pairs)) for n in range(pairs[p])]


def test_block_scores_bound_every_key():
    cache, q = contiguous((256, 200)), draw(2, 2, KV * GROUP, D, dtype=jnp.float32)
    k = cache.k.astype(jnp.float32)
    scores = pk.block_scores(q, pk.block_bounds(k, cache.lengths, 64))
    exact = jnp.einsum("btkgd,bskd->bktgs", q.reshape(2, 2, KV, GROUP, D), jnp.nan_to_num(k)).max((2, 3))
    assert (scores >= exact.reshape(2, KV, 4, 64).max(-1) - 1e-4).all()


def test_selection_keeps_first_last_and_best():
    scores = jnp.array([[[0.0, 9.0, 1.0, 5.0, 2.0, 7.0]]])
    chosen = pk.select_blocks(scores, jnp.array([5 * 64 - 3]), 4, 64, first=1, last=1)
    assert chosen.idx.tolist() == [[[[0, 1, 3, 4]]]]  # block 5 holds no key
    few = pk.select_blocks(scores, jnp.array([70]), 4, 64, first=1, last=1)
    assert few.idx.tolist() == [[[[0, 1, -1, -1]]]]
    assert few.count.tolist() == [[[2]]]


def test_all_blocks_selected_equals_dense():
    cache, q = contiguous((256, 200)), draw(2, 1, KV * GROUP, D)
    chosen = pk.select_blocks(pk.block_scores(q, pk.block_bounds(cache.k, cache.lengths, 64)), cache.lengths, 4, 64)
    np.testing.assert_allclose(
        np.float32(pk.decode_attention(q, cache, lists=chosen)), np.float32(pk.decode_attention(q, cache)), atol=2e-2
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": jnp.array([300, 64])}, "length 300 is outside 1..256"),
        ({"lengths": jnp.array([0, 64])}, "length 0 is outside 1..256"),
        ({"k": jnp.zeros((2, 256, KV, 128), jnp.bfloat16)}, "head dim 128"),
        ({"k": jnp.zeros((2, 256, 4, D), jnp.bfloat16)}, "6 heads are not a multiple"),
        ({"k": jnp.zeros((2, 256, KV, D), jnp.int8)}, "int8 needs factors"),
        (
            {"k": jnp.zeros((2, 256, KV, D), jnp.int8), "factors": jnp.zeros((2, KV, 256), jnp.int16)},
            "factors are int16, not the int32 words",
        ),
        (
            {"k": jnp.zeros((2, 256, KV, D), jnp.int8), "factors": jnp.zeros((2, 256, KV), jnp.int32)},
            r"factors have shape \(2, 256, 2\), keys \(2, 256, 2, 64\) need \(2, 2, 256\)",
        ),
    ],
)
def test_bad_caches_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        pk.decode_attention(draw(2, 1, KV * GROUP, D), dataclasses.replace(contiguous(), **change))


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match="page_table names page 99"):
        pk.decode_attention(
            draw(2, 1, KV * GROUP, D), dataclasses.replace(paged(False), page_table=jnp.full((2, 4), 99))
        )
    with pytest.raises(ValueError, match="9 new tokens"):
        pk.decode_attention(draw(2, 9, KV * GROUP, D), contiguous())
    with pytest.raises(ValueError, match="not causal"):
        pk.decode_attention(draw(2, 1, KV * GROUP, D), contiguous(), pk.masks.Full())
    with pytest.raises(pk.Unsupported, match="column blocks"):
        pk.decode_attention(
            draw(2, 1, KV * GROUP, D), contiguous(), Causal() & Stride(64, 2), implementation="mosaic_gpu"
        )


class TestPlantedBugs:
    """The checks above notice these mistakes."""

    def expect_caught(self, case):
        with pytest.raises(AssertionError):
            test_xla(case)

    def test_a_window_that_starts_a_block_late(self, monkeypatch):
        def late(*args):
            found = schedule.static_visits(*args)
            return found._replace(tail=found.tail + 1, static=found.static - 1)

        monkeypatch.setattr(xla, "static_visits", late)
        self.expect_caught("sink and window")

    def test_sinks_that_nobody_visits(self, monkeypatch):
        def without(*args):
            found = schedule.static_visits(*args)
            return found._replace(sinks=found.sinks * 0, static=found.static - found.sinks)

        monkeypatch.setattr(xla, "static_visits", without)
        self.expect_caught("sink and window")

    def test_codes_without_their_factors(self, monkeypatch):
        monkeypatch.setattr(xla, "unpack_factors", lambda words: (1.0, 1.0))
        self.expect_caught("int8")

    def test_a_ring_read_as_if_it_never_turned(self, monkeypatch):
        position = KVCache.slot_positions

        def straight(cache, slot=None):  # the definition asks for all slots, the backend for some
            return position(cache if slot is None else dataclasses.replace(cache, ring=None), slot)

        monkeypatch.setattr(KVCache, "slot_positions", straight)
        self.expect_caught("ring")

    def test_a_program_that_ends_a_visit_early(self, monkeypatch):
        share = schedule.share
        monkeypatch.setattr(schedule, "share", lambda *args: (share(*args)[0], jnp.maximum(share(*args)[1] - 1, 0)))
        with pytest.raises(AssertionError):
            test_the_schedule_covers_every_visit_once(5, 1)
