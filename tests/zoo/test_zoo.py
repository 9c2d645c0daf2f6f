"""What every mixer, position law and family must satisfy; the rows are in `rows.py`."""

import dataclasses
import functools
from collections.abc import Container

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.cache import init_caches
from lcjax.checkpoint.manager import CheckpointManager
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.spec import ModelSpec
from tests.zoo.rows import LENGTH, ROWS, SIZES, SWEPT

TOKENS = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, SIZES["vocab_size"])


def rows(swept: Container[str]) -> pytest.MarkDecorator:
    """Every row, those in `swept` as slow tests."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in swept)) for n in ROWS])


every_row = rows(SWEPT)
every_kind = rows({*SWEPT, *(name for name, row in ROWS.items() if row.turns_otherwise)})


@functools.cache
def parameters(spec: ModelSpec) -> tuple[nnx.GraphDef, nnx.State]:
    """All parameters drawn, norms and biases too, so that none can be forgotten unseen."""
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return graphdef, jax.tree.unflatten(tree, drawn)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens, **options):
    return nnx.merge(graphdef, params)(tokens, **options)


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, params, tokens, caches, valid):
    decoder = nnx.merge(graphdef, params)
    lengths = jnp.full(len(tokens), LENGTH, jnp.int32)  # laws that follow the length see the whole, as one pass does
    hidden, caches = decoder.hidden(tokens, caches=caches, valid=valid, lengths=lengths)
    return decoder.logits(hidden), caches


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.identity is not None])
def test_the_identity_setting_is_the_dense_model(name):
    row = ROWS[name]
    _, params = parameters(row.dense)
    got, want = (forward(abstract(spec)[0], params, TOKENS) for spec in (row.identity, row.dense))
    np.testing.assert_allclose(got, want, atol=2e-6)


@every_row
def test_chunks_and_single_tokens_equal_one_pass(name):
    """A ragged batch prefilled in chunks, then token by token; the program of a single token is compiled once."""
    row = ROWS[name]
    graphdef, params = parameters(row.spec)
    sizes = ((8, 6), (8, 8), (8, 3), (1, 1), (1, 1), (0, 1))
    want = np.asarray(forward(graphdef, params, TOKENS))
    caches = init_caches(row.spec, batch=2, capacity=64)
    done, compiled = np.zeros(2, int), step._cache_size()
    for counts in sizes:
        width = max(counts)
        valid = np.arange(width)[None] < np.array(counts)[:, None]
        chunk = np.zeros((2, width), np.int32)
        for b, count in enumerate(counts):
            chunk[b, :count] = TOKENS[b, done[b] : done[b] + count]
        got, caches = step(graphdef, params, jnp.asarray(chunk), caches, jnp.asarray(valid))
        for b, count in enumerate(counts):
            np.testing.assert_allclose(got[b, :count], want[b, done[b] : done[b] + count], atol=5e-5)
        done += counts
    np.testing.assert_array_equal(caches[0].length, (LENGTH, 20))
    assert np.isfinite(got).all()
    assert step._cache_size() - compiled == 3  # the empty first chunk, later chunks, single tokens


@every_row
def test_packed_equals_separate(name):
    row = ROWS[name]
    if row.counts_in_rows:
        pytest.skip("strided blocks are those of the row")
    graphdef, params = parameters(row.spec)
    cut = LENGTH // 2
    column = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), TOKENS.shape)
    segments = jnp.where(column < cut, 1, 2)
    positions = jnp.where(column < cut, column, column - cut)
    got = forward(graphdef, params, TOKENS, segment_ids=segments, positions=positions)
    if row.follows_length:  # both documents are scaled by the longer one
        other = jnp.where(column < cut, TOKENS, 0)
        again = forward(graphdef, params, other, segment_ids=segments, positions=positions)
        np.testing.assert_allclose(again[:, :cut], got[:, :cut], atol=5e-5)
        return
    want = forward(graphdef, params, TOKENS.reshape(4, cut)).reshape(got.shape)
    np.testing.assert_allclose(got, want, atol=5e-5)


@every_kind
def test_every_parameter_learns_in_bfloat16(name):
    """Compute in bfloat16 keeps float32 gradients, none of them zero throughout, for every parameter."""
    spec = dataclasses.replace(ROWS[name].spec, dtype="bfloat16")
    graphdef, params = abstract(spec)[0], parameters(ROWS[name].spec)[1]

    @jax.jit
    def gradients(params):
        def loss(params):
            hidden, _ = nnx.merge(graphdef, params).hidden(TOKENS)
            logits = nnx.merge(graphdef, params).logits(hidden)
            return -jax.nn.log_softmax(logits)[..., 3].mean(), (hidden, logits)

        return jax.grad(loss, has_aux=True)(params)

    found, (hidden, logits) = gradients(params)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    for path, leaf in jax.tree.leaves_with_path(found):
        assert leaf.dtype == jnp.float32, path
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@every_kind
def test_saved_and_restored(name, tmp_path):
    graphdef, params = parameters(ROWS[name].spec)
    manager = CheckpointManager(tmp_path)
    manager.save(1, params, {}, {"config": name})
    manager.wait()
    restored = manager.restore(abstract(ROWS[name].spec)[1], {"config": name})
    manager.close()
    assert restored is not None
    np.testing.assert_array_equal(forward(graphdef, restored.state, TOKENS), forward(graphdef, params, TOKENS))
