"""The linearised mixers: split anywhere they equal one pass, and each formula holds (for all mixers: tests/zoo)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.cache import RecurrentCache, init_caches
from lcjax.layers.adapter import Adapter
from lcjax.layers.attention import AttentionLayer
from lcjax.layers.forget import log_forget
from lcjax.layers.linear import Linear
from lcjax.layers.linearized import LinearizedLayer
from lcjax.layers.recurrence import Inputs, recur
from lcjax.layers.weight import Weight
from lcjax.models.decoder import Decoder
from lcjax.models.flops import flops_per_token
from lcjax.models.recurrent import DeltaNet, Linearized, Mamba2
from lcjax.models.spec import Adapters, Attention, ModelSpec
from lcjax.positions.rotary import apply_rope
from pallas_kernels import hedgehog

SIZES = {"vocab_size": 61, "width": 32, "mlp_width": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MIXERS = {
    "lawcat": Linearized(),
    "lawcat_window": Linearized(window=5, conv_value=True, tied=True),
    "unnormalised": Linearized(normalise=False, conv_width=0, features=3),
    "lolcats": Linearized.lolcats(window=5),
}


def spec_of(mixer):
    return ModelSpec(**SIZES, num_layers=1, pattern=(mixer,), dtype="float32", qk_norm=True)


@functools.cache
def model(name):
    spec = spec_of(MIXERS[name])
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    # Away from the initial values, where a convolution is nearly the identity and a gate does not see its input.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])
    forward = jax.jit(lambda params, *args, **kw: nnx.merge(graphdef, params)(*args, **kw))
    return spec, graphdef, params, forward


@pytest.mark.parametrize("name", MIXERS)
def test_split_anywhere_equals_one_pass(name):
    """Ragged chunks whose borders fall 1, 2 and 3 tokens apart, then single tokens; the state keeps its size."""
    spec, graphdef, params, forward = model(name)
    ids = jax.random.randint(jax.random.key(2), (2, 22), 0, 61)
    expected = forward(params, ids)

    @jax.jit
    def step(params, ids, caches, valid):
        decoder = nnx.merge(graphdef, params)
        hidden, caches = decoder.hidden(ids, caches=caches, valid=valid)
        return decoder.logits(hidden), caches

    caches = init_caches(spec, batch=2, capacity=32)
    assert isinstance(caches[0], RecurrentCache)
    size = caches[0].bytes
    done = np.zeros(2, int)
    for counts in ((7, 5), (1, 7), (7, 2), (3, 3), (1, 1), (0, 1), (1, 0)):
        width = 7 if max(counts) > 1 else 1
        valid = np.arange(width)[None] < np.array(counts)[:, None]
        chunk = np.zeros((2, width), np.int32)
        for row, count in enumerate(counts):
            chunk[row, :count] = ids[row, done[row] : done[row] + count]
        got, caches = step(params, jnp.asarray(chunk), caches, jnp.asarray(valid))
        for row, count in enumerate(counts):
            np.testing.assert_allclose(got[row, :count], expected[row, done[row] : done[row] + count], atol=1e-4)
        done += counts
    np.testing.assert_array_equal(caches[0].length, done)
    assert caches[0].bytes == size


def layer(mixer, seed=0, **sizes):
    spec = ModelSpec(**SIZES | sizes, num_layers=1, dtype="float32")
    kind = AttentionLayer if isinstance(mixer, Attention) else LinearizedLayer
    return kind(spec, mixer, rngs=nnx.Rngs(seed), param_dtype=jnp.float32)


def inputs(length=20, seed=4):
    x = jax.random.normal(jax.random.key(seed), (2, length, SIZES["width"]))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    decoder = Decoder(ModelSpec(**SIZES, num_layers=1, dtype="float32"), rngs=nnx.Rngs(0))
    return x, decoder.context(positions, 0, None, None)


def mixed(student, x, context):
    """The layer's outputs per head, compiled as one program."""
    return jax.jit(lambda x: student.mix(x, context)[0])(x)


def weights_of(student, x, context):
    """The attention matrix `[B,H,T,T]` that a layer stands for, read off with one-hot values."""
    length = x.shape[1]
    rows = []
    for start in range(0, length, SIZES["head_dim"]):
        picked = jnp.eye(length)[:, start : start + SIZES["head_dim"]]
        picked = jnp.pad(picked, ((0, 0), (0, SIZES["head_dim"] - picked.shape[1])))
        values = jnp.broadcast_to(picked[None, :, None], (2, length, SIZES["num_kv_heads"], SIZES["head_dim"]))
        student.value = lambda _, values=values: values
        rows.append(mixed(student, x, context))
    return jnp.moveaxis(jnp.concatenate(rows, axis=-1)[..., :length], 2, 1)


@pytest.mark.parametrize("mixer", [Linearized(), Linearized(window=5), Linearized.lolcats(window=5)])
def test_rows_are_causal_averages(mixer):
    x, context = inputs()
    weights = weights_of(layer(mixer), x, context)
    assert float(weights.min()) >= 0
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(jnp.triu(weights, 1), 0)


def test_lawcat_is_its_formula():
    """Taps (0,0,0,1) and no decay leave the pure Hedgehog average; then the full layer against a plain loop."""
    x, context = inputs()
    student = layer(Linearized())
    q, k, v = (jnp.repeat(y, 4 // y.shape[2], axis=2) for y in student.project(x))
    convolved = []
    for name, u in (("q", q), ("k", k)):
        taps = student.convs[name].taps[...] + 0.2
        student.convs[name].taps[...] = taps
        padded = jnp.pad(u, ((0, 0), (3, 0), (0, 0), (0, 0)))
        convolved.append(sum(taps[i] * padded[:, i : i + 20] for i in range(4)))
    maps = student.key_map[...] + 0.1 * jax.random.normal(jax.random.key(0), student.key_map.shape)
    student.key_map[...] = maps
    phi_q, phi_k = hedgehog(convolved[0], student.query_map[...]), hedgehog(convolved[1], maps)
    gate = student.decay_up(student.decay_down(x))
    decay = jnp.repeat(jax.nn.log_sigmoid(gate) / 16, 2, axis=2)
    s, z, rows = jnp.zeros((2, 4, 8, 8)), jnp.zeros((2, 4, 8)), []
    for t in range(20):
        s = jnp.exp(decay[:, t])[..., None] * s + phi_k[:, t, :, :, None] * v[:, t, :, None]
        z = jnp.exp(decay[:, t]) * z + phi_k[:, t]
        rows.append(jnp.einsum("bhf,bhfd->bhd", phi_q[:, t], s) / (phi_q[:, t] * z).sum(-1)[..., None])
    np.testing.assert_allclose(mixed(student, x, context), jnp.stack(rows, axis=1), atol=2e-5)


def test_lolcats_with_a_window_over_everything_is_softmax():
    x, context = inputs()
    expected = mixed(layer(Attention()), x, context)
    got = mixed(layer(Linearized.lolcats(window=20)), x, context)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    short = mixed(layer(Linearized.lolcats(window=7)), x, context)
    np.testing.assert_allclose(short[:, :7], expected[:, :7], atol=1e-5)
    assert float(jnp.abs(short - expected).max()) > 1e-2


def test_lolcats_is_its_formula():
    """Window softmax (true row maximum off) plus what has left the window, over their common sum."""
    x, context = inputs()
    student = layer(Linearized.lolcats(window=5))
    q, k, v = student.project(x)
    table = context.tables[Attention().rope, None].queries[0]
    q, k, v = (jnp.repeat(y, 4 // y.shape[2], axis=2) for y in (apply_rope(q, table), apply_rope(k, table), v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
    age = jnp.arange(20)[:, None] - jnp.arange(20)
    scores = jnp.where((age >= 0) & (age < 5), scores, -jnp.inf)
    near = jax.nn.sigmoid(-2.1972) * jnp.exp(scores - scores.max(-1, keepdims=True))
    far = jnp.einsum("bthf,bshf->bhts", hedgehog(q, student.query_map[...]), hedgehog(k, student.key_map[...]))
    weights = near + jnp.where(age >= 5, far, 0)
    expected = jnp.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(mixed(student, x, context), expected, atol=2e-5)


def test_stretched_tokens_count_as_often_as_they_are_long():
    """Weights n_s phi(q_t) (phi(k_s) * exp(n-weighted decays from s to t)), over their sum; all n are 1 in decoding."""
    student = layer(Linearized(stretched=True, conv_width=0, horizons=(4.0, 64.0)))
    x, plain = inputs(6)
    steps = jnp.array([1, 1, 1, 3, 1, 2], jnp.float32)
    stretched = plain._replace(positions=jnp.broadcast_to(jnp.cumsum(steps) - 1, (2, 6)))
    q, k, _ = student.project(x)
    phi_q = hedgehog(q, student.query_map[...])
    phi_k = hedgehog(jnp.repeat(k, 2, axis=2), student.key_map[...]) * steps[:, None, None]
    decay = jnp.cumsum(jnp.repeat(student._log_decay(x), 2, axis=2) * steps[:, None, None], axis=1)
    tokens = -1 / student._log_decay(jnp.zeros_like(x))[0, 0, 0]
    np.testing.assert_allclose(tokens[jnp.array([0, 3, 4, 7])], [4, 64, 4, 64], rtol=1e-3)
    far = jnp.minimum(decay[:, :, None] - decay[:, None], 0)  # [B,T,S,H,f]
    weights = jnp.tril(jnp.einsum("bthf,bshf,btshf->bhts", phi_q, phi_k, jnp.exp(far)))
    expected = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights_of(student, x, stretched), expected, atol=1e-5)
    assert float(jnp.abs(weights_of(student, x, plain) - expected).max()) > 0.05


def test_delta_rule_overwrites():
    """Unit keys and full strength: reading a key gives what was last written there."""
    key = jnp.zeros((1, 3, 1, 4)).at[:, :, :, 0].set(1.0)
    values = jnp.arange(6.0).reshape(1, 3, 1, 2)
    o, _ = recur(Inputs(key, key, values, None, jnp.ones((1, 3, 1))), inputs(3)[1], None, scale=1.0)
    np.testing.assert_allclose(o, values, atol=1e-6)


@pytest.mark.parametrize("mixer", [Linearized(), DeltaNet(), Mamba2(num_heads=2)], ids=str)
def test_work_a_token_does_not_grow_with_the_length(mixer):
    spec = spec_of(mixer)
    assert flops_per_token(spec, 100, training=False) == flops_per_token(spec, 10_000, training=False)
    near = spec_of(Linearized.lolcats(window=5))
    assert flops_per_token(near, 10_000, training=False) < 1.01 * flops_per_token(near, 100, training=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linearized(conv_width=9), "conv_width must be 0 .none. or 2 to 8, got 9"),
        (lambda: Linearized(decay="scalar"), "decay is 'scalar'"),
        (lambda: Linearized(window=4, normalise=False), "needs normalise=True"),
        (lambda: Linearized(horizons=(64.0, 4.0)), "give two numbers of tokens, the smaller first"),
        (lambda: Linearized(horizons=(4.0, 64.0), decay="none"), "horizons is for decays"),
        (lambda: Linearized(stretched=True, window=4), "stretched with a window"),
        (lambda: Linearized(overlap=False), "overlap=False delays the keys"),
        (lambda: Linearized(Attention(sink_logits=True)), "sink_logits"),
        (lambda: Linearized(Attention(soft_cap=5.0), window=4), "soft-capped"),
        (lambda: DeltaNet(conv_width=0), "conv_width must be 2 to 8, got 0"),
        (lambda: Mamba2(num_heads=3, groups=2).memory(spec_of(Attention())), "3 heads of 64 don't divide"),
    ],
)
def test_bad_records(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("adapted", [False, True])
def test_the_forget_gate_is_log_sigmoid_down_to_its_bound(adapted):
    """Also with an adapter; its gradient is log_sigmoid's, beyond the bound too."""
    options = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float32}
    up = Linear(Weight((3, 2, 4), ("rank", "heads", "head_dim"), std=1.0), bias=True, **options)
    if adapted:
        up.adapter = Adapter(Adapters(rank=2, alpha=4.0, targets=("up",), dora=True), up, **options)
        up.adapter.up[...] = jax.random.normal(jax.random.key(1), up.adapter.up.shape)
    up.bias[...] = jnp.asarray([[-300.0, -60.0, 0.0, 9.0], [300.0, -2.0, 2.0, -9.0]])
    x = jax.random.normal(jax.random.key(0), (1, 5, 3))
    graphdef, params = nnx.split(up, nnx.Param)

    def both(gate):
        y, pull = jax.vjp(lambda x, params: gate(x, nnx.merge(graphdef, params)), x, params)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    found, gradients = both(log_forget)
    expected, wanted = both(lambda x, up: jax.nn.log_sigmoid(up(x)) / 16)
    np.testing.assert_allclose(found, jnp.maximum(expected, -5), rtol=1e-5, atol=1e-12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradients, wanted)
