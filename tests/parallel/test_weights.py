"""A stored weight is put together axis by axis, and its gradient is the unsharded one, dealt out the same way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lcjax.parallel.collectives import collectives
from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.rules import batch_sharding, partition
from lcjax.parallel.weights import storage_axes, whole

AXES = ("embed", "mlp")


@pytest.mark.parametrize(
    ("degrees", "order"),
    [
        ({"fsdp": 2, "context": 4}, ("fsdp", "context")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("fsdp",)),
        ({"data": 8, "fsdp": 1}, ()),
    ],
    ids=str,
)
def test_a_weight_and_its_gradient(degrees, order):
    mesh = make_mesh(**degrees)
    spec = partition(AXES, dict(mesh.shape))
    assert storage_axes(spec) == order
    stored, rows = NamedSharding(mesh, spec), batch_sharding(mesh)
    x = jax.random.normal(jax.random.key(0), (8, 16, 32))
    w = jax.random.normal(jax.random.key(1), (32, 48))

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ whole(w, AXES)))

    expected = jax.grad(loss)(w, x)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), in_shardings=(stored, rows), out_shardings=stored)
        compiled = step.lower(w, x).compile()
        got = compiled(jax.device_put(w, stored), jax.device_put(x, rows))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    gathers = [c for c in collectives(compiled.as_text()) if c.kind == "all-gather"]
    assert len(gathers) == len(order), "one for each axis"


def test_without_a_mesh_a_weight_is_whole():
    w = jnp.ones((4, 4))
    assert whole(w, AXES) is w
