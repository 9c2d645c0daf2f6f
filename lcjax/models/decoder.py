"""The one decoder: training, prefill in chunks and decoding share its code."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lcjax.layers.adapter import attach
from lcjax.layers.attention import Context
from lcjax.layers.block import Block
from lcjax.layers.linear import Embed, Linear, wide_product
from lcjax.layers.norm import RMSNorm
from lcjax.layers.weight import Weight
from lcjax.models.spec import ModelSpec
from lcjax.models.stack import apply_stacked
from lcjax.parallel.balanced import order_of
from lcjax.parallel.rules import constrain
from lcjax.positions.by_factor import CLEX
from lcjax.positions.clex import Flow
from lcjax.positions.rotary import Positions
from lcjax.positions.tables import of_tokens

HIDDEN_AXES = ("batch", "length", "hidden")


class Decoder(nnx.Module):
    """A pre-norm decoder of `spec.num_layers` blocks.

    Split once, merge inside jit: `graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)`, then
    `nnx.merge(graphdef, params)(tokens)` in a `jax.jit` function of `params`.
    """

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        self.spec = spec
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        std = 0.02 if spec.embed_scale == 1 else 1 / spec.embed_scale
        self.embed = Embed(Weight((spec.vocab_size, spec.width), ("vocab", "embed"), std=std), **init)
        self.layers = nnx.List([Block(spec, mixer, **init) for mixer in spec.layers])
        self.norm = RMSNorm(spec.width, "embed", eps=spec.norm_eps, offset=spec.norm_offset, **init)
        head = Weight((spec.width, spec.vocab_size), ("embed", "vocab"), std=spec.width**-0.5)
        learnt = dict.fromkeys(law for law, _ in spec.laws if isinstance(law, CLEX))
        self.flows = nnx.List([Flow(law, spec.head_dim, rngs=rngs) for law in learnt])
        self.head = None if spec.tie_embeddings else Linear(head, **init)
        if spec.adapters is not None:
            attach(self, spec.adapters, **init)

    def context(
        self, positions: Positions, start: Any, segment_ids: Any, valid: Any, lengths: Int[Array, "B"] | None = None
    ) -> Context:
        """Frequencies once per law, tables once per law and remap. `start`: of the columns, 0 without caches.

        Laws that follow the length see each row's largest real position + 1, or `lengths` where that is more.
        """
        span = (*positions.shape[-2:],)
        reached = positions if valid is None else jnp.where(valid, positions, 0)
        reached = jnp.floor(jnp.max(reached, axis=(*range(reached.ndim - 2), -1))).astype(jnp.int32)
        columns = jnp.broadcast_to(start + jnp.arange(span[1], dtype=jnp.int32), span)
        cached = not isinstance(start, int)
        followed = reached + 1 if lengths is None else jnp.maximum(reached + 1, lengths)
        frequencies = {law: law.frequencies(self.spec.head_dim, followed) for law, _ in self.spec.laws}
        frequencies |= {flow.law: (flow.frequencies(followed), 1.0) for flow in self.flows}
        tables = {
            (law, remap): of_tokens(
                law,
                remap,
                frequencies[law],
                self.spec.head_dim,
                positions if remap is None else columns,
                reached + 1 if cached else span[1] // 2,
            )
            for law, remap in self.spec.laws
        }
        return Context(frequencies, tables, reached + 1, segment_ids, valid, positions)

    def context_of_rows(self, tokens: Int[Array, "B T"]) -> Context:
        """Of whole rows from position 0 on: what the layers share when they are run one by one."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return self.context(positions, 0, None, None)

    def embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T width"]:
        """What the first layer reads."""
        x = self.embed(tokens).astype(jnp.float32) * self.spec.embed_scale
        return constrain(x.astype(self.spec.compute_dtype), HIDDEN_AXES)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Positions | Int[Array, "A B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        caches: tuple[Any, ...] | None = None,
        valid: Bool[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        remat: str = "none",
        scan: bool = False,
    ) -> tuple[Float[Array, "B T width"], tuple[Any, ...] | None]:
        """Final normed states and the advanced caches (None without caches).

        positions: tokens since the document's start; default: column index, or the caches' lengths onwards. Fractions
          are taken (training with sampled positions), and one position per axis (M-RoPE). A remap has its own.
        segment_ids: document of each token, 0 is padding; not together with caches.
        caches, valid: one cache per layer; `valid` marks real tokens of a chunk whose rows are padded on the right.
        lengths: tokens that each row will have in the end, for laws that follow the length: chunks and single tokens
          then give what one pass over the whole does. None: these laws see what was read so far.
        remat: 'none', 'full', 'attention' (only its results are kept) or 'dots' (matrix products kept).
        scan: stack runs of equal layers and scan over them.
        """
        if caches is not None and (
            len(caches) != len(self.layers) or segment_ids is not None or scan or remat != "none"
        ):
            raise ValueError(
                f"hidden: caches must be one per layer ({len(self.layers)}, got {len(caches)}) "
                "and exclude segment_ids, scan and remat"
            )
        if valid is not None and caches is None:
            raise ValueError("hidden: valid is for cached chunks; mark padding by segment id 0 instead")
        start = 0 if caches is None else caches[0].length[:, None]
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if caches is None:
            return self._whole(tokens, positions, segment_ids, lengths, remat, scan), None
        context = self.context(positions, start, segment_ids, valid, lengths)
        x = self.embedded(tokens)
        advanced = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, cache = block(x, context, cache)
            advanced.append(cache)
        return self.norm(x), tuple(advanced)

    def _whole(self, tokens: Array, positions: Array, segment_ids: Any, lengths: Any, remat: str, scan: bool) -> Array:
        """Final normed states of whole rows."""
        spec, full = self.spec, positions.ndim == 2 and all(mixer.full for mixer in self.spec.layers)
        order = order_of(full, *tokens.shape, spec.num_heads, spec.num_kv_heads)
        tokens, positions, segment_ids = order.deal(tokens, positions, segment_ids)
        with order.held():
            context = self.context(positions, 0, segment_ids, None, lengths)
            x = self.norm(apply_stacked(list(self.layers), self.embedded(tokens), context, remat, scan))
        return order.restore(x)

    def unembedding(self) -> Float[Array, "width V"]:
        """The matrix that `logits` multiplies by, in the parameters' dtype (a transposed view of a tied table)."""
        return self.embed.table[...].T if self.head is None else self.head.kernel[...]

    def logits(
        self, x: Float[Array, "*batch width"], unembedding: Float[Array, "width V"] | None = None
    ) -> Float[Array, "*batch V"]:
        """float32 logits of final states, soft-capped where the spec says so; a caller may hold the unembedding."""
        y = wide_product(x, (self.unembedding() if unembedding is None else unembedding).astype(x.dtype))
        cap = self.spec.logit_soft_cap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Float[Array, "B T V"]:
        """Logits of every token; `options` as in `hidden`."""
        return self.logits(self.hidden(tokens, **options)[0])


def abstract(spec: ModelSpec, param_dtype: DTypeLike = jnp.float32) -> tuple[Any, nnx.State]:
    """(graphdef, params) with `jax.ShapeDtypeStruct` leaves: the model's shape without its memory."""
    model = nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0), param_dtype=param_dtype))
    return nnx.split(model, nnx.Param)
