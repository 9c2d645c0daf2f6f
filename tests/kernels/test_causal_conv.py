import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import causal_conv1d, causal_conv1d_step, op
from pallas_kernels.op import Unsupported

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_loop(x, w, bias, tail):
    width, t = len(w), x.shape[1]
    padded, w = np.concatenate([tail, x], axis=1), np.asarray(w)
    return np.stack([(padded[:, i : i + width] * w).sum(1) for i in range(t)], axis=1) + bias


@pytest.mark.parametrize("width", range(2, 9))
def test_matches_a_loop_and_hands_over_its_tail(width):
    x, w, bias, tail = draw(2, 11, 3), draw(width, 3, seed=1), draw(3, seed=2), draw(2, width - 1, 3, seed=3)
    expected = by_loop(x, w, bias, tail)
    y, last = causal_conv1d(x, w, bias=bias, tail=tail)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(last, np.concatenate([tail, x], 1)[:, 11:])
    y, _ = causal_conv1d(x, w, bias=bias, tail=tail, activation="silu")
    np.testing.assert_allclose(y, expected / (1 + np.exp(-expected)), atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_split_and_steps_equal_one_pass(cut):
    x, w = draw(2, 9, 3), draw(4, 3, seed=1)
    whole, end = causal_conv1d(x, w, activation="silu")
    first, tail = causal_conv1d(x[:, :cut], w, activation="silu")
    np.testing.assert_allclose(first, whole[:, :cut], atol=1e-6)
    for i in range(cut, 9):
        y, tail = causal_conv1d_step(x[:, i], w, tail, activation="silu")
        np.testing.assert_allclose(y, whole[:, i], atol=1e-6)
    np.testing.assert_array_equal(tail, end)


def test_segments_equal_separate_runs_and_padding_may_hold_nan():
    x, w, tail = draw(1, 12, 3), draw(4, 3, seed=1), draw(1, 3, 3, seed=2)
    x = x.at[:, 9:].set(jnp.nan)
    ids = jnp.asarray([[1] * 5 + [2] * 2 + [3] * 2 + [0] * 3])
    y, last = causal_conv1d(x, w, tail=tail, segment_ids=ids)
    start = 0
    for i, n in enumerate((5, 2, 2)):
        alone, end = causal_conv1d(x[:, start : start + n], w, tail=tail if i == 0 else None)
        np.testing.assert_allclose(y[:, start : start + n], alone, atol=1e-6)
        start += n
    np.testing.assert_array_equal(y[:, 9:], 0)
    np.testing.assert_array_equal(last, end)

    def loss(x, tail):
        return (causal_conv1d(x, w, tail=tail, segment_ids=ids)[0] ** 2).sum()

    grads = jax.grad(loss, (0, 1))(x, tail)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[0][:, 9:], 0)


def test_a_row_of_padding_keeps_its_tail():
    x, w, tail = draw(2, 4, 3), draw(4, 3, seed=1), draw(2, 3, 3, seed=2)
    ids = jnp.asarray([[1, 1, -1, -1], [-1, -1, -1, -1]])
    y, last = causal_conv1d(x, w, tail=tail, segment_ids=ids)
    np.testing.assert_array_equal(last[1], tail[1])
    np.testing.assert_array_equal(last[0], np.concatenate([tail[0, 2:], x[0, :2]]))
    np.testing.assert_array_equal(y[1], 0)


@pytest.mark.parametrize("width", [1, 9])
def test_width_out_of_range(width):
    with pytest.raises(ValueError, match=f"w has width {width}"):
        causal_conv1d(jnp.ones((1, 4, 3)), jnp.ones((width, 3)))


@pytest.mark.usefixtures("unchecked")
def test_shapes_and_names_that_do_not_fit():
    x, w = jnp.ones((1, 4, 3)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="w has 2 channels"):
        causal_conv1d(x, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"tail has shape \(1, 2, 3\)"):
        causal_conv1d(x, w, tail=jnp.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="segment_ids decreases"):
        causal_conv1d(x, w, segment_ids=jnp.asarray([[2, 2, 1, 1]]))
    with pytest.raises(ValueError, match="'relu'"):
        causal_conv1d(x, w, activation="relu")


class TestMosaicGpu:
    """The Hopper kernel interpreted, against the multiply-adds in float32, and its CUDA lowering."""

    @pytest.mark.parametrize(
        ("length", "width", "packed", "tail"),
        [(130, 4, True, True), slow(64, 2, False, True), slow(200, 8, True, False)],
    )
    def test_matches_the_reference(self, length, width, packed, tail):
        """All gradients; documents that end around the border of a tile, padding that holds NaN."""
        ids = None
        if packed:
            first = np.repeat([1, 2, 3, 4, 0], [2, 61, 2, length - 70, 5])
            first[30:32] = -1
            ids = jnp.asarray(first)[None]
        case = [draw(1, length, 64), draw(width, 64, seed=1), draw(1, width - 1, 64, seed=2)]
        x, w, tail_array = (part.astype(jnp.bfloat16) for part in case)
        if ids is not None:
            x = jnp.where(ids[..., None] > 0, x, jnp.nan)
        arguments = (x, w, tail_array) if tail else (x, w)
        weights = draw(1, length, 64, seed=3).astype(jnp.bfloat16)

        @functools.partial(jax.jit, static_argnums=1)
        def run(arguments, implementation):
            def f(x, w, tail=None):
                return causal_conv1d(x, w, tail=tail, segment_ids=ids, implementation=implementation)[0]

            y, pull = jax.vjp(f, *arguments)
            return y, *pull(weights.astype(y.dtype))

        with op.interpret(plgpu.InterpretGPUParams()):
            found = run(arguments, "mosaic_gpu")
        expected = run(tuple(part.astype(jnp.float32) for part in arguments), "xla")
        for one, other in zip(found, expected, strict=True):
            one = np.asarray(one, np.float32)
            np.testing.assert_allclose(one, other, rtol=2**-8, atol=2**-8)  # of bfloat16, rounded once

    def test_lowers_for_cuda(self):
        x, w, ids = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (((2, 1024, 192), jnp.bfloat16), ((4, 192), jnp.bfloat16), ((2, 1024), jnp.int32))
        )

        def loss(x, w, ids):
            return causal_conv1d(x, w, segment_ids=ids)[0].astype(jnp.float32).sum()

        with op.target_platform("gpu"):
            text = jax.jit(jax.grad(loss, (0, 1))).trace(x, w, ids).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text

    @pytest.mark.parametrize(
        ("shape", "dtype", "options", "says"),
        [
            ((1, 64, 64), jnp.float32, {}, "x is float32"),
            ((1, 64, 60), jnp.bfloat16, {}, "x has 60 channels"),
            ((1, 63, 64), jnp.bfloat16, {}, "x has 63 tokens"),
            ((1, 64, 64), jnp.bfloat16, {"activation": "silu"}, "a bias or activation"),
        ],
    )
    def test_refuses(self, shape, dtype, options, says):
        with op.interpret(plgpu.InterpretGPUParams()), pytest.raises(Unsupported, match=says):
            causal_conv1d(
                jnp.ones(shape, dtype), jnp.ones((4, shape[2]), dtype), implementation="mosaic_gpu", **options
            )
