"""Attention with a gate a KV head, between full attention and sinks with a window."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lcjax.layers.attention import AttentionLayer, Context
from lcjax.layers.weight import Weight
from lcjax.models.gated_heads import GatedHeads
from lcjax.models.spec import ModelSpec
from lcjax.parallel import ops


class GatedHeadsLayer(AttentionLayer):
    """The layer of a `GatedHeads` record. Called as any other, it is full attention and no gate acts."""

    mixer: GatedHeads

    def __init__(self, spec: ModelSpec, mixer: GatedHeads, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        super().__init__(spec, mixer, rngs=rngs, param_dtype=param_dtype)
        self.gates = Weight((spec.num_kv_heads,), ("kv_heads",), fill=1.0).param(rngs, param_dtype)

    def streams(
        self, reference: Float[Array, "B T width"], x: Float[Array, "B T width"], context: Context
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """The heads' outputs of the untouched stream, and of the gated one: gate x full + (1 - gate) x near.

        Only `x` and the gates, cut to [0, 1], are differentiated.
        """
        options: dict[str, Any] = self.options | {"segment_ids": context.segment_ids}
        attend = lambda q, k, v, mask: cast(Array, ops.attention(q, k, v, mask, **options))
        everything = self.mixer.mask(self.query.kernel.shape[1], self.key.kernel.shape[1])
        original = jax.lax.stop_gradient(attend(*self.rotated(reference, context), everything))
        q, k, v = self.rotated(x, context)
        full = attend(q, k, v, everything) if self.mixer.own else original
        near = attend(q, k, v, self.mixer.near)
        gates = self.gates[...].astype(jnp.float32)
        # Optimisers keep gates in the range; there the cut is no step, and its borders have the slope of the inside.
        gates = gates + jax.lax.stop_gradient(jnp.clip(gates, 0.0, 1.0) - gates)
        gate = jnp.repeat(gates, q.shape[2] // k.shape[2])[:, None]  # [H,1]
        mixed = gate * full.astype(jnp.float32) + (1 - gate) * near.astype(jnp.float32)
        return original, mixed.astype(x.dtype)
