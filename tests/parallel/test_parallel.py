"""Meshes, rules, and a sharded decoder that equals the single-device one (8 virtual devices)."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lcjax.models.decoder import Decoder, abstract
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec
from lcjax.parallel import ops
from lcjax.parallel.layout import attention_exchange
from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.rules import batch_sharding, constrain, partition, shardings

SPEC = ModelSpec(
    vocab_size=64,
    width=32,
    mlp_width=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    pattern=(Attention(window=9, sink=2), GatedLinear(feature_map="elu", normalise=True)),
    dtype="float32",
)


@pytest.mark.parametrize("degrees", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 1, "context": 4}])
def test_sharded_equals_single(degrees):
    graphdef, params = nnx.split(Decoder(SPEC, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)

    def loss(params, tokens):
        return jnp.mean(nnx.merge(graphdef, params)(tokens) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    expected, gradient = step(params, tokens)
    mesh = make_mesh(**degrees)
    places = shardings(params, mesh)
    sharded = jax.device_put(params, places)
    with jax.set_mesh(mesh):
        spread = jax.device_put(tokens, batch_sharding(mesh))
        step = jax.jit(jax.value_and_grad(loss), in_shardings=(places, batch_sharding(mesh)))
        got, got_gradient = step(sharded, spread)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got_gradient, gradient)
    if degrees.get("tensor"):
        kernel = sharded["layers"][0]["mixer"]["query"]["kernel"].get_value()
        assert kernel.addressable_shards[0].data.size == kernel.size // (degrees["fsdp"] * 2)


def ring_pass(layers):
    """Final states of packed rows by a decoder of full attention alone, as a function of its parameters; and these."""
    spec = dataclasses.replace(SPEC, num_layers=layers, pattern=(Attention(sink_logits=True),))
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [5, 20, 7], axis=1))
    positions = jnp.asarray([[*range(5), *range(20), *range(7)], [*range(25), *range(7)]])
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 64)

    def hidden(params):
        model = nnx.merge(graphdef, params)
        found, _ = model.hidden(tokens, positions=positions, segment_ids=segments, remat="attention", scan=layers > 1)
        return jnp.where(segments[..., None] > 0, found, 0)

    return hidden, params


def test_a_pass_is_dealt_out_once():
    """Full attention alone around a ring: states and gradients as on one device, and no layer moves queries."""
    hidden, params = ring_pass(2)
    weights = jax.random.normal(jax.random.key(2), (2, 32, SPEC.width))

    def scored(params):
        states = hidden(params)
        return jnp.vdot(weights, states), states

    gradient, expected = jax.jit(jax.grad(scored, has_aux=True))(params)
    mesh = make_mesh(fsdp=1, context=4, tensor=2)
    with jax.set_mesh(mesh), attention_exchange("ring"):
        got_gradient, got = jax.jit(jax.grad(scored, has_aux=True))(params)
        jaxpr = str(jax.make_jaxpr(hidden)(params))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    jax.tree.map(near, got_gradient, gradient)
    moved = set(re.findall(r"(\w+\[[\d,]*\]) = ppermute", jaxpr))
    assert moved == {"i32[2,4]", "f32[2,4,32]", "f32[2,8,1,8]", "i32[2,8]"}  # ids and states by halves, keys by shards


def test_mesh():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert dict(make_mesh(data=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert make_mesh(fsdp=1, devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor": 3}, "tensor=3 does not fit 8 devices"),
        ({"fsdp": 4}, "fsdp=4, context=1, tensor=1 does not fit 8"),
        ({"data": -1}, "data and fsdp are both -1"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_impossible_meshes(degrees, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**degrees)


def test_rules():
    sizes = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert partition(("embed", "heads", "head_dim"), sizes) == P(("fsdp",), ("tensor",), None)
    assert partition(("batch", "length"), sizes) == P(("data", "fsdp"), None)
    with pytest.raises(ValueError, match="'tensor' would split both 'heads' and 'mlp'"):
        partition(("heads", "mlp"), sizes)
    with pytest.raises(ValueError, match="'colour' has no rule"):
        partition(("colour",), sizes)
    with pytest.raises(ValueError, match="'heads' of size 3 does not split 2 ways"):
        partition(("heads",), sizes, (3,))


def test_indivisible_parameter_is_named():
    _, params = abstract(SPEC)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.key\.kernel: axis 'kv_heads' of size 2"):
        shardings(params, make_mesh(fsdp=2, tensor=4))


def test_constrain_without_a_mesh_is_nothing():
    x = jnp.ones((3, 4))
    assert constrain(x, ("batch", "length")) is x


def test_features_of_a_convolution_come_from_shards_as_from_one_device():
    """Groups of heads over tensor, the length over context; there the convolution reads the shard before it."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 16, 2, 8), (4, 4, 8), (4, 8, 4)
    x, taps, maps = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    ids = jnp.asarray([[1] * 7 + [2] * 9] * 2)
    run = jax.jit(lambda *arrays: ops.hedgehog_conv(*arrays, segment_ids=ids))
    expected = run(x, taps, maps)
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2, context=2)):
        np.testing.assert_allclose(run(x, taps, maps), expected, atol=1e-6)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        np.testing.assert_allclose(run(x, taps, maps), expected, atol=1e-6)
