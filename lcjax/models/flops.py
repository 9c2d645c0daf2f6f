"""How much arithmetic and how many parameters a spec stands for, by the convention printed beside utilisations."""

import math

import jax

from lcjax.models.decoder import abstract
from lcjax.models.recurrent import Linearized, RecurrentMixer
from lcjax.models.spec import Attention, Mixer, ModelSpec
from lcjax.parallel.work import visible_pairs

CONVENTION = (
    "2 FLOPs a multiply-add of matrix products and convolutions; causal attention counts the keys that a query sees; "
    "linear attention counts its recurrence; backward is 2 x forward; recomputation is not counted"
)


def param_count(spec: ModelSpec) -> int:
    """Number of parameters; a tied table counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(spec)[1]))


def flops_per_token(spec: ModelSpec, length: int, *, training: bool) -> float:
    """Mean FLOPs per token of a document of `length` tokens, logits included; see `CONVENTION`."""
    if length < 1:
        raise ValueError(f"flops_per_token: length must be positive, got {length}")
    forward = 2.0 * _multiplied_weights(spec) + sum(_mixing(spec, mixer, length) for mixer in spec.layers)
    return forward * (3 if training else 1)


def visible_keys(mixer: Attention, num_kv_heads: int, length: int) -> float:
    """Mean number of keys that a query of a document of `length` tokens sees, its own included, over the heads."""
    if mixer.pattern is not None:
        return visible_pairs(mixer.mask(num_kv_heads, num_kv_heads), num_kv_heads, length) / (num_kv_heads * length)
    if mixer.window is None or mixer.window + mixer.sink >= length:
        return (length + 1) / 2
    reach = mixer.window + mixer.sink
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def _multiplied_weights(spec: ModelSpec) -> int:
    """Weights that every token is multiplied with: matrices and taps; a tied embedding counts once, as unembedding."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(spec)[1]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        looked_up = name.startswith("embed/") and not spec.tie_embeddings
        added = leaf.ndim < 2 or any(part in name for part in ("/bias/", "/magnitude/"))
        total += 0 if added or looked_up else math.prod(leaf.shape)
    return total


def _mixing(spec: ModelSpec, mixer: Mixer, length: int) -> float:
    """FLOPs a token of one layer spends between tokens, forward: scores and values, or writing and reading a state."""
    if isinstance(mixer, Attention):
        return 4.0 * spec.num_heads * spec.head_dim * visible_keys(mixer, spec.num_kv_heads, length)
    assert isinstance(mixer, RecurrentMixer)
    memory = mixer.memory(spec)
    window = Attention(window=mixer.window) if isinstance(mixer, Linearized) and mixer.window else None
    return 4.0 * memory.heads * memory.keys * memory.values + (0.0 if window is None else _mixing(spec, window, length))
