"""What DPE (Lu et al., arXiv 2504.18857) measures of a model: which pairs carry its scores, and what it still answers
when far keys turn by other positions. Factors and pairs are arrays, so that one program tries them all."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcjax.methods.dpe.plan import remapped, takes_remap
from lcjax.models.stack import fold, parts
from lcjax.positions.dpe import Trial, pair_contributions
from lcjax.positions.rotary import apply_rope
from lcjax.positions.tables import Tables, of_tokens


class Numbers(NamedTuple):
    """A factor of each pair, and the compressed pairs of each head of each layer."""

    factor: Int[Array, " n"]
    chosen: Bool[Array, "L H n"]


def contributions(model: Any, tokens: Int[Array, "B T"]) -> Float[Array, "L H n"]:
    """`pair_contributions` of each layer; zeros where a layer is not full attention with rotary positions."""
    pairs = remapped(model.spec)[1]
    context = model.context_of_rows(tokens)
    none = jnp.zeros((model.spec.num_heads, pairs))

    def body(kind: Any, state: Any, x: Array) -> tuple[Array, Array]:
        layer = nnx.merge(kind, state)
        found = none
        if takes_remap(layer.mixer.mixer):
            q, k, _ = layer.mixer.project(layer.mixer_norm(x))
            found = pair_contributions(q[..., : 2 * pairs], k[..., : 2 * pairs])
        return layer(x, context)[0], found

    kinds, states = parts(list(model.layers))
    return jnp.stack(fold(kinds, states, body, model.embedded(tokens), scan=True)[1])


def logits(
    model: Any, tokens: Int[Array, "B T"], places: Int[Array, "B A"], numbers: Numbers, window: int
) -> Float[Array, "B A V"]:
    """Logits of the token after each of `places`, under DPE with these numbers."""
    spec, context = model.spec, model.context_of_rows(tokens)
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    trial = Trial(window=window, factor=numbers.factor)
    make = lambda rope: of_tokens(rope, trial, context.frequencies[rope], spec.head_dim, columns, 0)
    tables: dict[Any, Tables] = {rope: make(rope) for rope in dict.fromkeys(remapped(spec)[0].values())}

    def body(kind: Any, held: tuple[Any, Array], x: Array) -> tuple[Array, None]:
        layer, chosen = nnx.merge(kind, held[0]), held[1]
        if not takes_remap(layer.mixer.mixer):
            return layer(x, context)[0], None
        q, k, v = layer.mixer.project(layer.mixer_norm(x))
        mine = tables[layer.mixer.mixer.rope]
        queries, keys = (tuple(apply_rope(y, t) for t in each) for y, each in ((q, mine.queries), (k, mine.keys)))
        o = Trial(window=window, factor=numbers.factor, mask=chosen).attend(queries, keys, v, **layer.mixer.options)
        return layer.after_mixer(x, layer.mixer.out(o)), None

    kinds, states = parts(list(model.layers))
    x, _ = fold(kinds, list(zip(states, numbers.chosen, strict=True)), body, model.embedded(tokens), scan=True)
    return model.logits(model.norm(jnp.take_along_axis(x, places[..., None], axis=1)))
