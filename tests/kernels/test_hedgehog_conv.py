import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import causal_conv1d, hedgehog_conv1d, op
from pallas_kernels.op import Unsupported

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def draw(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def documents(length):
    """Ids of documents that end around the border of a tile, with padding inside and at the end."""
    ids = np.repeat([1, 2, 3, 4, 0], [2, 60, 3, length - 70, 5])
    ids[30:32] = -1
    return jnp.asarray(ids)[None]


def case(length, groups, heads, dim, *, width=4, packed=False, tail=False):
    """Arguments in bfloat16, NaN in the padding."""
    x = draw(1, length, groups, dim)
    ids = documents(length) if packed else None
    if ids is not None:
        x = jnp.where((ids > 0)[..., None, None], x, jnp.nan)
    before = draw(1, width - 1, groups, dim, seed=3) if tail else None
    arrays = (x, draw(width, heads, dim, seed=1, scale=0.5), draw(heads, dim, dim // 2, seed=2, scale=0.2), before)
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), arrays), ids


def with_gradients(arrays, ids, implementation):
    """Features, and the gradients of a weighted sum of them in every array."""

    @jax.jit
    def run(arrays):
        def f(x, w, maps, tail):
            return hedgehog_conv1d(x, w, maps, tail=tail, segment_ids=ids, implementation=implementation)

        y, pull = jax.vjp(f, *arrays)
        return y, pull(draw(*y.shape, seed=4).astype(y.dtype))

    return run(arrays)


def wide(arrays):
    return jax.tree.map(lambda a: a.astype(jnp.float32), arrays)


def assert_near(found, expected, limit):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(a, np.float64) for a in (one, other))
        assert np.linalg.norm(one - other) <= limit * np.linalg.norm(other)


def test_equals_the_formula_for_groups_segments_and_a_tail():
    (x, w, maps, tail), ids = wide(case(75, 2, 4, 6, packed=True, tail=True)[0]), documents(75)
    found = hedgehog_conv1d(x, w, maps, tail=tail, segment_ids=ids)
    for head in range(4):
        group = head // 2
        y, _ = causal_conv1d(x[:, :, group], w[:, head], tail=tail[:, :, group], segment_ids=ids)
        u = np.asarray(y, np.float64) @ np.asarray(maps[head], np.float64)
        signs = [np.exp(sign * u) / np.exp(sign * u).sum(-1, keepdims=True) for sign in (1, -1)]
        np.testing.assert_allclose(found[:, :, head], np.concatenate(signs, axis=-1), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"w": (9, 4, 6)}, "w has width 9"),
        ({"x": (1, 8, 2, 5)}, r"x has heads \(2, 5\)"),
        ({"x": (1, 8, 3, 6)}, r"x has heads \(3, 6\)"),
        ({"maps": (2, 6, 3)}, r"maps has shape \(2, 6, 3\)"),
        ({"tail": (1, 2, 2, 6)}, r"tail has shape \(1, 2, 2, 6\)"),
    ],
)
def test_refuses_what_does_not_fit(changed, says):
    shapes = {"x": (1, 8, 2, 6), "w": (4, 4, 6), "maps": (4, 6, 3)} | changed
    with pytest.raises(ValueError, match=says):
        hedgehog_conv1d(**{name: jnp.ones(shape) for name, shape in shapes.items()})


class TestMosaicGpu:
    """The Hopper kernel interpreted, against float32, and its CUDA lowering."""

    @pytest.mark.parametrize(
        ("length", "groups", "heads", "dim", "options"),
        [
            (130, 1, 2, 64, {"packed": True, "tail": True}),
            (70, 1, 1, 128, {"tail": True}),
            slow(200, 2, 2, 128, {"packed": True, "width": 8}),
            slow(64, 1, 1, 64, {"width": 2}),
        ],
    )
    def test_matches_the_parts(self, length, groups, heads, dim, options):
        arrays, ids = case(length, groups, heads, dim, **options)
        with op.interpret(plgpu.InterpretGPUParams()):
            found, gradients = with_gradients(arrays, ids, "mosaic_gpu")
        expected, _ = with_gradients(wide(arrays), ids, "parts")
        assert_near(found, expected, 5e-3)
        assert_near(gradients, with_gradients(arrays, ids, "parts")[1], 1e-6)

    @pytest.mark.parametrize("dim", [64, slow(128)])
    def test_lowers_for_cuda(self, dim):
        arrays, _ = case(75, 1, 2, dim)
        with op.target_platform("gpu"):
            traced = jax.jit(lambda x, w, maps, ids: hedgehog_conv1d(x, w, maps, segment_ids=ids)).trace(
                *arrays[:3], documents(75)
            )
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        assert "dot_general" not in text

    @pytest.mark.parametrize(
        ("shape", "features", "dtype", "says"),
        [
            ((1, 64, 1, 64), 32, jnp.float32, "x is float32"),
            ((1, 64, 1, 128), 32, jnp.bfloat16, "maps are 128 x 32"),
            ((1, 63, 1, 64), 32, jnp.bfloat16, "x has 63 tokens"),
        ],
    )
    def test_refuses(self, shape, features, dtype, says):
        dim = shape[3]
        arrays = (jnp.ones(s, dtype) for s in (shape, (4, 1, dim), (1, dim, features)))
        with op.interpret(plgpu.InterpretGPUParams()), pytest.raises(Unsupported, match=says):
            hedgehog_conv1d(*arrays, implementation="mosaic_gpu")


@pytest.mark.gpu
class TestOnHopper:
    """On the device: copies, products and barriers as they are."""

    @pytest.mark.parametrize(
        ("length", "groups", "heads", "dim", "options"),
        [
            (64, 1, 1, 64, {"width": 2}),
            (999, 3, 9, 64, {"packed": True, "tail": True}),
            (1023, 2, 4, 128, {"packed": True, "tail": True}),
            (4096, 32, 32, 128, {}),
        ],
    )
    def test_matches_float32(self, length, groups, heads, dim, options):
        arrays, ids = case(length, groups, heads, dim, **options)
        found, gradients = with_gradients(arrays, ids, "mosaic_gpu")
        expected, wanted = with_gradients(wide(arrays), ids, "parts")
        assert_near(found, expected, 5e-3)
        assert_near(gradients, wanted, 6e-2)  # by the parts, which round the product with the map

    def test_repeats_bitwise(self):
        arrays, ids = case(3000, 4, 8, 128, packed=True)
        first, *others = (with_gradients(arrays, ids, "mosaic_gpu")[0] for _ in range(5))
        for other in others:
            np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(other, np.float32))
