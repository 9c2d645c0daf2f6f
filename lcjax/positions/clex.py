"""The learnt flow of CLEX's frequencies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lcjax.layers.weight import Weight
from lcjax.positions.by_factor import CLEX, Tabulated
from lcjax.positions.laws import ntk_exponents


class Flow(nnx.Module):
    """f(z, t) = tanh((z + ln theta_ntk(t)) U) D, shared by all layers that use the law.

    theta(t) = theta_ntk(t) exp(e(t)) with de/dt = f(ln theta(t), t), e(1) = 0: the NTK part of the flow is integrated
    in closed form, so that with D = 0, where training starts, the rows are those of the law to the last bit.
    """

    def __init__(self, law: CLEX, head_dim: int, *, rngs: nnx.Rngs):
        self.law, self.head_dim = law, head_dim
        pairs = law.rotary_dim(head_dim) // 2
        hidden = 2 * pairs * law.width
        self.up = Weight((pairs, hidden), ("head_dim", "rank"), std=(3 * pairs) ** -0.5).param(rngs, jnp.float32)
        self.down = Weight((hidden, pairs), ("rank", "head_dim")).param(rngs, jnp.float32)

    def rows(self) -> Float[Array, "R n"]:
        """Frequencies for t = 1..max_factor; the first is plain rotary whatever the parameters."""
        prior = self.law.table(self.head_dim)[0]
        if self.law.max_factor == 1:
            return jnp.asarray(prior)
        up, down = (x[...].astype(jnp.float32) for x in (self.up, self.down))
        drift = _drift(self.law, self.law.plain(self.head_dim), up, down)
        h = 1 / self.law.steps

        def step(e: Array, at: Array) -> tuple[Array, None]:
            return _three_eighths(drift, e, at, h), None

        @jax.checkpoint
        def unit(e: Array, start: Array) -> tuple[Array, Array]:
            e = jax.lax.scan(step, e, start + jnp.arange(self.law.steps) * h)[0]
            return e, e

        starts = jnp.arange(1, self.law.max_factor, dtype=jnp.float32)
        found = jax.lax.scan(unit, jnp.zeros(prior.shape[1]), starts)[1]
        return jnp.concatenate([jnp.asarray(prior[:1]), prior[1:] * jnp.exp(found)])

    def frequencies(self, length: Int[Array, "*B"]) -> Float[Array, "*B n"]:
        """The row of each running length."""
        return self.rows()[self.law.index(length)]

    def solved(self) -> Tabulated:
        """The rows as a law of constants, for decoding and evaluation without the flow."""
        law = self.law
        rows = tuple(tuple(map(float, row)) for row in np.asarray(self.rows())[1:])
        return Tabulated(law.base, law.partial, law.original_length, law.max_factor, rows)


def _drift(law: CLEX, plain: np.ndarray, up: Array, down: Array) -> Callable[[Array, Array], Array]:
    """de/dt as a function of (e [n], t)."""
    exponents = ntk_exponents(law, 2 * len(plain)).astype(np.float32)
    log_plain = np.log(plain).astype(np.float32)
    log_time = (-np.arange(len(plain)) / len(plain) * np.log(law.time_base)).astype(np.float32)

    def drift(e: Array, t: Array) -> Array:
        shift = exponents * jnp.log(2 * t - 1)
        z = log_plain - shift + e
        return jnp.tanh((z + log_time - shift) @ up) @ down

    return drift


def _three_eighths(f: Callable[[Array, Array], Array], e: Array, t: Array, h: float) -> Array:
    """One step of Kutta's 3/8 rule."""
    k1 = f(e, t)
    k2 = f(e + h * k1 / 3, t + h / 3)
    k3 = f(e + h * (k2 - k1 / 3), t + 2 * h / 3)
    k4 = f(e + h * (k1 - k2 + k3), t + h)
    return e + h * (k1 + 3 * (k2 + k3) + k4) / 8
