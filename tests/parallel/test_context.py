"""Sequences split over the context axis: outputs and gradients equal those of one device, for every op and exchange."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from lcjax.models.documents import DocumentBlocks
from lcjax.models.groups import ShiftedGroups
from lcjax.parallel import ops
from lcjax.parallel.layout import attention_exchange
from lcjax.parallel.mesh import make_mesh
from pallas_kernels.masks import Causal, Intervals, Recent, Sink, Stride, Window, per_head

LENGTH = 64
# Documents of odd lengths, one of them over several shards, and padding behind the last.
SEGMENTS = np.repeat([[1, 2, 3, 4, 0]], [5, 30, 9, 13, 7], axis=1).astype(np.int32)
TWO_ROWS = np.concatenate([SEGMENTS, np.repeat([[1, 2]], [63, 1], axis=1).astype(np.int32)])

EXPIRY = np.asarray([2**31 - 1, 9, 40, 64, 33, 0, 50, 0], np.int32)
SECOND = np.asarray([[0, 0], [20, 41], [50, 60], [0, 0], [48, 64], [0, 0], [0, 0], [60, 64]], np.int32)
MASKS = {
    "window": Causal() & Window(7),
    "sink and window": Causal() & (Sink(5) | Window(11)),
    "long window": Causal() & (Sink(3) | Window(39)),
    "sink and strided blocks": Causal() & (Sink(4) | Recent(4, 3) | Stride(block=4, every=3, offset=1)),
    "expiring blocks": Causal() & (Window(6) | Intervals(8, EXPIRY, SECOND)),
    "per head": per_head(
        [Causal() & (Sink(2) | Window(5)), Causal() & (Window(12) | Stride(block=4, every=4))], (0, 1, 1, 0)
    ),
    "documents": DocumentBlocks(8, 6).mask(4, 2),
    "shifted groups": ShiftedGroups(12, LENGTH, (False, True)).mask(4, 2),  # they begin within shards
}


def rows(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_equal_gradients(function, oracle, arguments, mesh):
    """Value and gradients of `function` on the mesh against `oracle` on one device, through random cotangents."""

    def graded(f):
        def scalar(*args):
            out = f(*args)
            weights = [rows(90 + n, *x.shape) for n, x in enumerate(jax.tree.leaves(out))]
            return sum(jnp.vdot(w, x) for w, x in zip(weights, jax.tree.leaves(out), strict=True)), out

        return jax.jit(jax.grad(scalar, argnums=tuple(range(len(arguments))), has_aux=True))

    expected = graded(oracle)(*arguments)
    with jax.set_mesh(mesh):
        got = graded(function)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), got, expected)


def visible_lse(function, segments):
    """(o, lse) with the lse of rows that see nothing, and of padding, at 0."""

    def run(*args):
        o, lse = function(*args)
        real = jnp.isfinite(lse) if segments is None else jnp.isfinite(lse) & (segments > 0)[:, None]
        return o, jnp.where(real, lse, 0)

    return run


def attention_case(mask, mesh, segments, heads=4, kv_heads=2, exchange="auto", length=LENGTH):
    q, k, v = rows(0, 2, length, heads, 8), rows(1, 2, length, kv_heads, 8), rows(2, 2, length, kv_heads, 8)
    ids = None if segments is None else jnp.asarray(segments)
    options = {"segment_ids": ids, "return_lse": True, "soft_cap": 20.0}
    with attention_exchange(exchange):
        assert_equal_gradients(
            visible_lse(lambda q, k, v: ops.attention(q, k, v, mask, **options), ids),
            visible_lse(lambda q, k, v: pk.block_sparse_attention(q, k, v, mask, **options), ids),
            (q, k, v),
            mesh,
        )


def context(degree, **others):
    count = degree * int(np.prod(list(others.values()) or [1]))
    return make_mesh(**({"fsdp": 1, "context": degree} | others), devices=jax.devices()[:count])


@pytest.mark.parametrize(
    ("exchange", "degree", "packed"),
    [("ring", 4, True), ("gather", 4, True), ("heads", 4, True)]
    + [
        pytest.param(exchange, degree, packed, marks=pytest.mark.slow)
        for exchange in ("ring", "gather", "heads")
        for degree in (1, 2, 4, 8)
        for packed in (False, True)
        if (exchange, degree, packed) != ("heads", 8, True)
    ],
)
def test_full_attention(exchange, degree, packed):
    heads = 8 if exchange == "heads" else 4
    attention_case(Causal(), context(degree), TWO_ROWS if packed else None, heads=heads, exchange=exchange)


@pytest.mark.parametrize(
    ("name", "degree", "packed"),
    [("sink and window", 4, True), ("sink and strided blocks", 8, False), ("expiring blocks", 4, True)]
    + [
        pytest.param(name, degree, packed, marks=pytest.mark.slow)
        for name in MASKS
        for degree in (1, 2, 4, 8)
        for packed in (False, True)
    ],
)
def test_bounded_attention(name, degree, packed):
    attention_case(MASKS[name], context(degree), TWO_ROWS if packed else None)


@pytest.mark.parametrize(
    ("degree", "packed"),
    [(4, True), *(pytest.param(d, p, marks=pytest.mark.slow) for d in (1, 2, 4, 8) for p in (False, True))],
)
def test_dual_chunk_attention(degree, packed):
    """Chunks of 12 tokens end inside shards."""
    *queries, k, v = (rows(n, 2, LENGTH, heads, 8) for n, heads in enumerate((4, 4, 4, 2, 2)))
    ids = jnp.asarray(TWO_ROWS) if packed else None
    run = lambda op: lambda a, b, c, k, v: op((a, b, c), k, v, chunk=12, segment_ids=ids)
    assert_equal_gradients(
        run(ops.dual_chunk_attention), run(pk.dual_chunk_attention), (*queries, k, v), context(degree)
    )


def linear_case(mesh, packed, decay, normalise=False):
    q, k, v = (jnp.abs(rows(n, 2, LENGTH, 2, 8)) for n in range(3))
    shape = {"none": None, "scalar": (2, LENGTH, 2), "vector": (2, LENGTH, 2, 8)}[decay]
    gates = () if shape is None else (-jnp.abs(rows(4, *shape)),)
    ids = jnp.asarray(TWO_ROWS) if packed else None
    run = lambda op: lambda *x: op(*x, segment_ids=ids, normalise=normalise)
    assert_equal_gradients(run(ops.gated_linear), run(pk.gated_linear_attention), (q, k, v, *gates), mesh)


@pytest.mark.parametrize(
    ("degree", "packed", "decay", "normalise"),
    [(4, True, "vector", False), (2, False, "scalar", True)]
    + [
        pytest.param(degree, packed, decay, normalise, marks=pytest.mark.slow)
        for degree in (1, 2, 4, 8)
        for packed in (False, True)
        for decay, normalise in (("none", True), ("scalar", False), ("vector", False))
    ],
)
def test_linear_attention(degree, packed, decay, normalise):
    linear_case(context(degree), packed, decay, normalise)


@pytest.mark.parametrize(
    ("degree", "packed"),
    [(8, True), *(pytest.param(d, p, marks=pytest.mark.slow) for d in (1, 2, 4, 8) for p in (False, True))],
)
def test_convolution(degree, packed):
    x, taps = rows(0, 2, LENGTH, 2, 4), rows(1, 4, 2, 4)
    ids = jnp.asarray(TWO_ROWS) if packed else None

    def oracle(x, taps):
        flat = lambda a: a.reshape(*a.shape[:2], -1)
        return pk.causal_conv1d(flat(x), taps.reshape(4, -1), segment_ids=ids)[0].reshape(x.shape)

    assert_equal_gradients(lambda x, w: ops.causal_conv(x, w, segment_ids=ids), oracle, (x, taps), context(degree))


def test_convolution_behind_a_tail():
    """Rows that go on, split by requests and heads only."""
    x, taps, tail = rows(0, 2, 7, 2, 4), rows(1, 4, 2, 4), rows(2, 2, 3, 8)

    def oracle(x, taps, tail):
        return pk.causal_conv1d(x.reshape(2, 7, 8), taps.reshape(4, 8), tail=tail)[0].reshape(x.shape)

    mesh = make_mesh(data=2, fsdp=1, context=2, tensor=2)
    assert_equal_gradients(lambda x, w, tail: ops.causal_conv(x, w, tail=tail), oracle, (x, taps, tail), mesh)


def test_sink_logits_and_all_axes_at_once():
    mesh = make_mesh(data=2, fsdp=1, context=2, tensor=2)
    q, k, v, logits = rows(0, 2, LENGTH, 4, 8), rows(1, 2, LENGTH, 2, 8), rows(2, 2, LENGTH, 2, 8), rows(3, 4)
    run = lambda op: lambda q, k, v, s: op(q, k, v, Causal(), sink_logits=s, segment_ids=jnp.asarray(TWO_ROWS))
    assert_equal_gradients(run(ops.attention), run(pk.block_sparse_attention), (q, k, v, logits), mesh)


def test_traced_mask_numbers():
    q, k, v = rows(0, 2, LENGTH, 4, 8), rows(1, 2, LENGTH, 2, 8), rows(2, 2, LENGTH, 2, 8)
    run = lambda op: lambda q, k, v: op(q, k, v, Causal() & Window(jnp.int32(9)))
    assert_equal_gradients(run(ops.attention), run(pk.block_sparse_attention), (q, k, v), context(4))


@pytest.mark.parametrize(
    ("mesh", "shape", "message"),
    [
        ({"context": 4}, (2, 30, 4), "30 tokens does not split over the mesh axis context=4: pad it to 32"),
        ({"context": 4}, (2, 20, 4), "a shard of 5 tokens has no half"),
        ({"tensor": 4}, (2, 32, 4), "2 heads do not split over the mesh axis tensor=4"),
    ],
)
def test_what_does_not_split_is_named(mesh, shape, message):
    q, k = rows(0, *shape, 8), rows(1, *shape[:2], 2, 8)
    with (
        jax.set_mesh(make_mesh(**({"fsdp": 1} | mesh), devices=jax.devices()[:4])),
        pytest.raises(ValueError, match=message),
    ):
        ops.attention(q, k, k, Causal())


def test_heads_that_cannot_be_dealt_out():
    q, k = rows(0, 2, 32, 6, 8), rows(1, 2, 32, 3, 8)
    with (
        jax.set_mesh(context(4)),
        attention_exchange("heads"),
        pytest.raises(ValueError, match="6 query and 3 KV heads of a chip do not split over context=4"),
    ):
        ops.attention(q, k, k, Causal())


def test_one_device_calls_the_op_itself():
    q, k = rows(0, 2, 16, 4, 8), rows(1, 2, 16, 2, 8)
    plain = str(jax.make_jaxpr(functools.partial(ops.attention, mask=Causal()))(q, k, k))
    assert "shard_map" not in plain
