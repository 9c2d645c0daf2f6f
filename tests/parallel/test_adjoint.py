"""What the gradient modes of recurrent layers compute, refuse, say, and cost in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.models.decoder import Decoder
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import ModelSpec
from lcjax.parallel import ops
from lcjax.parallel.adjoint import Adjoint, through_recurrences
from pallas_kernels import gated_linear_attention, gated_linear_attention_truncated

LENGTH = 32


def gradients(mode: Adjoint) -> nnx.State:
    """Gradients of a small stack of three recurrent layers, traced under a mode."""
    spec = ModelSpec(
        name="tiny", vocab_size=17, width=8, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4, mlp_width=8,
        pattern=(GatedLinear(),), dtype="float32",
    )  # fmt: skip
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, 17)

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(tokens)).mean()

    with through_recurrences(mode):
        return jax.jit(jax.grad(loss))(params)


def mixer(grads: nnx.State, layer: int) -> np.ndarray:
    leaves = [x for path, x in nnx.to_flat_state(grads) if path[:3] == ("layers", layer, "mixer")]
    return np.concatenate([np.ravel(x[...]) for x in leaves])


def test_layer_local_is_true_for_the_last_layer_alone():
    exact, local = gradients(Adjoint()), gradients(Adjoint("layer_local"))
    np.testing.assert_allclose(mixer(local, 2), mixer(exact, 2), rtol=1e-4, atol=1e-8)
    assert np.abs(mixer(local, 0) - mixer(exact, 0)).max() > 1e-2 * np.abs(mixer(exact, 0)).max()


def draw(decay):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, cotangent = (jax.random.normal(key, (1, LENGTH * 4, 2, 4)) for key in keys[:4])
    return (q, k, v, jnp.full(q.shape, decay)), cotangent


def test_truncation_reaches_the_op_and_its_bias_falls_with_the_window():
    inputs, cotangent = draw(-0.2)

    def grads(f):
        return jax.jit(lambda: jax.vjp(lambda *x: f(*x)[0], *inputs)[1](cotangent))()

    exact = grads(ops.gated_linear)
    cosines = []
    for window in (8, 16, 32):
        with through_recurrences(Adjoint("truncated", window)):
            found = grads(ops.gated_linear)
        expected = grads(lambda *x, w=window: gated_linear_attention_truncated(*x, window=w))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        a, b = np.ravel(found[1]), np.ravel(exact[1])
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.999 < cosines[2]


def test_the_exact_adjoint_keeps_less_than_a_scan_over_tokens():
    keys, values = (jax.ShapeDtypeStruct((1, 1024, 1, width), jnp.float32) for width in (32, 256))

    def temporaries(implementation):
        def loss(q, k, v, g):
            return gated_linear_attention(q, k, v, g, implementation=implementation)[0].sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(keys, keys, values, keys).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 3 * temporaries("xla") < temporaries("reference")


def test_says_what_is_not_the_true_gradient():
    assert Adjoint().warning is None
    assert "not the true gradient" in str(Adjoint("truncated", 64).warning)
    assert "64 to 128 tokens" in str(Adjoint("truncated", 64).warning)
    assert "not the true gradient" in str(Adjoint("layer_local").warning)


def test_refuses_modes_that_make_no_sense():
    with pytest.raises(ValueError, match="'truncated' with window=None: this mode needs a window"):
        Adjoint("truncated")
    with pytest.raises(ValueError, match="'exact' with window=8: this mode takes no window"):
        Adjoint(window=8)
    with pytest.raises(ValueError, match="adjoint window is 0"):
        Adjoint("truncated", 0)
