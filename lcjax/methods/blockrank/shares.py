"""How much the end of a row of document blocks attends to each document, and the loss that trains it (BlockRank)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcjax.data.ranking import DOCUMENT, RELEVANT, SIGNAL
from lcjax.layers.attention import Context
from lcjax.layers.block import Block
from lcjax.layers.linear import precision
from lcjax.models.stack import apply_stacked


def read_documents(
    model: Any, batch: dict[str, Array], layer: int, size: int, remat: str = "none", scan: bool = False
) -> tuple[Float[Array, "B N"], Float[Array, "B T width"], Context]:
    """The documents' shares at `layer`, counted from 0, what that layer reads, and the context of the pass.

    Runs the layers before it and no other.
    """
    context = model.context(batch["positions"], 0, batch["segment_ids"], None)
    x = apply_stacked(list(model.layers)[:layer], model.embedded(batch["inputs"]), context, remat, scan)
    return document_shares(model.layers[layer], x, context, batch["roles"], size), x, context


def document_shares(
    layer: Block, x: Float[Array, "B T width"], context: Context, roles: Int[Array, "B T"], size: int
) -> Float[Array, "B N"]:
    """Share of each of the N documents in the attention of the two signal tokens to all documents; a row sums to 1.

    The softmax runs over the documents' tokens only; the mean is over heads and the two tokens.
    """
    q, k, _ = layer.mixer.rotated(layer.mixer_norm(x), context)
    first = jnp.argmax(roles == SIGNAL, axis=1)
    q = jnp.take_along_axis(q, (first[:, None] + jnp.arange(2))[:, :, None, None], axis=1)
    batch, _, _, dim = q.shape
    q = q.reshape(batch, 2, k.shape[2], -1, dim)
    mixer = layer.mixer.mixer
    scores = jnp.einsum("brkgd,bskd->bkgrs", q, k, precision=precision(k.dtype), preferred_element_type=jnp.float32)
    scores = scores * (dim**-0.5 if mixer.scale is None else mixer.scale)
    if mixer.soft_cap is not None:
        scores = mixer.soft_cap * jnp.tanh(scores / mixer.soft_cap)
    of_documents = ((roles == DOCUMENT) | (roles == RELEVANT))[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(of_documents, scores, -jnp.inf), axis=-1).mean((1, 2, 3))
    return by_document(weights, size).sum(-1)


def by_document(x: Array, size: int) -> Array:
    """`[B,T]` -> `[B,N,size]`: the blocks between the first and the last."""
    return x.reshape(x.shape[0], -1, size)[:, 1:-1]


def contrastive_loss(
    shares: Float[Array, "B N"], relevant: Bool[Array, "B N"], present: Bool[Array, "B N"], temperature: float
) -> Float[Array, " B"]:
    """InfoNCE with several positives: -log of the relevant documents' part of the softmax of shares / temperature."""
    logits = shares / temperature
    among = lambda chosen: jax.nn.logsumexp(jnp.where(chosen, logits, -jnp.inf), axis=1)
    return among(present) - among(relevant)
