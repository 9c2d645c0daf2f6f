"""FLOPs of a decoder, by one convention that is printed wherever a utilisation is."""

import math
from typing import Any

import jax

from lcjax.models.decoder import abstract
from lcjax.models.spec import Attention, GatedLinear, ModelSpec

CONVENTION = "2 per multiply-add, backward = 2 x forward, visible keys only (causal: half), recomputation not counted"


def flops_per_token(spec: ModelSpec, length: int, *, training: bool) -> float:
    """Mean FLOPs of one token in a sequence of `length`: weight matrices, attention over visible keys, recurrences.

    Norms, activations, softmax and the embedding look-up are left out. A gated linear layer is counted as its
    recurrence (write and read a Dk x Dv state per head), not as what the chunked form spends.
    """
    forward = 2.0 * _matrix_weights(spec) + sum(_mixing(spec, mixer, length) for mixer in spec.layers)
    return forward * (3 if training else 1)


def _matrix_weights(spec: ModelSpec) -> int:
    """Weights that every token is multiplied with; a tied embedding counts once, as the unembedding."""

    def one(path: Any, leaf: Any) -> int:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        looked_up = name.startswith("embed/") and not spec.tie_embeddings
        return 0 if leaf.ndim < 2 or looked_up else math.prod(leaf.shape)

    return sum(one(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(spec)[1]))


def _mixing(spec: ModelSpec, mixer: Attention | GatedLinear, length: int) -> float:
    if isinstance(mixer, GatedLinear):
        heads, key_dim, value_dim = mixer.sizes(spec)
        return 4.0 * heads * key_dim * value_dim
    reach = length if mixer.window is None else min(length, mixer.window + mixer.sink)
    # Token i sees min(i, reach) keys: a triangle up to `reach`, a rectangle after it.
    visible = reach * (length - reach / 2) / length
    return 4.0 * spec.num_heads * spec.head_dim * visible
