"""Qwen 2, 2.5 (q, k, v biases) and Qwen 3 (q and k norms), with an optional window in the upper layers."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lcjax.models.family import (
    LAYER_NAMES,
    Family,
    Fields,
    attention_layers,
    only,
    period,
    rope_config,
    rope_law,
    shared_config,
    shared_fields,
)
from lcjax.models.spec import Attention, ModelSpec

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_pattern(types: list[str], full: Attention, window: int | None) -> tuple[Attention, ...]:
    """The pattern of HF `layer_types`; `sliding_attention` is `full` with the window."""
    unknown = [kind for kind in types if kind not in LAYER_TYPES]
    if unknown:
        raise ValueError(f"layer type {unknown[0]!r} is not supported; known: {', '.join(LAYER_TYPES)}")
    sliding = replace(full, window=window)
    return period(tuple(sliding if kind == "sliding_attention" else full for kind in types))


def _spec_from_hf(version: int, config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a `Qwen2Config` or `Qwen3Config` dictionary."""
    fields = Fields(config, DEFAULTS | ({"head_dim": 128} if version == 3 else {}))
    shared = shared_fields(fields)
    window = fields.left.pop("sliding_window", 4096)
    window = window if fields.take("use_sliding_window", False) else None
    first = fields.take("max_window_layers", 28)
    types = fields.take("layer_types") or [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in range(shared["num_layers"])
    ]
    bias = fields.take("attention_bias", False) if version == 3 else False
    full = Attention(rope=rope_law(fields, shared["max_length"]))
    fields.finish()
    return ModelSpec(
        **shared,
        pattern=layer_pattern(types, full, window),
        qkv_bias=bias or version == 2,
        out_bias=bias,
        qk_norm=version == 3,
    )


def _spec_to_hf(version: int, spec: ModelSpec) -> dict[str, Any]:
    """The `Qwen2Config` or `Qwen3Config` dictionary of a spec."""
    layers = attention_layers(spec)
    windows = {layer.window for layer in layers} - {None}
    window = only(windows, "window") if windows else None
    extra: dict[str, Any] = {"model_type": f"qwen{version}", "architectures": [f"Qwen{version}ForCausalLM"]}
    extra |= {"use_sliding_window": window is not None, "sliding_window": window}
    extra["layer_types"] = [LAYER_TYPES[layer.window is not None] for layer in layers]
    if version == 3:
        extra["attention_bias"] = spec.qkv_bias
    rope = only({layer.rope for layer in layers}, "rope")
    return extra | shared_config(spec) | rope_config(rope, spec.max_length)


def _family(version: int) -> Family:
    name = f"qwen{version}"
    read, write = functools.partial(_spec_from_hf, version), functools.partial(_spec_to_hf, version)
    return Family(name, (name,), read, write, LAYER_NAMES, (name,))


QWEN2, QWEN3 = _family(2), _family(3)
