"""Llama 2, 3, 3.1, 3.2 and SmolLM2."""

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
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a `LlamaConfig` dictionary."""
    fields = Fields(config, DEFAULTS)
    shared = shared_fields(fields)
    bias = fields.take("attention_bias", False)
    mlp_bias = fields.take("mlp_bias", False)
    pattern = (Attention(rope=rope_law(fields, shared["max_length"])),)
    fields.finish()
    return ModelSpec(**shared, pattern=pattern, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """The `LlamaConfig` dictionary of a spec."""
    rope = only({layer.rope for layer in attention_layers(spec)}, "rope")
    extra: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    extra |= {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    return extra | shared_config(spec) | rope_config(rope, spec.max_length)


FAMILY = Family("llama", ("llama",), spec_from_hf, spec_to_hf, LAYER_NAMES, ("llama",), gguf_pairs=True)
