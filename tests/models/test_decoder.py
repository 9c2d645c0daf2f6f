"""The decoder: stacking, rematerialisation, packing, caches, dtypes, parameters, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.layers.linear import contract, each, wide_product
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.flops import flops_per_token, param_count, visible_keys
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.stack import runs
from pallas_kernels.op import target_platform

FULL, STREAM = Attention(), Attention(window=7, sink=2)
LINEAR = GatedLinear(conv_width=4, feature_map="elu", normalise=True)
SCALAR = GatedLinear(decay="scalar", num_heads=2, key_dim=6, value_dim=10)
PLAIN = GatedLinear(decay="none", feature_map="softmax", output_gate=False, conv_width=2)
SIZES = {
    "vocab_size": 61,
    "width": 32,
    "mlp_width": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dtype": "float32",
}
HYBRID = ModelSpec(**SIZES, num_layers=4, pattern=(Attention(window=7), LINEAR))


def build(spec, seed=0):
    return nnx.split(Decoder(spec, rngs=nnx.Rngs(seed)), nnx.Param)


def tokens(batch=2, length=20):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 61)


@pytest.fixture(scope="module")
def hybrid():
    graphdef, params = build(HYBRID)
    return (
        graphdef,
        params,
        jax.jit(lambda p, t, **kw: nnx.merge(graphdef, p)(t, **kw), static_argnames=("scan", "remat")),
    )


def test_scan_and_remat_change_nothing(hybrid):
    graphdef, params, forward = hybrid

    def gradient(**options):
        loss = lambda p: jnp.sum(nnx.merge(graphdef, p)(tokens(), **options) ** 2)
        return jax.jit(jax.grad(loss))(params)

    plain = forward(params, tokens())
    assert plain.shape == (2, 20, 61)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(forward(params, tokens(), scan=True, remat="full"), plain, atol=1e-5)
    expected = gradient()
    got = gradient(scan=True, remat="dots")
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4, rtol=1e-3), got, expected)


def test_runs():
    assert runs(list("abcabcabc")) == [(0, 3, 3)]
    assert runs(list("ssfffffss")) == [(0, 1, 2), (2, 1, 5), (7, 1, 2)]
    assert runs(list("lllllglllllgll")) == [(0, 6, 2), (12, 1, 2)]
    assert runs(list("ab")) == [(0, 1, 1), (1, 1, 1)]


def test_compute_dtype_and_parameter_dtype(hybrid):
    _, params, forward = hybrid
    bf16 = ModelSpec(**SIZES | {"dtype": "bfloat16"}, num_layers=4, pattern=HYBRID.pattern)
    graphdef, _ = abstract(bf16)
    model = nnx.merge(graphdef, params)
    hidden, _ = jax.jit(lambda p: nnx.merge(graphdef, p).hidden(tokens()))(params)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    np.testing.assert_allclose(model.logits(hidden), forward(params, tokens()), atol=0.1)
    _, half = abstract(HYBRID, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_abstract_has_the_same_tree(hybrid):
    graphdef, params, _ = hybrid
    shapes = abstract(HYBRID)
    assert shapes[0] == graphdef
    assert jax.tree.structure(shapes[1]) == jax.tree.structure(params)
    paths = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
    assert paths["layers.2.mixer.query.kernel"].shape == (32, 4, 8)
    assert all(len(variable.axes) == variable.get_value().ndim for variable in paths.values())


def test_parameter_and_flop_counts():
    spec = ModelSpec(**SIZES, num_layers=2, pattern=(FULL,), tie_embeddings=False, qk_norm=True)
    norms, table = 2 * (2 * 32 + 2 * 8) + 32, 61 * 32
    products = 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + table
    assert param_count(spec) == products + table + norms
    assert param_count(ModelSpec(**SIZES, num_layers=2, qk_norm=True)) == products + norms
    attention = 2 * 4 * 4 * 8 * (100 + 1) / 2
    assert flops_per_token(spec, 100, training=False) == 2 * products + attention
    assert flops_per_token(spec, 100, training=True) == 3 * (2 * products + attention)
    for mixer in (STREAM, Attention(window=5), Attention(window=300)):
        assert visible_keys(mixer, 2, 50) == pytest.approx(float(jnp.sum(mixer.mask(4, 2).to_array(50, 50))) / 50)


def test_linear_counts():
    """A linear layer's products are its kernels; mixing does not grow with the length."""
    for mixer in (LINEAR, SCALAR, PLAIN):
        spec = ModelSpec(**SIZES, num_layers=1, pattern=(mixer,))
        _, params = abstract(spec)
        kernels = sum(
            v.get_value().size for path, v in nnx.to_flat_state(params) if path[-1] == "kernel"
        ) + 61 * 32  # fmt: skip
        heads, keys, values = mixer.sizes(spec)
        state = 4 * heads * keys * values + 2 * mixer.conv_width * heads * (2 * keys + values)
        counts = {flops_per_token(spec, length, training=False) for length in (10, 10_000)}
        assert counts == {2 * kernels + state}


def test_bad_input(hybrid):
    graphdef, params, _ = hybrid
    model = nnx.merge(graphdef, params)
    with pytest.raises(ValueError, match="remat is 'some'"):
        model.hidden(tokens(), remat="some")
    with pytest.raises(ValueError, match="one per layer"):
        model.hidden(tokens(), caches=())
    with pytest.raises(ValueError, match="valid is for cached chunks"):
        model.hidden(tokens(), valid=jnp.ones((2, 20), bool))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "4 query heads don't divide into 3"),
        ({"width": 0}, "width must be positive, got 0"),
        ({"dtype": "float16"}, "'float16'"),
        ({"activation": "tanh"}, "'tanh'"),
        ({"num_layers": 1, "pattern": (FULL, STREAM)}, "2 mixers for 1 layers"),
        ({"head_dim": 7}, "even number"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelSpec(**SIZES | {"num_layers": 2} | fields)


def test_bad_mixers():
    with pytest.raises(ValueError, match="needs a window"):
        Attention(sink=4)
    with pytest.raises(ValueError, match="window must be positive"):
        Attention(window=0)
    with pytest.raises(ValueError, match="non-negative feature_map"):
        GatedLinear(normalise=True)
    with pytest.raises(ValueError, match="'cosine'"):
        GatedLinear(feature_map="cosine")
    with pytest.raises(ValueError, match="conv_width"):
        GatedLinear(conv_width=1)


@pytest.mark.parametrize("inputs", [(3,), (3, 4)], ids=len)
def test_one_row_on_a_gpu_is_a_product_of_two(inputs):
    """The compiler would write out elementwise products; the result is the same, and other rows are left alone."""
    one, two = (jax.random.normal(jax.random.key(0), (1, rows, *inputs)) for rows in (1, 2))
    product = lambda x: contract(x, jnp.ones((*inputs, 5, 2)), len(inputs))
    expected = product(one)
    with target_platform("gpu"):
        np.testing.assert_allclose(product(one), expected, rtol=1e-6)
        shapes = [str(jax.make_jaxpr(product)(x)) for x in (one, two)]
    assert f"f32[2,1,1,{','.join(map(str, inputs))}] = broadcast_in_dim" in shapes[0]
    assert "f32[2,1" not in shapes[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_wide_products_are_products_of_the_operands_dtype(dtype):
    shapes = (2, 5, 24), (24, 40), (2, 5, 40)
    x, w, do = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes))
    pull = lambda f, *xw: jax.vjp(f, *xw)[1](do)
    narrow = x.astype(dtype), w.astype(dtype)
    wanted = pull(lambda x, w: jnp.matmul(x, w, precision="highest"), *(a.astype(jnp.float32) for a in narrow))
    for got, want in zip(pull(wide_product, *narrow), wanted, strict=True):
        assert got.dtype == dtype
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=scale * (1e-2 if dtype == "bfloat16" else 1e-6))
    text = str(jax.make_jaxpr(lambda *xw: pull(wide_product, *xw))(*narrow))
    assert text.count("dot_general") == 3
    assert dtype == "float32" or text.count("preferred_element_type=float32") == 1


@pytest.mark.parametrize(("tokens", "platform", "barriers"), [(65, "gpu", 2), (64, "gpu", 0), (65, "tpu", 0)])
def test_projections_of_many_tokens_stay_apart_on_a_gpu(tokens, platform, barriers):
    with target_platform(platform):
        text = str(jax.make_jaxpr(lambda x: list(each(x, *3 * [jnp.sin])))(jnp.zeros((1, tokens, 8))))
    assert text.count("optimization_barrier") == barriers
