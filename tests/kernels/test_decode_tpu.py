"""Decode attention on TPU: its streams of visits, its kernel interpreted, and the real compiler without a TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels as pk
from pallas_kernels import testing
from pallas_kernels.decode import api, mosaic_tpu, mosaic_tpu_visits
from pallas_kernels.decode.cache import KVCache, pack_factors, quantize_tokens, unpack_factors
from pallas_kernels.decode.call import Call
from pallas_kernels.masks import Causal, Sink, Stride, Window, per_head

GROUP = 3
STREAMING = Causal() & (Sink(5) | Window(40))
MIXED = per_head([STREAMING, Causal()], [0, 0, 0, 1, 0, 0])


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Several steps, and several chunks of a stream, at test lengths."""
    monkeypatch.setattr(mosaic_tpu, "STEP", 128)


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def contiguous(kv_heads=2, dim=128, lengths=(300, 65), size=384, dtype=jnp.bfloat16) -> KVCache:
    """Slots without a token hold NaN."""
    held = (jnp.arange(size) < jnp.array(lengths)[:, None])[..., None, None]
    shape = (len(lengths), size, kv_heads, dim)
    k, v = (jnp.where(held, draw(*shape, seed=n, dtype=dtype), jnp.nan) for n in (1, 2))
    return KVCache(k, v, jnp.array(lengths))


def ring() -> KVCache:
    return KVCache(draw(2, 192, 2, 128, seed=3), draw(2, 192, 2, 128, seed=4), jnp.array([500, 150]), ring=4)


def paged(per_kv_head: bool = False, page: int = 32, dim: int = 128) -> KVCache:
    """Pages that no request uses hold NaN."""
    table = jnp.array([[3, 1, 0, 5, -1], [7, 2, -1, -1, -1]])
    k, v = (draw(10, 2, page, dim, seed=n).at[jnp.array([4, 6, 8, 9])].set(jnp.nan) for n in (5, 6))
    if per_kv_head:
        table = jnp.stack([table, jnp.array([[1, 3, 5, 0, -1], [2, 7, -1, -1, -1]])], 1)
    return KVCache(k, v, jnp.array([3 * page + 9, 2 * page]), page_table=table)


def quantized(cache: KVCache) -> KVCache:
    """The same in int8; codes of slots without a token are of NaN, their factors NaN."""
    (k, of_k), (v, of_v) = quantize_tokens(cache.k), quantize_tokens(cache.v)
    factors = pack_factors(of_k, of_v)
    return dataclasses.replace(cache, k=k, v=v, factors=factors.swapaxes(1, 2) if cache.page_table is None else factors)


def without_nan(factors: jax.Array | None) -> jax.Array | None:
    if factors is None:
        return None
    return pack_factors(*(jnp.nan_to_num(x).astype(jnp.bfloat16) for x in unpack_factors(factors)))


def block_list(block: int, heads: int = 2) -> pk.BlockList:
    idx = jnp.array([[[[0, 2, -1]], [[1, 2, 3]]], [[[0, 1, -1]], [[1, -1, -1]]]])
    return pk.BlockList(idx[:, :heads], jnp.array([[[2], [3]], [[2], [1]]])[:, :heads], block_q=8, block_k=block)


CASES = {
    "tokens": (contiguous, 1, None, {}),
    "tokens of odd capacity": (lambda: contiguous(4, size=333), 2, STREAMING, {}),
    "tokens int8": (lambda: quantized(contiguous(4)), 1, None, {}),
    "tokens and a list": (lambda: contiguous(size=384), 1, None, {"lists": block_list(64, 1)}),
    "float32": (lambda: contiguous(1, dtype=jnp.float32), 3, None, {}),
    "heads": (lambda: contiguous(1, 256), 8, None, {}),
    "transposed": (lambda: contiguous(3, 64), 2, STREAMING, {}),
    "transposed int8": (lambda: quantized(contiguous(3, 64)), 1, None, {}),
    "transposed pages": (lambda: paged(page=128, dim=64), 1, None, {}),
    "ring": (ring, 2, Causal() & (Sink(4) | Window(100)), {}),
    "paged": (paged, 1, None, {}),
    "paged int8": (lambda: quantized(paged(page=128)), 2, STREAMING, {}),
    "table per KV head": (lambda: paged(True), 2, STREAMING, {}),
    "a mask per head": (lambda: paged(page=64), 2, MIXED, {}),
    "lists": (lambda: paged(), 1, None, {"lists": block_list(32)}),
    "lists of parts of pages": (lambda: paged(page=64), 2, STREAMING, {"lists": block_list(32)}),
    "soft cap and sink logits": (paged, 1, None, {"soft_cap": 3.0, "sink_logits": jnp.ones(2 * GROUP)}),
}
IN_CI = {"tokens of odd capacity", "lists of parts of pages"}


def compare(case: str, parts: int = 1, races: bool = False) -> None:
    make, queries, mask, options = CASES[case]
    cache = make()
    dtype = jnp.float32 if cache.k.dtype == jnp.float32 else jnp.bfloat16
    q = draw(2, queries, cache.num_kv_heads * GROUP, cache.k.shape[-1], seed=9, dtype=dtype)
    clean = dataclasses.replace(cache, factors=without_nan(cache.factors))
    want = pk.decode_attention(q, clean, mask, return_lse=True, implementation="reference", **options)
    with testing.interpret_tpu(races=races, eager_copies=not races), pytest.MonkeyPatch.context() as patch:
        if parts > 1:
            divided = lambda call: mosaic_tpu.attend_with(call, mosaic_tpu.layout_of(call), parts)
            patch.setitem(api.BACKENDS, "mosaic_tpu", divided)
        run = lambda q, cache: pk.decode_attention(
            q, cache, mask, return_lse=True, implementation="mosaic_tpu", **options
        )
        o, lse = jax.jit(run)(q, cache)
    np.testing.assert_allclose(np.float32(o), np.float32(want[0]), atol=2e-2)
    np.testing.assert_allclose(lse, want[1], atol=2e-5)


@pytest.mark.parametrize("case", [c if c in IN_CI else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_equals_the_definition(case):
    compare(case)


@pytest.mark.parametrize("case", ["paged", *(pytest.param(c, marks=pytest.mark.slow) for c in ("ring", "transposed"))])
def test_no_races(case):
    compare(case, races=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tokens", "lists"])
def test_two_cores_merge_their_halves(case):
    compare(case, parts=2)


def spoil(monkeypatch, name: str, replacement) -> None:
    monkeypatch.setattr(mosaic_tpu, name, replacement)


def test_a_dropped_length_mask_is_caught(monkeypatch):
    spoil(monkeypatch, "visible", lambda c, *_: jnp.ones((c.heads * c.rows, c.layout.tokens), bool))
    with pytest.raises(AssertionError):
        compare("paged")


@pytest.mark.slow
def test_an_unwaited_copy_is_caught(monkeypatch):
    copies = mosaic_tpu.copies
    spoil(monkeypatch, "copies", lambda *a: None if a[-1] == "wait" else copies(*a))
    with pytest.raises(AssertionError):
        compare("paged", races=True)


@pytest.mark.slow
def test_an_off_by_one_in_the_ring_is_caught(monkeypatch):
    position = mosaic_tpu.ring_position
    spoil(monkeypatch, "ring_position", lambda slot, *a: position(slot + 1, *a))
    with pytest.raises(AssertionError):
        compare("ring")


@pytest.mark.parametrize("length", [1, 3, 4, 5, 191, 192, 193, 380, 500])
def test_ring_positions(length):
    cache = dataclasses.replace(ring(), lengths=jnp.array([length, length]))
    got = mosaic_tpu.ring_position(jnp.arange(192), jnp.int32(length), 4, 192)
    np.testing.assert_array_equal(jnp.where(got >= jnp.minimum(jnp.arange(192), 4), got, -1), cache.slot_positions()[0])


def test_words_hold_neighbouring_heads():
    """`unpacked` against the hardware's packing, as the interpreter defines it."""
    for dtype in (jnp.bfloat16, jnp.int8):
        packing = 4 // jnp.dtype(dtype).itemsize
        x = (draw(64, 128, dtype=jnp.float32) * 40).astype(dtype)

        def kernel(x_ref, o_ref, dtype=dtype, packing=packing):
            words = pltpu.bitcast(x_ref[...], jnp.int32)
            for n in range(packing):
                o_ref[n] = mosaic_tpu.unpacked(words, n, dtype).astype(jnp.float32)

        shape = jax.ShapeDtypeStruct((packing, 64 // packing, 128), jnp.float32)
        got = pl.pallas_call(kernel, out_shape=shape, interpret=pltpu.InterpretParams())(x)
        np.testing.assert_array_equal(got, x.reshape(-1, packing, 128).swapaxes(0, 1).astype(jnp.float32))


def visits_of(case: str, parts: int):
    """(call, layout, [program's (place, tag) pairs])."""
    make, queries, mask, options = CASES[case]
    cache, mask = make(), mask or (Causal() if "lists" not in options else Causal() & Window(0))
    heads = cache.num_kv_heads * GROUP
    lists = options.get("lists")
    q = draw(2, queries, heads, cache.k.shape[-1])
    block = 64 if lists is None else lists.block_k
    call = Call(q, cache, mask.plan(heads, queries, cache.capacity, queries, block), lists, 1.0, None)
    layout = mosaic_tpu.layout_of(call)
    visits = jax.jit(lambda call: mosaic_tpu_visits.make_visits(call, layout, parts))(call)
    stream = np.asarray(visits.stream).reshape(len(visits.count), -1, 2, mosaic_tpu_visits.CHUNK).swapaxes(1, 2)
    stream = stream.reshape(len(visits.count), 2, -1)
    return call, layout, [rows[:, :n].T.tolist() for rows, n in zip(stream, visits.count, strict=True)]


def read_units(call: Call, layout, program: int) -> tuple[set[int], set[int], set[int]]:
    """Units with a key that the mask lets a row of a program read, those whose keys all rows read, those listed."""
    cache, unit = call.cache, layout.unit
    request, of_set = divmod(program, layout.sets)
    heads = [h for h in range(call.q.shape[2]) if layout.sets == 1 or h // GROUP == of_set]
    j = np.asarray(cache.slot_positions())[request]
    i = int(cache.lengths[request]) - call.q.shape[1] + np.arange(call.q.shape[1])[:, None, None]
    pattern = np.asarray(call.plan.pattern_of_head)[heads][:, None]
    allowed = np.asarray(call.plan.allow(i, np.maximum(j, 0), pattern)) & (j >= 0) & (j <= i)
    some = set((np.flatnonzero(allowed.any((0, 1))) // unit).tolist())
    every = allowed.all((0, 1))[: cache.capacity // unit * unit].reshape(-1, unit).all(1)
    if call.lists is None:
        return some, set(np.flatnonzero(every).tolist()), set()
    row, pieces = of_set if layout.sets > 1 else 0, call.lists.block_k // unit
    chosen = np.asarray(call.lists.idx)[request, row, 0, : int(call.lists.count[request, row, 0])]
    listed = {int(block) * pieces + n for block in chosen for n in range(pieces)}
    held = int(cache.lengths[request])
    return some, set(np.flatnonzero(every).tolist()), {block for block in listed if block * unit < held}


STREAMS = [
    *(
        (case, 1)
        for case in ("tokens and a list", "transposed", "ring", "table per KV head", "a mask per head", "lists")
    ),
    *((case, 2) for case in ("tokens of odd capacity", "paged", "lists of parts of pages")),
]


@pytest.mark.parametrize(("case", "parts"), STREAMS)
def test_streams_name_what_is_read_and_nothing_else(case, parts):
    call, layout, streams = visits_of(case, parts)
    cache, unit, per_part = call.cache, layout.unit, len(streams) // parts
    for program in range(per_part):
        request, of_set = divmod(program, layout.sets)
        some, every, listed = read_units(call, layout, program)
        found = [entry for part in range(parts) for entry in streams[part * per_part + program]]
        own = [tag // 4 // unit for _, tag in found if not tag & mosaic_tpu_visits.LISTED]
        assert len(own) == len(set(own))
        assert set(own) >= some
        assert sorted(tag // 4 // unit for _, tag in found if tag & mosaic_tpu_visits.LISTED) == sorted(listed)
        for place, tag in found:
            logical = tag // 4 // unit
            assert logical * unit < min(int(cache.lengths[request]), cache.capacity)
            if tag & mosaic_tpu_visits.WHOLE and not tag & mosaic_tpu_visits.LISTED:
                assert logical in every
            if cache.page_table is None:
                assert place == min(logical * unit, cache.capacity - unit)
            else:
                table = np.asarray(cache.page_table)[request]
                page, at = divmod(logical * unit, cache.k.shape[2])
                pages = cache.k.shape[2] // unit
                assert place == (table[of_set] if table.ndim == 2 else table)[page] * pages + at // unit


@pytest.mark.parametrize(
    ("cache", "mask", "lists", "says"),
    [
        (lambda: paged(page=64, dim=64), None, None, "multiples of 128"),
        (paged, Causal() & Stride(64, 2), None, "column blocks"),
        (contiguous, None, block_list(64), "use pages"),
        (lambda: contiguous(lengths=(40, 30), size=100), None, None, "100 slots"),
        (lambda: contiguous(3, 64, size=333), None, None, "multiples of 128"),
        (lambda: quantized(paged(page=64)), None, block_list(32), "whole pages"),
    ],
)
def test_what_it_cannot_do_is_said(cache, mask, lists, says):
    held = cache()
    q = draw(2, 1, held.num_kv_heads * GROUP, held.k.shape[-1])
    with testing.interpret_tpu(), pytest.raises(pk.Unsupported, match=says):
        pk.decode_attention(q, held, mask, lists=lists, implementation="mosaic_tpu")
