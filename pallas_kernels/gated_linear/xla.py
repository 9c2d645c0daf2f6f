"""Gated linear attention by chunks, in plain JAX: parallel over chunks, one short scan over the chunk states.

Inside a chunk of C tokens the decay from token j to token i is a product of factors in [0, 1]. It is built by halving:
for every pair of neighbouring blocks of w tokens, the product splits at their border into a row factor (border to i)
and a column factor (j to border), so each off-diagonal block is one matrix product and no factor ever exceeds 1.
Nothing overflows, however strong the decay, and a decay of 0 (log-decay -inf) cuts exactly.

After Yang et al., Gated Linear Attention (arXiv 2312.06635), section 4, with halving in place of their two levels; the
delta rule in the WY form of arXiv 2406.06484 and 2412.06464. The backward keeps chunk-entry states only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear.problem import NORMALISER_FLOOR, LinearState, Problem, varying_like

MAX_CHUNK = 64


class Decays(NamedTuple):
    """Decay factors of a chunk, one per key channel (E = Dk) or shared (E = 1); `...` is [N, B*H]."""

    prefix: Float[Array, "... C E"]  # chunk entry to row i, i included
    suffix: Float[Array, "... C E"]  # after row j to the chunk's end
    levels: tuple[tuple[Array, Array], ...]  # block width 1, 2, 4 ...: (row factors, column factors) [..., C/2w, w, E]

    @property
    def total(self) -> Float[Array, "... E"]:
        return self.prefix[..., -1, :]


def chunk_decays(factor: Float[Array, "... C E"]) -> Decays:
    """Prefix, suffix and pairwise products of the factors of a chunk (C a power of two)."""
    c = factor.shape[-2]
    prefix, suffix, levels, w = factor, jnp.ones_like(factor), [], 1
    while w < c:
        split = (*factor.shape[:-2], c // (2 * w), 2, w, factor.shape[-1])
        p, s = prefix.reshape(split), suffix.reshape(split)
        (p_left, p_right), (s_left, s_right) = (p[..., 0, :, :], p[..., 1, :, :]), (s[..., 0, :, :], s[..., 1, :, :])
        levels.append((p_right, s_left))
        prefix = jnp.stack([p_left, p_right * p_left[..., -1:, :]], axis=-3).reshape(factor.shape)
        suffix = jnp.stack([s_left * p_right[..., -1:, :], s_right], axis=-3).reshape(factor.shape)
        w *= 2
    return Decays(prefix, suffix, tuple(levels))


def _grow(diagonal: Float[Array, "... n w w"], below: Float[Array, "... m w w"]) -> Float[Array, "... m w2 w2"]:
    """Pairs neighbouring diagonal blocks, with `below` between them."""
    left, right = diagonal[..., 0::2, :, :], diagonal[..., 1::2, :, :]
    top = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, right], axis=-1)], axis=-2)


def decayed_scores(q, k, levels, dot) -> Float[Array, "... C C"]:
    """`sum_c q[i,c] k[j,c] decay(j -> i)[c]` for j <= i, else 0."""
    if levels and levels[0][0].shape[-1] == 1:
        one = jnp.ones((*q.shape[:-1], 1), q.dtype)
        return dot("...ik,...jk->...ij", q, k) * _scores_by_halving(one, one, levels, jnp.einsum)
    return _scores_by_halving(q, k, levels, dot)


def _scores_by_halving(q, k, levels, dot):
    c, width = q.shape[-2:]
    scores = (q * k).sum(-1)[..., None, None]
    for row, column in levels:
        split = (*q.shape[:-2], row.shape[-3], 2, row.shape[-2], width)
        right, left = q.reshape(split)[..., 1, :, :] * row, k.reshape(split)[..., 0, :, :] * column
        scores = _grow(scores, dot("...ik,...jk->...ij", right, left))
    return scores.reshape(*q.shape[:-2], c, c)


def unit_lower_inverse(n: Float[Array, "... C C"], dot) -> Float[Array, "... C C"]:
    """`(I + n)^-1` for strictly lower n, by halving: as stable as forward substitution, and all matrix products."""
    c = n.shape[-1]
    inverse, w = jnp.ones((*n.shape[:-2], c, 1, 1), n.dtype), 1
    while w < c:
        pairs = c // (2 * w)
        blocks = n.reshape(*n.shape[:-2], pairs, 2, w, pairs, 2, w)[..., :, 1, :, :, 0, :]
        below = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        left, right = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        inverse = _grow(inverse, -dot("...ij,...jk->...ik", right, dot("...ij,...jk->...ik", below, left)))
        w *= 2
    return inverse[..., 0, :, :]


class _Inputs(NamedTuple):
    q: Array  # [N, G, C, Dk], scaled; N chunks, G = B*H
    k: Array
    v: Array
    log_decay: Array  # [N, G, C, E]
    beta: Array | None  # [N, G, C, 1]


class _Chunks(NamedTuple):
    """What the state scan needs from each chunk."""

    decays: Decays
    read: Array  # q times the decay from the chunk's entry
    write: Array  # k times the decay to the chunk's end
    values: Array  # v, or the delta rule's U
    erase: Array | None  # the delta rule's W
    solve: Array | None  # the delta rule's (I + N)^-1
    keys: Array | None  # the delta rule's decayed key products


def _dot(exact: bool):
    return functools.partial(jnp.einsum, precision="highest" if exact else None)


def _chunks(x: _Inputs, dot) -> _Chunks:
    decays = chunk_decays(jnp.exp(x.log_decay))
    read, write = x.q * decays.prefix, x.k * decays.suffix
    if x.beta is None:
        return _Chunks(decays, read, write, x.v, None, None, None)
    keys = jnp.tril(decayed_scores(x.k, x.k, decays.levels, dot), -1)
    solve = unit_lower_inverse(x.beta * keys, dot)
    values = dot("...ij,...jv->...iv", solve, x.beta * x.v)
    erase = dot("...ij,...jk->...ik", solve, x.beta * (x.k * decays.prefix))
    return _Chunks(decays, read, write, values, erase, solve, keys)


def _entry_states(c: _Chunks, s0, dot):
    """States entering each chunk `[N, G, Dk, Dv]`, and the last one."""
    total = c.decays.total[..., None]
    if c.erase is None:
        added = dot("...ck,...cv->...kv", c.write, c.values)
        last, entry = jax.lax.scan(lambda s, x: (x[0] * s + x[1], s), s0, (total, added))
        return entry, last

    def body(s, x):
        total, write, values, erase = x
        new = values - dot("gck,gkv->gcv", erase, s)
        return total * s + dot("gck,gcv->gkv", write, new), s

    last, entry = jax.lax.scan(body, s0, (total, c.write, c.values, c.erase))
    return entry, last


def _new_values(c: _Chunks, entry, dot):
    return c.values if c.erase is None else c.values - dot("...ck,...kv->...cv", c.erase, entry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(exact: bool, x: _Inputs, s0):
    return _chunked_forward(exact, x, s0)[0]


def _chunked_forward(exact, x, s0):
    dot = _dot(exact)
    c = _chunks(x, dot)
    entry, last = _entry_states(c, s0, dot)
    scores = decayed_scores(x.q, x.k, c.decays.levels, dot)
    o = dot("...ck,...kv->...cv", c.read, entry) + dot("...ij,...jv->...iv", scores, _new_values(c, entry, dot))
    return (o, last), (x, entry)


def _leaving_cotangents(c: _Chunks, to_values, from_read, d_last, dot):
    """Cotangents of the state leaving each chunk `[N, G, Dk, Dv]`, and of the initial state."""
    total = c.decays.total[..., None]
    if c.erase is None:
        first, leaving = jax.lax.scan(lambda d, x: (x[0] * d + x[1], d), d_last, (total, from_read), reverse=True)
        return leaving, first

    def body(d, x):
        total, from_read, to_values, write, erase = x
        d_values = to_values + dot("gck,gkv->gcv", write, d)
        return total * d + from_read - dot("gck,gcv->gkv", erase, d_values), d

    first, leaving = jax.lax.scan(body, d_last, (total, from_read, to_values, c.write, c.erase), reverse=True)
    return leaving, first


def _chunked_backward(exact, residuals, cotangents):
    (x, entry), (do, d_last), dot = residuals, cotangents, _dot(exact)
    c = _chunks(x, dot)
    scores, scores_vjp = jax.vjp(lambda q, k: decayed_scores(q, k, c.decays.levels, dot), x.q, x.k)
    from_scores = dot("...ij,...iv->...jv", scores, do)
    leaving, d_first = _leaving_cotangents(c, from_scores, dot("...ck,...cv->...kv", c.read, do), d_last, dot)
    values = _new_values(c, entry, dot)
    dv = from_scores + dot("...ck,...kv->...cv", c.write, leaving)
    dq, dk = scores_vjp(dot("...iv,...jv->...ij", do, values))
    dq = dq + dot("...cv,...kv->...ck", do, entry) * c.decays.prefix
    dk_write = dot("...cv,...kv->...ck", values, leaving) * c.decays.suffix
    dk, dk_rows, dbeta = dk + dk_write, 0.0, None
    if c.erase is not None:
        dv, dk_rows, dk_columns, dbeta = _delta_backward(x, c, entry, dv, dot)
        dk = dk + dk_columns
    # the decay from j to i has a factor of each token after j up to i: credit row i, debit column j, sum from the end
    balance = x.q * dq + x.k * (dk_rows - dk)
    ends = c.decays.total * (entry * leaving).sum(-1) + (x.k * dk_write).sum(-2)
    if x.log_decay.shape[-1] == 1:
        balance, ends = balance.sum(-1, keepdims=True), ends.sum(-1, keepdims=True)
    upper = jnp.triu(jnp.ones((x.q.shape[-2],) * 2, x.q.dtype))
    dg = dot("ij,...je->...ie", upper, balance) + ends[..., None, :]
    dg = jnp.where(x.log_decay == -jnp.inf, 0, dg)  # a cut has no slope; what the sum leaves there is rounding
    return _Inputs(dq, dk + dk_rows, dv, dg, dbeta), d_first


def _delta_backward(x: _Inputs, c: _Chunks, entry, d_values, dot):
    """Through `V' = (I + N)^-1 beta (V - K~ S)`: cotangents of v, of k as a row and as a column of N, and of beta."""
    assert x.beta is not None
    assert c.keys is not None
    decayed = x.k * c.decays.prefix
    d_right = dot("...ij,...iv->...jv", c.solve, d_values)
    d_erase_right = -dot("...cv,...kv->...ck", d_right, entry)
    d_n = -jnp.tril(
        dot("...iv,...jv->...ij", d_right, c.values) + dot("...ik,...jk->...ij", d_erase_right, c.erase), -1
    )
    dbeta = (d_right * x.v).sum(-1) + (d_erase_right * decayed).sum(-1) + (d_n * c.keys).sum(-1)
    _, keys_vjp = jax.vjp(lambda row, column: decayed_scores(row, column, c.decays.levels, dot), x.k, x.k)
    dk_rows, dk_columns = keys_vjp(x.beta * d_n)
    dk_rows = dk_rows + x.beta * d_erase_right * c.decays.prefix
    return x.beta * d_right, dk_rows, dk_columns, dbeta[..., None]


_chunked.defvjp(_chunked_forward, _chunked_backward)


def gated_linear_xla(p: Problem, chunk: int | None = None) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """The `xla` backend. `p` must have its segments folded. `chunk` is a power of two."""
    b, t, h, _ = p.q.shape
    acc = p.state.s.dtype
    c = chunk or min(MAX_CHUNK, 1 << max(t - 1, 0).bit_length())
    n = -(-t // c)

    def split(x):  # [B, T, H, F] -> [N, B*H, C, F]
        x = jnp.pad(x.astype(acc), ((0, 0), (0, n * c - t), (0, 0), (0, 0)))
        return x.reshape(b, n, c, h, -1).transpose(1, 0, 3, 2, 4).reshape(n, b * h, c, -1)

    g = varying_like(jnp.zeros((b, t, h), acc), p.q) if p.log_decay is None else p.log_decay
    v, s0 = split(p.v), p.state.s
    if p.state.z is not None:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        s0 = jnp.concatenate([s0, p.state.z[..., None]], axis=-1)
    beta = None if p.beta is None else split(p.beta[..., None])
    x = _Inputs(split(p.q) * p.scale, split(p.k), v, split(g if g.ndim == 4 else g[..., None]), beta)
    exact = p.q.dtype in (jnp.float32, jnp.float64)
    o, last = _chunked(exact, x, s0.reshape(b * h, *s0.shape[2:]))
    o = o.reshape(n, b, h, c, -1).transpose(1, 0, 3, 2, 4).reshape(b, n * c, h, -1)[:, :t]
    last = last.reshape(b, h, *last.shape[1:])
    if p.state.z is not None:
        o = o[..., :-1] / (o[..., -1:] + NORMALISER_FLOOR)
        return o.astype(p.v.dtype), LinearState(last[..., :-1], last[..., -1])
    return o.astype(p.v.dtype), LinearState(last, None)
