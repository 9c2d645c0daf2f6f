"""GGUF metadata to a HF-style config, so that a family is described once."""

from typing import Any

import numpy as np

from lcjax.checkpoint.source import TensorSource

INERT = ("general.", "tokenizer.", "quantize.", "split.")
FIELDS = {
    # GGUF key below <architecture>.: HF field
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Layer counts of the two sizes whose scores are scaled by width / heads instead of the head dimension.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def _plain(value: Any) -> Any:
    """A float32 that GGUF widened, as its shortest decimal: 9.999999747e-06 was 1e-5."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(keys: dict[str, Any], source: TensorSource, context: int) -> dict[str, Any] | None:
    """The `rope_scaling` dictionary of the `rope.scaling.*` keys, or of per-pair divisors stored as a tensor."""
    kind, factor = keys.pop("rope.scaling.type", "none"), keys.pop("rope.scaling.factor", None)
    original = keys.pop("rope.scaling.original_context_length", None)
    attention = keys.pop("rope.scaling.attn_factor", None)
    keys.pop("rope.scaling.finetuned", None)
    if "rope_freqs.weight" in source.names():
        divisors = source.read("rope_freqs.weight").tolist()
        lists = {"short_factor": divisors, "long_factor": divisors, "original_max_position_embeddings": context}
        return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0} | lists
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"GGUF rope scaling type {kind!r} is not supported; known: none, linear, yarn")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {"original_max_position_embeddings": original or context, "attention_factor": attention}
    return {key: value for key, value in scaling.items() if value is not None}


def config_from_gguf(source: TensorSource) -> dict[str, Any]:
    """The HF-style config of an opened GGUF file; an unknown key of the architecture is refused by name."""
    architecture = source.metadata.get("general.architecture")
    if architecture is None:
        raise ValueError("the GGUF metadata lack 'general.architecture'")
    prefix = f"{architecture}."
    keys = {k.removeprefix(prefix): _plain(v) for k, v in source.metadata.items() if not k.startswith(INERT)}
    config: dict[str, Any] = {"model_type": {"gemma3": "gemma3_text"}.get(architecture, architecture)}
    scaling = _scaling(keys, source, keys.get("context_length", 0))
    config |= {field: keys.pop(key) for key, field in FIELDS.items() if key in keys}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ValueError(f"the GGUF metadata lack {prefix}attention.head_count or {prefix}embedding_length")
    head_dim = config.setdefault("head_dim", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.pop(key, head_dim) != head_dim:
            raise ValueError(f"GGUF key {prefix}{key} must equal the head dimension {head_dim}")
    if keys:
        raise ValueError(f"the GGUF metadata hold {prefix}{next(iter(keys))}, which is not supported")
    config.setdefault("vocab_size", source.shape("token_embd.weight")[0])
    names = set(source.names())
    config["tie_word_embeddings"] = "output.weight" not in names
    if scaling is not None:
        config["rope_scaling"] = scaling
    if architecture in SCALED_BY_WIDTH:
        by_width = config["num_hidden_layers"] == SCALED_BY_WIDTH[architecture]
        config["query_pre_attn_scalar"] = width // heads if by_width else head_dim
    if architecture == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}
        if "sliding_window" in config:
            config["model_type"] = "mistral"
    return config
