"""Gemma 2 (soft caps, alternating window) and the text side of Gemma 3 (q, k norms, five local layers to a global)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lcjax.models.family import (
    SANDWICH_NAMES,
    Family,
    Fields,
    attention_layers,
    number,
    only,
    rope_config,
    rope_law,
    shared_config,
    shared_fields,
)
from lcjax.models.qwen import LAYER_TYPES, layer_pattern
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions.from_hf import law_from_hf

GEMMA2_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
GEMMA3_DEFAULTS = GEMMA2_DEFAULTS | {"vocab_size": 262_208, "max_position_embeddings": 131_072}


def _shared(fields: Fields) -> dict[str, Any]:
    shared = shared_fields(fields)
    quirks = {"norm_offset": 1.0, "post_norm": True, "embed_scale": shared["width"] ** 0.5}
    bias = fields.take("attention_bias", False)
    return shared | quirks | {"qkv_bias": bias, "out_bias": bias}


def _spec_from_gemma2(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a `Gemma2Config` dictionary; absent soft caps are 50 and 30, null ones are none."""
    fields = Fields(config, GEMMA2_DEFAULTS)
    shared = _shared(fields)
    types = fields.take("layer_types") or [LAYER_TYPES[(i + 1) % 2] for i in range(shared["num_layers"])]
    full = Attention(
        rope=rope_law(fields, shared["max_length"]),
        scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=number(fields.left.pop("attn_logit_softcapping", 50.0)),
    )
    cap, window = number(fields.left.pop("final_logit_softcapping", 30.0)), fields.take("sliding_window", 4096)
    fields.finish()
    return ModelSpec(**shared, pattern=layer_pattern(types, full, window), logit_soft_cap=cap)


def _gemma3_laws(fields: Fields, max_length: int) -> tuple[Any, Any]:
    """(global, local) laws: 4.x has rope_theta, rope_scaling, rope_local_base_freq; 5.x one dictionary a layer type."""
    nested = fields.take("rope_parameters") or {}
    unknown = sorted(set(nested) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f"rope_parameters of Gemma 3 hold {unknown[0]!r}; its keys are {', '.join(LAYER_TYPES)}")
    scaling, theta = fields.take("rope_scaling"), float(fields.take("rope_theta", 1_000_000.0))
    local_theta = float(fields.take("rope_local_base_freq", 10_000.0))
    full = dict(nested.get("full_attention") or {}) | dict(scaling or {})
    return (
        law_from_hf(full, theta=theta, max_length=max_length),
        law_from_hf(nested.get("sliding_attention"), theta=local_theta, max_length=max_length),
    )


def _spec_from_gemma3(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a `Gemma3TextConfig` dictionary, or of the `text_config` inside a `Gemma3Config`."""
    fields = Fields({"model_type": "gemma3_text"} | dict(config.get("text_config", config)), GEMMA3_DEFAULTS)
    shared = _shared(fields)
    every = fields.take("sliding_window_pattern") or fields.take("_sliding_window_pattern") or 6
    fields.left.pop("_sliding_window_pattern", None)
    types = fields.take("layer_types") or [LAYER_TYPES[(i + 1) % every != 0] for i in range(shared["num_layers"])]
    rope, local_rope = _gemma3_laws(fields, shared["max_length"])
    full = Attention(
        rope=rope,
        scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=number(fields.take("attn_logit_softcapping")),
    )
    cap, window = number(fields.take("final_logit_softcapping")), fields.take("sliding_window", 4096)
    fields.finish()
    pattern = tuple(
        mixer if mixer.window is None else replace(mixer, rope=local_rope)
        for mixer in layer_pattern(types, full, window)
    )
    return ModelSpec(**shared, pattern=pattern, logit_soft_cap=cap, qk_norm=True)


def _shared_config(spec: ModelSpec, version: int) -> dict[str, Any]:
    layers = attention_layers(spec)
    windows = {layer.window for layer in layers} - {None}
    config = shared_config(spec)
    config["hidden_activation"] = config.pop("hidden_act")
    scale = only({layer.scale or spec.head_dim**-0.5 for layer in layers}, "scale")
    exact = round(scale**-2)
    return config | {
        "model_type": "gemma2" if version == 2 else "gemma3_text",
        "architectures": [f"Gemma{version}ForCausalLM"],
        "attention_bias": spec.qkv_bias,
        "layer_types": [LAYER_TYPES[layer.window is not None] for layer in layers],
        "sliding_window": only(windows, "window") if windows else 4096,
        "query_pre_attn_scalar": exact if exact**-0.5 == scale else scale**-2,
        "attn_logit_softcapping": only({layer.soft_cap for layer in layers}, "soft cap"),
        "final_logit_softcapping": spec.logit_soft_cap,
    }


def _spec_to_gemma2(spec: ModelSpec) -> dict[str, Any]:
    """The `Gemma2Config` dictionary of a spec."""
    rope = only({layer.rope for layer in attention_layers(spec)}, "rope")
    return _shared_config(spec, 2) | rope_config(rope, spec.max_length)


def _spec_to_gemma3(spec: ModelSpec) -> dict[str, Any]:
    """The `Gemma3TextConfig` dictionary of a spec."""
    layers = attention_layers(spec)
    laws = {layer.rope for layer in layers if layer.window is None}
    local_laws = {layer.rope for layer in layers if layer.window is not None}
    config = _shared_config(spec, 3) | rope_config(only(laws, "rope of full layers"), spec.max_length)
    if local_laws:
        local = rope_config(only(local_laws, "rope of window layers"), spec.max_length)
        if local["rope_scaling"] is not None or "partial_rotary_factor" in local:
            raise ValueError("Gemma 3's window layers rotate plainly")
        config["rope_local_base_freq"] = local["rope_theta"]
    return config


GEMMA2 = Family("gemma2", ("gemma2",), _spec_from_gemma2, _spec_to_gemma2, SANDWICH_NAMES, ("gemma2",))
GEMMA3 = Family("gemma3", ("gemma3_text", "gemma3"), _spec_from_gemma3, _spec_to_gemma3, SANDWICH_NAMES, ("gemma3",))
