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
from lcjax.parallel import ops
from lcjax.positions.laws import Rope
from lcjax.positions.rotary import apply_rope


class Context(NamedTuple):
    """What every layer of one forward pass shares: rotary tables per law, segments, and which tokens are real."""

    tables: dict[Rope, tuple[jax.Array, jax.Array]]
    segment_ids: Int[Array, "B T"] | None = None
    valid: Bool[Array, "B T"] | None = None


class HeadProjections(nnx.Module):
    """Base of the layers that project to query and (grouped) key and value heads, and back; with q/k norms if any."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        width, heads, groups, dim = spec.width, spec.num_heads, spec.num_kv_heads, spec.head_dim
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        query = Weight((width, heads, dim), ("embed", "heads", "head_dim"), std=width**-0.5)
        key = Weight((width, groups, dim), ("embed", "kv_heads", "head_dim"), std=width**-0.5)
        out = Weight(
            (heads, dim, width), ("heads", "head_dim", "embed"), std=(2 * spec.num_layers * heads * dim) ** -0.5
        )
        self.query = Linear(query, bias=spec.qkv_bias, **init)
        self.key = Linear(key, bias=spec.qkv_bias, **init)
        self.value = Linear(key, bias=spec.qkv_bias, **init)
        self.out = Linear(out, inputs=2, bias=spec.out_bias, **init)
        norm: dict[str, Any] = {"eps": spec.norm_eps, "offset": spec.norm_offset, **init}
        self.query_norm = RMSNorm(dim, "head_dim", **norm) if spec.qk_norm else None
        self.key_norm = RMSNorm(dim, "head_dim", **norm) if spec.qk_norm else None

    def project(
        self, x: Float[Array, "B T width"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """q, k (normed, not rotated) and v."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def mix(
        self, x: Float[Array, "B T width"], context: Context, cache: Any = None
    ) -> tuple[Float[Array, "B T H D"], Any]:
        """The heads' outputs before the output projection, and the advanced cache."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T width"], context: Context, cache: Any = None
    ) -> tuple[Float[Array, "B T width"], Any]:
        o, cache = self.mix(x, context, cache)
        return self.out(o), cache


class AttentionLayer(HeadProjections):
    """Grouped-query attention with the mask, scale and rotary law of its `Attention` record."""

    def __init__(self, spec: ModelSpec, mixer: Attention, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        super().__init__(spec, rngs=rngs, param_dtype=param_dtype)
        self.mixer = mixer
        logits = Weight((spec.num_heads,), ("heads",))
        self.sink_logits = logits.param(rngs, param_dtype) if mixer.sink_logits else None

    def mix(
        self, x: Float[Array, "B T width"], context: Context, cache: AttentionCache | None = None
    ) -> tuple[Float[Array, "B T H D"], AttentionCache | None]:
        """Softmax attention through the op, or through the cache."""
        sinks = None if self.sink_logits is None else self.sink_logits[...]
        return softmax_attention(*self.project(x), self.mixer, context, cache, sinks)


def softmax_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    mixer: Attention,
    context: Context,
    cache: AttentionCache | None = None,
    sink_logits: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B T H D"], AttentionCache | None]:
    """Rotate q and k and attend as the record says, among themselves or through the cache."""
    if mixer.rope is not None:
        table = context.tables[mixer.rope]
        q, k = apply_rope(q, table), apply_rope(k, table)
    options: dict[str, Any] = {"scale": mixer.scale, "soft_cap": mixer.soft_cap, "sink_logits": sink_logits}
    if cache is None:
        o = ops.attention(q, k, v, mixer.mask(), segment_ids=context.segment_ids, **options)
        return cast(jax.Array, o), None
    cache = cache.append(k, v, context.valid)
    o, _ = cache.attend(q, mixer.mask(), return_lse=False, **options)
    return o, cache
