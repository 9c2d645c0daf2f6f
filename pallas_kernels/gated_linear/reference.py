"""The definition of gated linear attention: one token at a time, in float32 (float64 where the inputs are)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear.problem import NORMALISER_FLOOR, LinearState, Problem


def step(q, k, v, decay, beta, state: LinearState, *, scale: float) -> tuple[Float[Array, "B H Dv"], LinearState]:
    """One token: q, k, decay (a factor, not its logarithm) `[B,H,Dk]`, v `[B,H,Dv]`, beta `[B,H]` or None."""
    s = decay[..., None] * state.s
    if beta is not None:
        v = beta[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, s))
    s = s + k[..., :, None] * v[..., None, :]
    o = scale * jnp.einsum("bhk,bhkv->bhv", q, s)
    if state.z is None:
        return o, LinearState(s, None)
    z = decay * state.z + k
    return o / (scale * (q * z).sum(-1) + NORMALISER_FLOOR)[..., None], LinearState(s, z)


def gated_linear_reference(p: Problem) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """Runs `step` over the tokens; a segment start empties the state, padding leaves it alone and yields 0."""
    acc = p.state.s.dtype
    q, k, v = (x.astype(acc) for x in (p.q, p.k, p.v))
    g = jnp.zeros(q.shape[:3], acc) if p.log_decay is None else p.log_decay.astype(acc)
    g = jnp.broadcast_to(g if g.ndim == 4 else g[..., None], q.shape)
    beta = None if p.beta is None else p.beta.astype(acc)
    valid = jnp.ones(q.shape[:2], bool) if p.segments is None else p.segments.valid
    reset = jnp.zeros(q.shape[:2], bool) if p.segments is None else p.segments.reset

    def body(state, token):
        q, k, v, g, beta, valid, reset = token

        def pick(mask, x, y):
            return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), x, y)

        state = pick(reset, jax.tree.map(jnp.zeros_like, state), state)
        q, k, v, g = (pick(valid, x, jnp.zeros_like(x)) for x in (q, k, v, g))
        beta = None if beta is None else pick(valid, beta, jnp.zeros_like(beta))
        o, new = step(q, k, v, jnp.exp(g), beta, state, scale=p.scale)
        return pick(valid, new, state), pick(valid, o, jnp.zeros_like(o))

    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta, valid, reset))
    state, o = jax.lax.scan(body, p.state, by_token)
    return jnp.moveaxis(o, 0, 1).astype(p.v.dtype), state
