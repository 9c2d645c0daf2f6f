"""How much arithmetic and how many parameters a spec stands for.

Convention: a multiply-add is two FLOPs; only matrix products count (no norm, softmax, rotary or embedding look-up);
causal attention counts the keys that a query may see (half the square for full attention); linear attention counts
its recurrent form (write and read of the state), whatever chunking does; the backward pass is twice the forward; work
redone by rematerialisation is not counted.
"""

import math

import jax

from lcjax.models.decoder import abstract
from lcjax.models.spec import Attention, Mixer, ModelSpec


def param_count(spec: ModelSpec) -> int:
    """Number of parameters; a tied table counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(spec)[1]))


def visible_keys(mixer: Attention, length: int) -> float:
    """Mean number of keys that a query of a document of `length` tokens sees."""
    if mixer.window is None or mixer.window + mixer.sink >= length:
        return (length + 1) / 2
    reach = mixer.window + mixer.sink
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def _mixing(spec: ModelSpec, mixer: Mixer, length: int) -> float:
    """FLOPs a token of one layer spends between tokens, forward."""
    if isinstance(mixer, Attention):
        return 4 * spec.num_heads * spec.head_dim * visible_keys(mixer, length)
    heads, keys, values = mixer.sizes(spec)
    convolved = mixer.conv_width * heads * (2 * keys + values)
    return 4.0 * heads * keys * values + 2 * convolved


def _projections(spec: ModelSpec, mixer: Mixer) -> int:
    """Weights of one layer that a token is multiplied by."""
    feed_forward = 3 * spec.width * spec.mlp_width
    if isinstance(mixer, Attention):
        return feed_forward + 2 * spec.width * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    heads, keys, values = mixer.sizes(spec)
    decay = {"none": 0, "scalar": spec.width * heads, "vector": mixer.decay_rank * (spec.width + heads * keys)}
    streams = heads * (2 * keys + values * (3 if mixer.output_gate else 2))
    return feed_forward + spec.width * streams + decay[mixer.decay]


def flops_per_token(spec: ModelSpec, length: int, training: bool) -> float:
    """Mean FLOPs per token of a document of `length` tokens, logits included; see the module's convention."""
    if length < 1:
        raise ValueError(f"flops_per_token: length must be positive, got {length}")
    forward = 2.0 * spec.width * spec.vocab_size
    for mixer in spec.layers:
        forward += 2 * _projections(spec, mixer) + _mixing(spec, mixer, length)
    return forward * (3 if training else 1)
