"""The XLA backend against the oracle, its masks drawn at random, and what it skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import block_sparse_attention
from pallas_kernels.attention import specs, xla
from pallas_kernels.attention.specs import Spec
from pallas_kernels.masks import Causal, Intervals, Sink, Stride, Window, per_head
from tests.kernels.attention_suite import SPECS, AttentionSuite, close, evaluate, expected


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles along each axis at test lengths."""
    whole = xla._tile
    monkeypatch.setattr(xla, "_tile", lambda length, target, unit: whole(length, 48, unit))


class TestXla(AttentionSuite):
    implementation = "xla"

    def test_bfloat16(self):
        got = evaluate(SPECS["sink_window"], "xla", jnp.bfloat16)
        close(got, evaluate(SPECS["sink_window"], "reference", jnp.bfloat16), 2e-2)

    def test_blocks_in_the_mask_equal_lists(self):
        spec = SPECS["lists"]
        got = evaluate(spec, "xla", mask=specs.blocks_of(spec))
        close(got, expected("lists"), 2e-5)

    def test_numbers_may_be_traced(self):
        spec = SPECS["stride"]
        q, k, v = (spec.arrays()[n] for n in "qkv")
        mask = lambda n, w, e: Causal() & (Sink(n) | Window(w) | Stride(16, e))
        run = jax.jit(lambda *numbers: block_sparse_attention(q, k, v, mask(*numbers), implementation="xla"))
        for numbers in ((4, 20, 3), (0, 7, 5)):
            want = block_sparse_attention(q, k, v, mask(*numbers), implementation="reference")
            np.testing.assert_allclose(run(*numbers), want, atol=2e-5)
        assert run._cache_size() == 1

    def test_visits_only_what_the_mask_allows(self):
        length, tile = 2048, 48
        q = jnp.zeros((1, length, 2, 8))
        mask = Causal() & (Sink(4) | Window(96))
        call = _call(q, mask)
        count = xla._schedule(call).count
        assert count.max() <= 1 + 96 // tile + 1
        assert xla._schedule(_call(q, Causal())).count.sum() == sum(range(1, -(-length // tile) + 1))

    def test_a_dropped_edge_mask_is_caught(self, monkeypatch):
        spec = SPECS["causal_65"]
        monkeypatch.setattr(xla, "_mask", lambda *_: jnp.ones((1, 1, 1, 1, 1), bool))
        with pytest.raises(AssertionError):
            close(evaluate(spec, "xla"), expected(spec.name), 2e-5)

    def test_a_skipped_tile_is_caught(self, monkeypatch):
        spec, visits = SPECS["causal_groups_of_3"], xla._visits
        monkeypatch.setattr(xla, "_visits", lambda *a: visits(*a) & (np.arange(3) != 1))
        with pytest.raises(AssertionError):
            close(evaluate(spec, "xla"), expected(spec.name), 2e-5)


def _call(q, mask):
    from pallas_kernels.attention.call import Call

    return Call(q, q, q, mask, None, None, 0, None, 1.0, None, True)


NUMBERS = st.fixed_dictionaries(
    {
        "sink": st.none() | st.integers(0, 40),
        "window": st.none() | st.integers(0, 120),
        "stride": st.none() | st.tuples(st.sampled_from([8, 24]), st.integers(1, 6), st.integers(0, 5)),
        "ends": st.lists(st.integers(0, 130), min_size=9, max_size=9),
    }
)


def mask_of(numbers):
    mask = Intervals(16, np.asarray(numbers["ends"], np.int32))
    if numbers["sink"] is not None:
        mask = mask | Sink(numbers["sink"])
    if numbers["window"] is not None:
        mask = mask | Window(numbers["window"])
    return Causal() & (mask if numbers["stride"] is None else mask | Stride(*numbers["stride"]))


DRAWN = given(drawn=st.lists(NUMBERS, min_size=1, max_size=2), length=st.sampled_from([1, 65, 130]))


@settings(max_examples=5)
@DRAWN
def test_masks_drawn_at_random(drawn, length):
    check_drawn(drawn, length)


@pytest.mark.slow
@settings(max_examples=40)
@DRAWN
def test_many_masks_drawn_at_random(drawn, length):
    check_drawn(drawn, length)


def check_drawn(drawn, length):
    mask = mask_of(drawn[0]) if len(drawn) == 1 else per_head([mask_of(numbers) for numbers in drawn])
    spec = Spec("drawn", mask, length=length, keys=130, kv_heads=2, dim=8, q_offset=130 - length)
    x = spec.arrays()
    run = lambda name: block_sparse_attention(
        x["q"], x["k"], x["v"], mask, q_offset=spec.q_offset, return_lse=True, implementation=name
    )
    for got, want in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
