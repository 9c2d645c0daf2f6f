"""The softmax attention mixer: project, normalise, rotate, attend (op or cache), project back."""

from typing import Any, NamedTuple, cast

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lcjax.cache.base import AttentionCache
from lcjax.layers.linear import Linear
from lcjax.layers.norm import RMSNorm
from lcjax.layers.weight import Weight
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions.laws import Rope
from lcjax.positions.rotary import apply_rope
from pallas_kernels import block_sparse_attention


class Context(NamedTuple):
    """What every layer of one forward pass shares: rotary tables per law, segments, and which tokens are real."""

    tables: dict[Rope, tuple[jax.Array, jax.Array]]
    segment_ids: Int[Array, "B T"] | None = None
    valid: Bool[Array, "B T"] | None = None


class AttentionLayer(nnx.Module):
    """Grouped-query attention with the mask, scale and rotary law of its `Attention` record."""

    def __init__(self, spec: ModelSpec, mixer: Attention, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.mixer = mixer
        width, heads, groups, dim = spec.width, spec.num_heads, spec.num_kv_heads, spec.head_dim
        query = Weight((width, heads, dim), ("embed", "heads", "head_dim"), std=width**-0.5)
        key = Weight((width, groups, dim), ("embed", "kv_heads", "head_dim"), std=width**-0.5)
        out = Weight(
            (heads, dim, width), ("heads", "head_dim", "embed"), std=(2 * spec.num_layers * heads * dim) ** -0.5
        )
        self.query = Linear(query, bias=spec.qkv_bias, rngs=rngs, param_dtype=param_dtype)
        self.key = Linear(key, bias=spec.qkv_bias, rngs=rngs, param_dtype=param_dtype)
        self.value = Linear(key, bias=spec.qkv_bias, rngs=rngs, param_dtype=param_dtype)
        self.out = Linear(out, inputs=2, bias=spec.out_bias, rngs=rngs, param_dtype=param_dtype)
        norm: dict[str, Any] = {
            "eps": spec.norm_eps,
            "offset": spec.norm_offset,
            "rngs": rngs,
            "param_dtype": param_dtype,
        }
        self.query_norm = RMSNorm(dim, "head_dim", **norm) if spec.qk_norm else None
        self.key_norm = RMSNorm(dim, "head_dim", **norm) if spec.qk_norm else None
        self.sink_logits = Weight((heads,), ("heads",)).param(rngs, param_dtype) if mixer.sink_logits else None

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: AttentionCache | None = None
    ) -> tuple[Float[Array, "B T width"], AttentionCache | None]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.mixer.rope is not None:
            table = context.tables[self.mixer.rope]
            q, k = apply_rope(q, table), apply_rope(k, table)
        options: dict[str, Any] = {
            "scale": self.mixer.scale,
            "soft_cap": self.mixer.soft_cap,
            "sink_logits": None if self.sink_logits is None else self.sink_logits[...],
        }
        if cache is None:
            o = block_sparse_attention(q, k, v, self.mixer.mask(), segment_ids=context.segment_ids, **options)
            o = cast(jax.Array, o)
        else:
            cache = cache.append(k, v, context.valid).prepare(q)
            o, _ = cache.attend(q, self.mixer.mask(), return_lse=False, **options)
        return self.out(o), cache
