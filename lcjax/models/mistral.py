"""Mistral: Llama with a sliding window in every layer (or none)."""

from collections.abc import Mapping
from typing import Any

from lcjax.models.family import (
    LAYER_NAMES,
    Family,
    Fields,
    attention_layers,
    only,
    rope_config,
    rope_law,
    shared_config,
    shared_fields,
)
from lcjax.models.spec import Attention, ModelSpec

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a `MistralConfig` dictionary; an absent `sliding_window` is 4096, null is none."""
    fields = Fields(config, DEFAULTS)
    shared = shared_fields(fields)
    window = fields.left.pop("sliding_window", 4096)
    pattern = (Attention(window=window, rope=rope_law(fields, shared["max_length"])),)
    fields.finish()
    return ModelSpec(**shared, pattern=pattern)


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """The `MistralConfig` dictionary of a spec."""
    layers = attention_layers(spec)
    rope, window = only({layer.rope for layer in layers}, "rope"), only({layer.window for layer in layers}, "window")
    extra = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return extra | shared_config(spec) | rope_config(rope, spec.max_length)


FAMILY = Family("mistral", ("mistral",), spec_from_hf, spec_to_hf, LAYER_NAMES, gguf_pairs=True)
