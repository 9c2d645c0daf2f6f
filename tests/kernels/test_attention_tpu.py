"""The TPU kernels, interpreted on CPU: unwritten memory is NaN, reads out of bounds raise, races are looked for."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, testing
from pallas_kernels.attention import mosaic_tpu, specs
from pallas_kernels.attention.specs import Spec
from pallas_kernels.masks import Causal, Sink, Window
from tests.kernels.attention_suite import SPECS, AttentionSuite, close, evaluate, expected

IN_CI = {"documents", "per_head", "chunk", "poison_segments"}


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


def test_only_listed_tiles_are_copied():
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
