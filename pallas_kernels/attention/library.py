"""Plain causal and full masks through cuDNN (`jax.nn.dot_product_attention`).

Its residuals have no name that a checkpoint policy could keep (`KEPT`): under such a policy its forward runs twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.call import Call
from pallas_kernels.op import Unsupported, platform


def attend(call: Call) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """(o, lse); declines whatever cuDNN's fused attention cannot express. lse is NaN: nobody asked for it."""
    if reason := _reason(call):
        raise Unsupported(reason)
    o = jax.nn.dot_product_attention(
        call.q, call.k, call.v, scale=call.scale, is_causal=call.mask.causal, implementation="cudnn"
    )
    batch, length, heads, _ = call.q.shape
    return o, jnp.full((batch, heads, length), jnp.nan, jnp.float32)


def _reason(call: Call) -> str | None:
    forms, _ = call.mask.patterns()
    dim = call.q.shape[-1]
    return next(
        (
            reason
            for refused, reason in (
                (platform() != "gpu", f"cuDNN runs on NVIDIA GPUs, this is {platform()}"),
                (any(form.terms is not None for form in forms), "only plain causal and full masks"),
                (call.segment_ids is not None, "no packed segments"),
                (call.kv_length is not None, "no kv_length"),
                (not isinstance(call.q_offset, int) or call.q_offset != 0, "no q_offset"),
                (call.mask.causal and call.q.shape[1] != call.k.shape[1], "causal only with as many queries as keys"),
                (call.soft_cap is not None, "no soft cap"),
                (call.deterministic, "the order of its gradient's sums is not fixed"),
                (call.need_lse or call.whole is not None, "its lse has no gradient"),
                (call.q.dtype == jnp.float32, "no float32"),
                (call.q.shape[1] % 2 or call.k.shape[1] % 2, "no odd lengths: its gradient takes none"),
                (call.v.shape[-1] != dim or dim % 8 or dim > 128, f"head dims {dim} and {call.v.shape[-1]}"),
            )
            if refused
        ),
        None,
    )
