"""How much the loss hangs on each block of attention, by first-order deletion (MoA, arXiv 2406.14909)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcjax.layers.linear import precision
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.stack import fold


def deletion_effects(
    attention: Float[Array, "*rows S"], gradient: Float[Array, "*rows S"], alone: Bool[Array, "*#rows 1"]
) -> Float[Array, "*rows S"]:
    """Change of the loss, to first order, when an entry is deleted and its row renormalised to a sum of 1.

    E_ij = A_ij / (1 - A_ij) (sum_n g_in A_in - g_ij), with g the gradient of the loss with respect to A; exact for a
    loss that is linear in A. Where a row has one entry (`alone`), deleting it leaves nothing: -g_ij A_ij.
    """
    rest = jnp.maximum(1 - attention, 8 * jnp.finfo(attention.dtype).eps)
    mean = jnp.sum(gradient * attention, axis=-1, keepdims=True)
    return jnp.where(alone, -gradient * attention, attention / rest * (mean - gradient))


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
        effects = deletion_effects(attention, jnp.where(seen, of_attention, 0.0), (rows == 0)[:, None])
        summed = jnp.abs(effects).reshape(batch, heads, block, count, block).sum((2, 4))
        return summed

    found = jax.lax.map(one, (jnp.arange(count), cut(q), cut(gradient)))  # [n,B,H,n]
    return jnp.moveaxis(found, 0, 2)


def check_full_attention(spec: ModelSpec) -> None:
    """Raise ValueError for a layer that is not plain full softmax attention."""
    for i, mixer in enumerate(spec.layers):
        if mixer != Attention(rope=getattr(mixer, "rope", None), scale=getattr(mixer, "scale", None)):
            raise ValueError(f"MoA: layer {i} is {mixer}; a plan needs full softmax attention in every layer")


def profile(
    model: Any, tokens: Int[Array, "B T"], answered: Float[Array, "B A"], block: int
) -> Float[Array, "L K n n"]:
    """Influence `[L,K,n,n]` on the mean loss of the last A tokens, where `answered` is 1.

    Mean over rows, maximum over the query heads of a KV head.
    One layer's activations are alive at a time, beside every layer's input. Raises ValueError for a layer that is not
    full softmax attention, and for a length that is no multiple of the block.
    """
    length, width = tokens.shape[1], answered.shape[1]
    if length % block:
        raise ValueError(f"MoA: a profile of {length} tokens does not divide into blocks of {block}")
    check_full_attention(model.spec)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    context = model.context(positions, 0, None, None)
    parts = [nnx.split(layer) for layer in model.layers]
    kinds, states = [kind for kind, _ in parts], [state for _, state in parts]
    forward = lambda kind, state, x: (nnx.merge(kind, state)(x, context)[0], x)
    x, inputs = fold(kinds, states, forward, model.embedded(tokens), scan=True)

    def loss(x: Float[Array, "B T width"]) -> Float[Array, ""]:
        logits = model.logits(model.norm(x[:, -width - 1 : -1]))
        picked = jnp.take_along_axis(logits, tokens[:, -width:, None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.sum(jnp.sum(answered * nll, axis=1) / jnp.maximum(jnp.sum(answered, axis=1), 1))

    def backward(kind: Any, held: tuple[Any, Array], gradient: Array) -> tuple[Array, Array]:
        layer = nnx.merge(kind, held[0])
        attended, through_attention = jax.vjp(lambda x: layer.mixer.mix(layer.mixer_norm(x), context)[0], held[1])
        rest = lambda x, o: layer.after_mixer(x, layer.mixer.out(o))
        direct, of_heads = jax.vjp(rest, held[1], attended)[1](gradient)
        q, k, v = layer.mixer.rotated(layer.mixer_norm(held[1]), context)
        scale = q.shape[-1] ** -0.5 if layer.mixer.mixer.scale is None else layer.mixer.mixer.scale
        return direct + through_attention(of_heads)[0], block_influence(q, k, v, of_heads, scale=scale, block=block)

    held = list(zip(states, inputs, strict=True))[::-1]
    found = fold(kinds[::-1], held, backward, jax.grad(loss)(x), scan=True)[1][::-1]
    mean = jnp.stack(found).mean(1)  # [L,H,n,n]
    layers, heads, count, _ = mean.shape
    kv_heads = model.spec.num_kv_heads
    return mean.reshape(layers, kv_heads, heads // kv_heads, count, count).max(2)
