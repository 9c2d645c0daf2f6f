"""The forget gate of linear attention, from few features of a token (Yang et al., arXiv 2312.06635)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcjax.layers.linear import Linear, contract, precision

GATE_TEMPERATURE = 16.0  # keeps one step's decay above exp(-1) for any sane logit
LOWEST = -80.0  # of the logits; exp(-y) is finite down to -88


def log_forget(x: Float[Array, "B T rank"], project: Linear) -> Float[Array, "B T H D"]:
    """`log_sigmoid(x W + b) / 16` in float32. A logit under -80 counts as -80: no token's decay is below e^-5."""
    kernel, bias = project.weights(x.dtype)
    assert bias is not None
    return _log_forget(x, kernel, bias)


@jax.custom_vjp
def _log_forget(x: Float[Array, "B T rank"], kernel: Float[Array, "rank H D"], bias: Float[Array, "H D"]) -> Array:
    """One product, and what follows it in the same kernel where XLA has its way.

    On GPUs it fuses with a product what reads each step's result once, and rounds, broadcasts and reshapes nothing in
    between. So the logits stay float32, a column of ones adds the bias, and `log(1 + exp(-y))` takes the place of
    `log_sigmoid`, which reads y three times; written and read back, logits and log-decays are four arrays of q's size.
    """
    ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
    wide, rows = jnp.concatenate([x, ones], axis=-1), jnp.concatenate([kernel, bias[None]])
    contracted = ((wide.ndim - 1,), (0,))
    logits = jax.lax.dot_general(
        wide, rows, (contracted, ((), ())), precision=precision(x.dtype), preferred_element_type=jnp.float32
    )
    return jnp.log1p(jnp.exp(jnp.minimum(-logits, -LOWEST))) * (-1 / GATE_TEMPERATURE)


def _forward(x, kernel, bias):
    return _log_forget(x, kernel, bias), (x, kernel, bias)


def _backward(operands, cotangent):
    def plain(x, kernel, bias):
        return jax.nn.log_sigmoid((contract(x, kernel, 1) + bias).astype(jnp.float32)) / GATE_TEMPERATURE

    return jax.vjp(plain, *operands)[1](cotangent)


_log_forget.defvjp(_forward, _backward)
