"""How much a model's answers hang on each block of attention, by first-order deletion (MoA, arXiv 2406.14909)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcjax.layers.linear import precision
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.stack import fold, parts
from lcjax.parallel import ops
from pallas_kernels.masks import Causal, Sink, Window, per_head


def deletion_effects(attention: Float[Array, "*rows S"], gradient: Float[Array, "*rows S"]) -> Float[Array, "*rows S"]:
    """Change of the loss, to first order, when an entry is deleted and its row renormalised to a sum of 1.

    E_ij = A_ij / (1 - A_ij) (sum_n g_in A_in - g_ij), with g the gradient of the loss with respect to A; exact for a
    loss that is linear in A. Deleting the only entry of a row leaves nothing: -g_ij A_ij.
    """
    # The largest entry may be so near 1 that both differences cancel: its own come from sums over the others.
    largest = jnp.arange(attention.shape[-1]) == jnp.argmax(attention, axis=-1, keepdims=True)
    others = jnp.where(largest, 0.0, attention)
    rest = jnp.where(largest, jnp.sum(others, axis=-1, keepdims=True), 1 - attention)
    without = jnp.sum(others * gradient, axis=-1, keepdims=True) - rest * gradient
    whole = jnp.sum(attention * gradient, axis=-1, keepdims=True) - gradient
    effect = attention / jnp.where(rest > 0, rest, 1) * jnp.where(largest, without, whole)
    return jnp.where(rest > 0, effect, -gradient * attention)


def block_influence(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    gradient: Float[Array, "B T H Dv"],
    *,
    scale: float,
    block: int,
) -> Float[Array, "B H n n"]:
    """|E| of causal attention summed over blocks of `block` queries (third axis) and `block` keys.

    gradient: of the loss with respect to the heads' outputs, from which that of A_ij is gradient_i . v_j. The weights
    of one block of queries exist at a time: memory B H T block.
    """
    batch, length, heads, _ = q.shape
    kv_heads, count = k.shape[2], length // block
    exact: Any = {"precision": precision(k.dtype), "preferred_element_type": jnp.float32}
    columns = jnp.arange(length)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, count, block, kv_heads, heads // kv_heads, -1), 1, 0)

    def one(part: tuple[Array, Array, Array]) -> Float[Array, "B H n"]:
        index, queries, gradients = part
        rows = index * block + jnp.arange(block)
        seen = columns <= rows[:, None]
        scores = jnp.einsum("btkgd,bskd->bkgts", queries, k, **exact) * scale
        attention = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        of_attention = jnp.einsum("btkgd,bskd->bkgts", gradients.astype(v.dtype), v, **exact)
        effects = deletion_effects(attention, jnp.where(seen, of_attention, 0.0))
        return jnp.abs(effects).reshape(batch, heads, block, count, block).sum((2, 4))

    found = jax.lax.map(one, (jnp.arange(count), cut(q), cut(gradient)))  # [n,B,H,n]
    return jnp.moveaxis(found, 0, 2)


def check_full_attention(spec: ModelSpec) -> None:
    """Raise ValueError for a layer that is not plain full softmax attention."""
    for i, mixer in enumerate(spec.layers):
        if mixer != Attention(rope=getattr(mixer, "rope", None), scale=getattr(mixer, "scale", None)):
            raise ValueError(f"MoA: layer {i} is {mixer}; a plan needs full softmax attention in every layer")


def response_nll(
    model: Any, x: Float[Array, "B T width"], tokens: Int[Array, "B T"], answered: Float[Array, "B A"]
) -> Float[Array, " B"]:
    """Mean loss of the last A tokens where `answered` is 1, of each row; x is what the last layer gives."""
    width = answered.shape[1]
    logits = model.logits(model.norm(x[:, -width - 1 : -1]))
    picked = jnp.take_along_axis(logits, tokens[:, -width:, None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(answered * nll, axis=1) / jnp.maximum(jnp.sum(answered, axis=1), 1)


def profile(
    model: Any, tokens: Int[Array, "B T"], answered: Float[Array, "B A"], block: int
) -> Float[Array, "L K n n"]:
    """Influence of each block on `response_nll`: mean over rows, maximum over the query heads of a KV head.

    One layer's activations are alive at a time, beside every layer's input. Raises ValueError for a layer that is not
    full softmax attention, and for a length that is no multiple of the block.
    """
    if tokens.shape[1] % block:
        raise ValueError(f"MoA: a profile of {tokens.shape[1]} tokens does not divide into blocks of {block}")
    check_full_attention(model.spec)
    context = model.context_of_rows(tokens)
    kinds, states = parts(list(model.layers))
    forward = lambda kind, state, x: (nnx.merge(kind, state)(x, context)[0], x)
    x, inputs = fold(kinds, states, forward, model.embedded(tokens), scan=True)

    def backward(kind: Any, held: tuple[Any, Array], gradient: Array) -> tuple[Array, Array]:
        layer = nnx.merge(kind, held[0])
        attended, through_attention = jax.vjp(lambda x: layer.mixer.mix(layer.mixer_norm(x), context)[0], held[1])
        rest = lambda x, o: layer.after_mixer(x, layer.mixer.out(o))
        direct, of_heads = jax.vjp(rest, held[1], attended)[1](gradient)
        q, k, v = layer.mixer.rotated(layer.mixer_norm(held[1]), context)
        scale = q.shape[-1] ** -0.5 if layer.mixer.mixer.scale is None else layer.mixer.mixer.scale
        return direct + through_attention(of_heads)[0], block_influence(q, k, v, of_heads, scale=scale, block=block)

    gradient = jax.grad(lambda x: jnp.sum(response_nll(model, x, tokens, answered)))(x)
    held = list(zip(states, inputs, strict=True))
    found = fold(kinds[::-1], held[::-1], backward, gradient, scan=True)[1][::-1]
    mean = jnp.stack(found).mean(1)  # [L,H,n,n]
    groups = mean.reshape(len(kinds), model.spec.num_kv_heads, -1, *mean.shape[2:])
    return groups.max(2)


def loss_under(
    model: Any, tokens: Int[Array, "B T"], answered: Float[Array, "B A"], windows: Int[Array, "L K"], sink: int
) -> Float[Array, " B"]:
    """`response_nll` when KV head h of layer l reads its last windows[l, h] tokens and the first `sink`.

    Windows are arrays, so that one program tries every plan.
    """
    check_full_attention(model.spec)
    context = model.context_of_rows(tokens)

    def body(kind: Any, held: tuple[Any, Array], x: Array) -> tuple[Array, None]:
        layer, windows = nnx.merge(kind, held[0]), held[1]
        q, k, v = layer.mixer.rotated(layer.mixer_norm(x), context)
        masks = [Causal() & (Sink(sink) | Window(window)) for window in windows]
        of_head = [h * len(masks) // q.shape[2] for h in range(q.shape[2])]
        o = ops.attention(q, k, v, per_head(masks, of_head), scale=layer.mixer.mixer.scale)
        return layer.after_mixer(x, layer.mixer.out(o)), None

    kinds, states = parts(list(model.layers))
    x, _ = fold(kinds, list(zip(states, windows, strict=True)), body, model.embedded(tokens), scan=True)
    return response_nll(model, x, tokens, answered)
