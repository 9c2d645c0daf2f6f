"""Remaps against dense oracles, and in a model: identity settings, decoding across borders, packed rows, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.cache import init_caches
from lcjax.methods.positions import solve_flows
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions import (
    CLEX,
    DPE,
    DualChunk,
    DynamicNTK,
    DynamicYaRN,
    MRope,
    Rope,
    SelfExtend,
    XPos,
    YaRN,
    apply_rope,
    grid_positions,
)
from lcjax.positions.dpe import detect_factors, pair_contributions, select_pairs
from lcjax.positions.rotary import angles
from lcjax.positions.tables import of_tokens

D, H, K, LENGTH = 16, 4, 2, 75
LAW = Rope(base=1e4)
CHUNKED = DualChunk(size=24, local=4)  # chunks of 20
REMAPS = [
    CHUNKED,
    SelfExtend(group=4, window=16),
    DPE(window=16, factors=(1, 2, 8, 16), pairs=8),
    DPE(window=16, factors=(2, 4), pairs=8, selected=((0, 5), (1, 2, 7), (3,), (0, 1, 2, 3, 4, 5, 6, 7))),
]
SPEC = ModelSpec(
    vocab_size=61, width=32, mlp_width=48, num_layers=1, num_heads=H, num_kv_heads=K, head_dim=D, max_length=128,
    dtype="float32",
)  # fmt: skip
named = lambda x: type(x).__name__


def distances(remap):
    """[H,T,T,n]: position of the query minus that of the key, for each pair of tokens and of features."""
    p = jnp.arange(LENGTH)[None]
    wide = lambda x: np.broadcast_to(np.asarray(x if x.ndim == 3 else x[..., None])[0], (LENGTH, D // 2))
    queries, keys = [wide(x) for x in remap.queries(p)], [wide(x) for x in remap.keys(p)]
    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    if isinstance(remap, DualChunk):
        part = np.minimum(np.arange(LENGTH)[:, None] // remap.chunk - np.arange(LENGTH) // remap.chunk, 2)
        keys = keys * 3
    else:
        part = (back >= remap.window).astype(int)
    found = np.zeros((H, LENGTH, LENGTH, D // 2), np.int64)
    for n, (q, k) in enumerate(zip(queries, keys, strict=True)):
        found[:, part == n] = (q[:, None] - k[None])[part == n]
    if isinstance(remap, DPE) and remap.selected is not None:
        found = np.where(remap.chosen(H)[:, None, None], found, back[None, ..., None])
    return found


@pytest.mark.parametrize("remap", REMAPS, ids=named)
def test_equals_the_dense_oracle(remap):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, LENGTH, h, D)) for key, h in zip(keys, (H, K, K), strict=True))
    tables = of_tokens(LAW, remap, LAW.frequencies(D), D, jnp.arange(LENGTH)[None], 0)
    queries = tuple(apply_rope(q, t) for t in tables.queries)
    got = remap.attend(queries, tuple(apply_rope(k, t) for t in tables.keys), v)[0]
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, H // K, axis=1) for x in (k, v))
    angle = distances(remap) * LAW.plain(D)  # [H,T,T,n]
    n = D // 2
    dot = lambda a, b, w: np.einsum("ihn,jhn,hijn->hij", a, b, w)
    score = dot(q[..., :n], k[..., :n], np.cos(angle)) + dot(q[..., n:], k[..., n:], np.cos(angle))
    score += dot(q[..., :n], k[..., n:], np.sin(angle)) - dot(q[..., n:], k[..., :n], np.sin(angle))
    weight = np.where(np.tri(LENGTH, dtype=bool), np.exp(score * D**-0.5), 0)
    want = np.einsum("hij,jhd->ihd", weight / weight.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_distances_are_the_papers():
    p = jnp.arange(5000)[None]
    extend = SelfExtend(group=4, window=1024)
    (_, far), (_, key) = extend.queries(p), extend.keys(p)
    assert int(far[0, -1] - key[0, 0]) == 2017
    np.testing.assert_array_equal(far[0, 1024::4] - key[0, : 5000 - 1024 : 4], 1024)
    same = DPE(window=1024, factors=(4,) * 8, pairs=32)
    np.testing.assert_array_equal(same.queries(p)[1], jnp.broadcast_to(far[..., None], (1, 5000, 32)))
    chunked = DualChunk(size=3072, local=512)
    assert chunked.chunk == 2560


@functools.cache
def model(spec):
    """(graph, parameters, compiled pass)"""
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    return graphdef, params, jax.jit(lambda p, t, **options: nnx.merge(graphdef, p).hidden(t, **options)[0])


def hidden(spec, tokens, **options):
    _, params, run = model(spec)
    return run(params, tokens, **options)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, LENGTH)), jnp.int32)
IDENTITIES = [
    DualChunk(size=80, local=4),
    SelfExtend(1, 16),
    SelfExtend(8, 75),
    DPE(window=16, factors=(1, 1), pairs=8),
]


@pytest.mark.parametrize("remap", IDENTITIES, ids=named)
def test_identity_settings_are_plain_attention(remap):
    got, want = hidden(SPEC.with_positions(LAW, remap), TOKENS), hidden(SPEC.with_positions(LAW), TOKENS)
    np.testing.assert_allclose(got, want, atol=2e-5)
    if isinstance(remap, DualChunk):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("law", "remap"),
    [
        *((LAW, remap) for remap in REMAPS[:2]),
        (YaRN(factor=1.0, original_length=20, attention_factor=1.2), CHUNKED),
        (LAW, REMAPS[3]),
        (XPos(scale_base=64.0), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_decoding_equals_prefill_across_every_border(law, remap):
    """Chunks of several tokens, then one by one past every border of the parts, rows of different lengths."""
    spec = SPEC.with_positions(law, remap)
    graphdef, params, _ = model(spec)
    step = jax.jit(lambda p, c, t, valid: nnx.merge(graphdef, p).hidden(t, caches=c, valid=valid))
    want = hidden(spec, TOKENS)
    caches = init_caches(spec, 2, 80)
    at = np.zeros(2, int)
    sizes = [(15, 15), (15, 9), *([(1, 1)] * 14), (15, 15), *([(1, 1)] * 16)]
    for counts in sizes:
        width = max(counts)
        rows = [np.pad(np.asarray(TOKENS[b, at[b] : at[b] + n]), (0, width - n)) for b, n in enumerate(counts)]
        valid = np.arange(width) < np.array(counts)[:, None]
        out, caches = step(params, caches, np.stack(rows), valid)
        for b, n in enumerate(counts):
            np.testing.assert_allclose(out[b, :n], want[b, at[b] : at[b] + n], atol=5e-5, err_msg=str((at, b)))
        at += counts
    assert at[0] == LENGTH


@pytest.mark.parametrize("law", [DynamicNTK, DynamicYaRN, CLEX], ids=lambda law: law.__name__)
def test_keys_turn_with_the_length_at_which_they_are_read(law):
    """Keys of the one layer do not depend on the law: a step past the trained length equals a fresh pass."""
    options = {"original_length": 16} | ({"factor": 2.0} if law is DynamicNTK else {"max_factor": 4})
    options |= {"steps": 5} if law is CLEX else {}
    spec = SPEC.with_positions(law(**options))
    graphdef, params, _ = model(spec)
    step = jax.jit(lambda p, c, t: nnx.merge(graphdef, p).hidden(t, caches=c))
    _, caches = step(params, init_caches(spec, 2, 80), TOKENS[:, :14])
    for end in (15, 16, 17):
        out, caches = step(params, caches, TOKENS[:, end - 1 : end])
    np.testing.assert_allclose(out[:, 0], hidden(spec, TOKENS[:, :17])[:, -1], atol=2e-5)
    plain = hidden(SPEC.with_positions(LAW), TOKENS[:, :40])
    assert not np.allclose(hidden(spec, TOKENS[:, :40])[:, -1], plain[:, -1], atol=1e-3)


def test_a_token_behind_a_grid_is_decoded_at_its_place():
    """M-RoPE: a token's own positions on three axes; behind the grid those are its index plus the grid's delta."""
    spec = SPEC.with_positions(MRope(1e4, sections=(2, 3, 3)))
    graphdef, params, run = model(spec)
    places, delta = grid_positions((3, (3, 2, 2), 5))
    assert delta < 0
    places, tokens = jnp.asarray(places)[:, None].repeat(2, 1), TOKENS[:, :20]
    want = run(params, tokens, positions=places)[:, -1]
    step = jax.jit(lambda p, c, t, at: nnx.merge(graphdef, p).hidden(t, caches=c, positions=at))
    caches = init_caches(spec, 2, 80)
    for n in range(20):
        at = places[:, :, n : n + 1] if n < 15 else jnp.full((3, 2, 1), n + delta)
        out, caches = step(params, caches, tokens[:, n : n + 1], at)
    np.testing.assert_allclose(out[:, 0], want, atol=2e-5)


def test_a_clex_model_is_solved_for_serving():
    spec = SPEC.with_positions(CLEX(original_length=16, max_factor=4, steps=5))
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    params["flows"][0]["down"][...] = 0.3 * jax.random.normal(jax.random.key(1), (16, 8))
    run = jax.jit(lambda p, t, d=graphdef: nnx.merge(d, p).hidden(t)[0])
    want = run(params, TOKENS)
    constant, rest = solve_flows(spec, params)
    assert "flows" not in rest
    run = jax.jit(lambda p, t: nnx.merge(abstract(constant)[0], p).hidden(t)[0])
    np.testing.assert_allclose(run(rest, TOKENS), want, atol=1e-5)
    assert not np.allclose(want, hidden(SPEC.with_positions(LAW), TOKENS), atol=1e-2)


def test_packed_rows():
    """Documents do not see each other; a document that starts a row is as if alone."""
    ids = jnp.asarray(np.repeat([1, 2], [43, 32])[None].repeat(2, 0))
    for remap in REMAPS[:2]:
        spec = SPEC.with_positions(LAW, remap)
        packed = hidden(spec, TOKENS, segment_ids=ids)
        np.testing.assert_allclose(packed[:, :43], hidden(spec, TOKENS[:, :43]), atol=3e-5)
        changed = hidden(spec, TOKENS.at[:, 0].add(1) % 61, segment_ids=ids)
        np.testing.assert_array_equal(packed[:, 43:], changed[:, 43:])


def test_effective_lengths_and_key_pairs():
    best = (4, 1, 8, 2)
    score = lambda factors: -sum(abs(np.log2(f) - np.log2(b)) for f, b in zip(factors, best, strict=True))
    assert detect_factors(score, groups=4, length=32_768, trained=8192, least=2048) == best
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 50, 4, D))
    k = k[:, :, :2]
    contributions = pair_contributions(q, k)
    rotate = lambda x: apply_rope(x, (jnp.cos(a), jnp.sin(a)))
    a = angles(jnp.arange(50)[None], LAW.frequencies(D)[0])
    np.testing.assert_allclose(pair_contributions(rotate(q), rotate(k)), contributions, rtol=1e-5)
    chosen = select_pairs(contributions, 3)
    assert all(set(head) == set(np.argsort(np.asarray(c))[-3:]) for head, c in zip(chosen, contributions, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualChunk(size=8, local=8), "size 8 does not fit"),
        (lambda: DualChunk(size=20, local=12), "more than half"),
        (lambda: SelfExtend(group=0), "group 0"),
        (lambda: DPE(window=16, factors=(3,), pairs=8), "the factor 3 must divide it"),
        (lambda: DPE(window=16, factors=(2, 2, 2), pairs=8), "do not divide 8 pairs"),
        (lambda: DPE(window=16, factors=(2,), pairs=8, selected=((8,),)), "pairs in 0..7"),
        (lambda: Attention(window=4, remap=CHUNKED), "DualChunk needs full attention"),
        (lambda: Attention(rope=XPos(), remap=CHUNKED), "DualChunk needs full attention"),
        (lambda: SPEC.with_positions(LAW, DPE(window=16, factors=(2,), pairs=32)), "DPE.pairs is 32"),
        (lambda: select_pairs(np.ones((2, 8)), 9), "count 9"),
    ],
)
def test_bad_remaps(make, message):
    with pytest.raises(ValueError, match=message):
        make()
