"""The TPU kernels, interpreted on CPU: unwritten memory is NaN, reads out of bounds raise, races are looked for."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Unsupported, block_sparse_attention, testing
from pallas_kernels.attention import mosaic_tpu, specs
from pallas_kernels.attention.mosaic_tpu_parts import Scope
from pallas_kernels.attention.specs import Spec
from pallas_kernels.masks import Causal, Sink, Stride, Window, per_head
from tests.kernels.attention_suite import SPECS, AttentionSuite, close, evaluate, expected

IN_CI = {"documents", "chunk", "packed_sinks_per_head"}

# Lists in blocks that the kernels take: multiples of 128.
_MIXED = per_head([Causal() & Window(20), Causal() & Sink(0), Causal() & Stride(16, 3, 1), Causal()])
LISTS = {
    spec.name: spec
    for spec in (
        Spec(
            "listed", Causal() & (Sink(4) | Window(20)), length=300, batch=2, heads=4, kv_heads=2, lists=(2, 128, 128)
        ),
        Spec("only_listed", Causal() & Window(0), length=390, heads=2, dim=128, lists=(1, 256, 128)),
        Spec("listed_per_head", _MIXED, length=300, heads=4, kv_heads=2, lists=(4, 128, 256)),
        Spec("listed_full", Window(40), length=200, keys=390, heads=2, kv_heads=2, dim=128, lists=(2, 128, 128)),
        Spec("listed_chunk", Causal() & Window(9), 130, 390, q_offset=(200,), kv_length=(330,), lists=(1, 128, 128)),
        Spec("listed_segments", Causal() & Window(9), length=300, segments=True, lists=(1, 128, 128)),
    )
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles along each axis at test lengths."""
    monkeypatch.setattr(mosaic_tpu, "default_tiles", lambda call: (128, 128, 128))


class TestMosaicTpu(AttentionSuite):
    implementation = "mosaic_tpu"

    def evaluate(self, spec, **options):
        with testing.interpret_tpu(eager_copies=spec.name == "chunk"):
            return super().evaluate(spec, **options)

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow)
            for name, spec in SPECS.items()
            if not spec.lists
        ],
    )
    def test_forward_and_gradients(self, name):
        close(self.evaluate(SPECS[name], poison=SPECS[name].poison), expected(name), self.tolerance)

    @pytest.mark.parametrize(
        "name", [n if n == "listed_per_head" else pytest.param(n, marks=pytest.mark.slow) for n in LISTS]
    )
    def test_lists(self, name):
        close(self.evaluate(LISTS[name]), evaluate(LISTS[name], "reference"), self.tolerance)

    @pytest.mark.slow
    def test_packed_equals_separate(self):
        with testing.interpret_tpu():
            super().test_packed_equals_separate()

    test_rows_without_keys = pytest.mark.slow(AttentionSuite.test_rows_without_keys)
    test_repeats_bit_for_bit = pytest.mark.slow(AttentionSuite.test_repeats_bit_for_bit)
    test_a_planted_window_error_is_caught = pytest.mark.slow(AttentionSuite.test_a_planted_window_error_is_caught)

    @pytest.mark.parametrize(
        "name", ["head_dim_128", *(pytest.param(n, marks=pytest.mark.slow) for n in ("stride", "poison_segments"))]
    )
    def test_no_races(self, name):
        spec = SPECS[name]
        with testing.interpret_tpu(races=True):
            got = evaluate(spec, "mosaic_tpu", poison=spec.poison)
        close(got, expected(name), self.tolerance)


def forward(spec, **options):
    x = spec.arrays()
    return block_sparse_attention(x["q"], x["k"], x["v"], spec.mask, implementation="mosaic_tpu", **options)


def test_an_unwaited_copy_is_caught(monkeypatch):
    spec, transfer = SPECS["causal_65"], mosaic_tpu.transfer
    monkeypatch.setattr(mosaic_tpu, "transfer", lambda *a: None if a[-1] == "wait" else transfer(*a))
    with testing.interpret_tpu():
        assert jnp.isnan(forward(spec)).any()


def test_a_dropped_edge_mask_is_caught(monkeypatch):
    spec = SPECS["causal_65"]
    monkeypatch.setattr(mosaic_tpu, "tile_mask", lambda c, *_: jnp.ones((c.block_q, c.compute_k), bool))
    with testing.interpret_tpu(), pytest.raises(AssertionError):
        close({"o": np.asarray(forward(spec))}, {"o": expected(spec.name)["o"]}, 2e-5)


@pytest.mark.slow
def test_a_key_that_mask_and_list_both_name_counts_once(monkeypatch):
    """Planted: without the rule that a listed tile adds only what the mask leaves out, its keys count twice."""
    spec = LISTS["listed"]
    monkeypatch.setattr(mosaic_tpu, "Scope", lambda listed, **fields: Scope(listed=None, **fields))
    want = evaluate(spec, "reference")
    with testing.interpret_tpu(), pytest.raises(AssertionError):
        close({"o": np.asarray(forward(spec, **spec.options()))}, {"o": want["o"]}, 2e-5)


def test_lists_in_small_blocks_are_declined():
    spec = SPECS["lists"]
    with testing.interpret_tpu(), pytest.raises(Unsupported, match="lists in blocks of 16 x 32"):
        forward(spec, **spec.options())


def test_only_visited_tiles_are_copied():
    """NaN in every tile that the pattern skips would show if a tile too many were read."""
    spec = Spec("far", Causal() & (Sink(4) | Window(100)), length=600, heads=1)
    x = spec.arrays()
    run = lambda k, v, name: block_sparse_attention(x["q"][:, -10:], k, v, spec.mask, q_offset=590, implementation=name)
    place = jnp.arange(600)[:, None, None]
    k, v = (jnp.where((place < 128) | (place >= 384), x[n], jnp.nan) for n in "kv")
    with testing.interpret_tpu():
        o = run(k, v, "mosaic_tpu")
    np.testing.assert_allclose(o, run(x["k"], x["v"], "reference"), atol=2e-5)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [((100, 128, 128), "block_q: 100"), ((128, 128, 256), "compute_k: 256 does not divide")],
)
def test_impossible_tiles_are_refused(tiles, message):
    x = specs.TESTED[0].arrays()
    call = mosaic_tpu.Call(x["q"], x["k"], x["v"], Causal(), None, None, 0, None, 1.0, None, True)
    with pytest.raises(ValueError, match=message):
        mosaic_tpu.attend_with(call, *tiles)
