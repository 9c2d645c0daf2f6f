"""Dual chunk attention against the explicit matrix of relative positions, at every chunk border, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcjax.positions import DualChunk, Rope, apply_rope, rope_table
from pallas_kernels import BlockList, block_sparse_attention, chunk_masks, dual_chunk_attention
from pallas_kernels.dual_chunk import reference
from pallas_kernels.masks import Causal

LAW, REMAP = Rope(base=1e4), DualChunk(size=48, local=8)
CHUNK, D, H, K = 40, 16, 4, 2
LENGTH = 3 * CHUNK + 17


def inputs(length=LENGTH, batch=1, heads=(H, K, K)):
    keys = jax.random.split(jax.random.key(1), 3)
    return tuple(jax.random.normal(k, (batch, length, h, D)) for k, h in zip(keys, heads, strict=True))


def rotated(q, k):
    """Three queries and one key, as the model makes them."""
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    rotate = lambda x, p: apply_rope(x, rope_table(LAW, D, p))
    return tuple(rotate(q, p) for p in REMAP.queries(positions)), rotate(k, REMAP.keys(positions)[0])


def by_distance(q, k, v):
    """o [T,H,D] of one row from the matrix of distances, each pair rotated by its own angle; float64."""
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, H // K, axis=1) for x in (k, v))
    i, j = np.arange(len(q))[:, None], np.arange(len(q))[None]
    back = i // CHUNK - j // CHUNK
    own, near, far = i % CHUNK, np.minimum(i % CHUNK + CHUNK, REMAP.size), REMAP.size
    distance = np.where(back == 0, own, np.where(back == 1, near, far)) - j % CHUNK
    seen = j <= i
    assert distance[seen].min() == 0
    assert distance[seen].max() == REMAP.size
    assert distance[seen & (back > 1)].min() == REMAP.local + 1
    exact = seen & (i - j <= REMAP.local + 1)
    np.testing.assert_array_equal(distance[exact], (i - j)[exact])
    angle = distance[..., None] * (1e4 ** (-np.arange(0, D, 2) / D))
    cos, sin, n = np.cos(angle), np.sin(angle), D // 2
    q1, q2, k1, k2 = (x.transpose(1, 0, 2) for x in (q[..., :n], q[..., n:], k[..., :n], k[..., n:]))
    same = np.einsum("hin,hjn,ijn->hij", q1, k1, cos) + np.einsum("hin,hjn,ijn->hij", q2, k2, cos)
    score = same + np.einsum("hin,hjn,ijn->hij", q1, k2, sin) - np.einsum("hin,hjn,ijn->hij", q2, k1, sin)
    weight = np.where(seen, np.exp((score - score.max()) * D**-0.5), 0)
    return np.einsum("hij,jhd->ihd", weight / weight.sum(-1, keepdims=True), v.reshape(len(v), H, D))


def test_equals_the_matrix_of_distances():
    q, k, v = inputs()
    queries, key = rotated(q, k)
    want = by_distance(q, k, v)
    np.testing.assert_allclose(reference.attend(queries, key, v, CHUNK)[0][0], want, atol=1e-5)
    np.testing.assert_allclose(dual_chunk_attention(queries, key, v, chunk=CHUNK)[0], want, atol=1e-5)


def test_forward_gradients_and_lse_equal_the_reference():
    q, k, v = inputs(batch=2)
    queries, key = rotated(q, k)
    do, dlse = jax.random.normal(jax.random.key(2), q.shape), jax.random.normal(jax.random.key(3), (2, H, LENGTH))

    def loss(attend):
        def run(queries, key, v):
            o, lse = attend(queries, key, v)
            return (o * do).sum() + (lse * dlse).sum(), (o, lse)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(queries, key, v)

    got = loss(lambda *x: dual_chunk_attention(*x, chunk=CHUNK, return_lse=True))
    want = loss(lambda *x: reference.attend(*x, CHUNK))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=2e-5)


def test_masks_are_disjoint_and_together_causal():
    parts = [np.asarray(mask.to_array(130, 130)).astype(int) for mask in chunk_masks(CHUNK, 130)]
    np.testing.assert_array_equal(sum(parts), np.tril(np.ones((130, 130), int)))
    tile = np.arange(16) * 64
    visited = 0
    for mask in chunk_masks(256, 1024):
        columns = mask.plan(1, 1024, 1024, 64, 64).columns(1024, 64)
        rows, (start, stop) = tile[:, None], (0, 0) if columns.second is None else columns.second[0].T
        visited += ((rows >= tile) & ((rows < columns.end[0]) | ((rows >= start) & (rows < stop)))).sum()
    assert visited == 16 * 17 // 2  # the tiles of plain causal attention, each once


def test_decoded_rows_equal_prefill():
    q, k, v = inputs()
    queries, key = rotated(q, k)
    want = dual_chunk_attention(queries, key, v, chunk=CHUNK)

    @jax.jit
    def step(one, at):
        return dual_chunk_attention(one, key, v, chunk=CHUNK, q_offset=at, kv_length=at + 1)

    for row in (CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK + 7):
        one = tuple(x[:, row : row + 1] for x in queries)
        np.testing.assert_allclose(step(one, jnp.array([row]))[:, 0], want[:, row], atol=1e-5)


def test_chunked_prefill_with_ragged_offsets():
    q, k, v = inputs(batch=2)
    queries, key = rotated(q, k)
    want = dual_chunk_attention(queries, key, v, chunk=CHUNK)
    starts = jnp.array([CHUNK - 5, 2 * CHUNK + 3])
    part = tuple(jnp.stack([x[b, s : s + 30] for b, s in enumerate(starts.tolist())]) for x in queries)
    got = jax.jit(lambda s: dual_chunk_attention(part, key, v, chunk=CHUNK, q_offset=s, kv_length=s + 30))(starts)
    for b, s in enumerate(starts.tolist()):
        np.testing.assert_allclose(got[b], want[b, s : s + 30], atol=1e-5)


def test_a_chunk_that_holds_everything_is_plain_attention():
    q, k, v = inputs(length=37)
    plain = block_sparse_attention(q, k, v, Causal())
    np.testing.assert_array_equal(dual_chunk_attention((q, q, q), k, v, chunk=37), plain)
    np.testing.assert_array_equal(dual_chunk_attention((q, q, q), k, v, chunk=64), plain)


def test_segments_sinks_and_lists():
    q, k, v = inputs(length=128)
    queries, key = rotated(q, k)
    ids = jnp.asarray(np.repeat([1, 2, 3], [50, 61, 17]))[None]
    got = dual_chunk_attention(queries, key, v, chunk=32, segment_ids=ids)
    want, _ = reference.attend(queries, key, v, 32, allowed=(ids[:, None, :, None] == ids[:, None, None]))
    np.testing.assert_allclose(got, want, atol=1e-5)

    logits = jnp.array([0.3, -1.0, 2.0, 0.0])
    o, lse = dual_chunk_attention(queries, key, v, chunk=32, return_lse=True)
    with_sinks = dual_chunk_attention(queries, key, v, chunk=32, sink_logits=logits)
    share = jnp.exp(lse - jnp.logaddexp(lse, logits[None, :, None]))
    np.testing.assert_allclose(with_sinks, o * share.swapaxes(1, 2)[..., None], atol=1e-5)

    rng = np.random.default_rng(0)
    chosen = np.tril(rng.random((8, 8)) < 0.5) | np.eye(8, dtype=bool)  # blocks of 16
    idx = np.argsort(~chosen, axis=-1, kind="stable")
    count = chosen.sum(-1)
    idx = np.where(np.arange(8) < count[:, None], idx, -1)
    lists = BlockList(jnp.asarray(idx, jnp.int32)[None, None], jnp.asarray(count, jnp.int32)[None, None], 16, 16)
    got = dual_chunk_attention(queries, key, v, chunk=32, lists=lists)
    allowed = jnp.asarray(np.kron(chosen, np.ones((16, 16), bool)))[None, None]
    np.testing.assert_allclose(got, reference.attend(queries, key, v, 32, allowed=allowed)[0], atol=1e-5)


def test_what_does_not_fit_is_refused(unchecked):
    q, k, v = inputs(length=64)
    with pytest.raises(ValueError, match="chunk 0 does not fit"):
        dual_chunk_attention((q, q, q), k, v, chunk=0)
    with pytest.raises(ValueError, match="needs three queries"):
        dual_chunk_attention((q, q), k, v, chunk=32)
    lists = BlockList(jnp.zeros((1, 1, 4, 1), jnp.int32), jnp.ones((1, 1, 4), jnp.int32), 16, 16)
    with pytest.raises(ValueError, match=r"chunk 40 does not fit: lists\.block_q=16"):
        dual_chunk_attention((q, q, q), k, v, chunk=40, lists=lists)
    with pytest.raises(ValueError, match="q_offset 8 must be a multiple"):
        dual_chunk_attention((q, q, q), k, v, chunk=32, lists=lists, q_offset=8)
