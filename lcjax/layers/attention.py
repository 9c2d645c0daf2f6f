"""The softmax attention mixer: project, normalise, rotate, attend (op or cache), project back."""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from lcjax.cache.base import AttentionCache, SlotCache
from lcjax.layers.linear import Linear, each
from lcjax.layers.norm import RMSNorm
from lcjax.layers.weight import Weight
from lcjax.models.spec import Attention, ModelSpec
from lcjax.parallel import ops
from lcjax.positions.laws import Frequencies, Rope
from lcjax.positions.remap import Remap
from lcjax.positions.rotary import apply_rope
from lcjax.positions.tables import Tables, of_slots, rotates_at_read


class Context(NamedTuple):
    """What every layer of one forward pass shares: frequencies per law, rotary tables per law and remap, each row's
    running length (the largest position + 1), segments, which tokens are real, and the positions themselves.
    """

    frequencies: dict[Rope, Frequencies]
    tables: dict[tuple[Rope, Remap | None], Tables]
    length: Int[Array, " B"]
    segment_ids: Int[Array, "B T"] | None = None
    valid: Bool[Array, "B T"] | None = None
    positions: Num[Array, "*A B T"] | None = None


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
        q, k, v = each(x, self.query, self.key, self.value)
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

    @property
    def options(self) -> dict[str, Any]:
        """What the op takes beside arrays and mask."""
        logits = None if self.sink_logits is None else self.sink_logits[...]
        return {"scale": self.mixer.scale, "soft_cap": self.mixer.soft_cap, "sink_logits": logits}

    def mix(
        self, x: Float[Array, "B T width"], context: Context, cache: AttentionCache | None = None
    ) -> tuple[Float[Array, "B T H D"], AttentionCache | None]:
        """Softmax attention through the op, or through the cache."""
        q, k, v = self.project(x)
        options = self.options
        if cache is None:
            return attend(self.mixer, q, k, v, context, **options), None
        return self._attend_cached(q, k, v, context, cache, options)

    def rotated(
        self, x: Float[Array, "B T width"], context: Context
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Queries and keys as they meet in the product, and values; a remap has no such single form."""
        assert self.mixer.remap is None
        q, k, v = self.project(x)
        tables = _tables(self.mixer, context)
        return (q, k, v) if tables is None else (apply_rope(q, tables.queries[0]), apply_rope(k, tables.keys[0]), v)

    def _attend_cached(
        self, q: Array, k: Array, v: Array, context: Context, cache: AttentionCache, options: dict[str, Any]
    ) -> tuple[Array, AttentionCache]:
        """Append the tokens and attend over all that the cache holds, which is keys before or after rotation."""
        rope, remap, tables = self.mixer.rope, self.mixer.remap, _tables(self.mixer, context)
        mask = self.mixer.mask(q.shape[2], k.shape[2])
        if tables is None or rope is None:
            cache = cache.append(k, v, context.valid).prepare(q)
            return cache.attend(q, mask, return_lse=False, **options)[0], cache.settled()
        queries = tuple(apply_rope(q, t) for t in tables.queries)
        late = rotates_at_read(rope, remap)
        cache = cache.append(k if late else apply_rope(k, tables.keys[0]), v, context.valid)
        if remap is None and not late:
            cache = cache.prepare(queries[0])
            return cache.attend(queries[0], mask, return_lse=False, **options)[0], cache.settled()
        assert isinstance(cache, SlotCache)
        keys = (cache.k,)
        if late:
            slots = jnp.maximum(cache.positions(), 0)
            found = of_slots(rope, remap, context.frequencies[rope], q.shape[-1], slots, context.length)
            keys = tuple(apply_rope(cache.k, t) for t in found)
        if remap is not None:
            return remap.attend_cached(queries, keys, cache, **options), cache
        return cache.with_keys(keys[0]).attend(queries[0], mask, return_lse=False, **options)[0], cache


def attend(
    mixer: Attention,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    context: Context,
    **options: Any,
) -> Float[Array, "B T H D"]:
    """Self-attention over the tokens of the pass, rotated and masked as the record says; `options` are the op's."""
    options |= {"segment_ids": context.segment_ids}
    if (tables := _tables(mixer, context)) is not None:
        queries, keys = (tuple(apply_rope(x, t) for t in each) for x, each in ((q, tables.queries), (k, tables.keys)))
        if mixer.remap is not None:
            return mixer.remap.attend(queries, keys, v, **options)
        q, k = queries[0], keys[0]
    if mixer.pattern is not None:
        return mixer.pattern.attend(q, k, v, **options)
    return cast(Array, ops.attention(q, k, v, mixer.mask(q.shape[2], k.shape[2]), **options))


def _tables(mixer: Attention, context: Context) -> Tables | None:
    return None if mixer.rope is None else context.tables[mixer.rope, mixer.remap]
