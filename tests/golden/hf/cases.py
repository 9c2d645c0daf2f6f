"""The tiny models of the parity test, spelled the way HF transformers 4.x writes config.json."""

TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SHORT, LONG = 24, 80  # below and beyond the trained length

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
YARN_MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False}
YARN_FACTOR = YARN | {"attention_factor": 1.3}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 32,
}
SCALINGS = {
    "default": None,
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "yarn_mscale": YARN_MSCALE,
    "yarn_factor": YARN_FACTOR,
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}


def _case(model_type: str, **fields):
    return TINY | {"model_type": model_type} | fields


def _scaled(model_type: str, names: tuple[str, ...], **fields):
    return {f"{model_type}_{name}": _case(model_type, rope_scaling=SCALINGS[name], **fields) for name in names}


CASES = {
    **_scaled("llama", tuple(SCALINGS), rope_theta=10000.0, hidden_act="silu"),
    "llama_biases_tied": _case("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    **_scaled("mistral", ("default", "dynamic", "yarn"), rope_theta=1e5, sliding_window=8),
    "mistral_no_window": _case("mistral", rope_theta=1e6, sliding_window=None),
    **_scaled("qwen2", ("default", "linear", "yarn"), rope_theta=1e6),
    "qwen2_window": _case("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    **_scaled("qwen3", ("default", "dynamic", "yarn"), rope_theta=1e6),
    "qwen3_window_bias": _case(
        "qwen3", attention_bias=True, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    **_scaled(
        "gemma2", ("default", "linear", "dynamic", "yarn"), sliding_window=8, query_pre_attn_scalar=24,
        hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=3.0, final_logit_softcapping=5.0,
        tie_word_embeddings=True,
    ),
    "gemma2_no_caps": _case(
        "gemma2", sliding_window=8, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True
    ),
    **_scaled(
        "gemma3_text", ("default", "linear", "dynamic", "yarn", "llama3"), sliding_window=8, num_hidden_layers=3,
        sliding_window_pattern=3, query_pre_attn_scalar=24, rope_theta=1e6, rope_local_base_freq=1e4,
        tie_word_embeddings=True,
    ),
}  # fmt: skip

# (rope parameters, head dimension, max_position_embeddings, running length): frequency vectors straight from HF.
SMOL = {"rope_theta": 1e5}
FREQUENCIES = [
    ({"rope_type": "linear", "factor": 4.0} | SMOL, 64, 8192, None),
    ({"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5} | SMOL, 64, 8192, None),
    ({"rope_type": "dynamic", "factor": 4.0} | SMOL, 64, 8192, 32768),
    ({"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.25} | SMOL, 128, 8192, 32768),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192} | SMOL, 64, 32768, None),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "truncate": False} | SMOL,
        64,
        32768,
        None,
    ),
    (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.5}
        | {"mscale": 1.0, "mscale_all_dim": 0.8, "rope_theta": 1e4},
        128,
        163840,
        None,
    ),
    (LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}, 128, 131072, None),
    ({"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.25, "rope_theta": 1e6}, 256, 8192, None),
    (LONGROPE | {"original_max_position_embeddings": 8192, "rope_theta": 1e4}, 16, 32768, 8192),
    (LONGROPE | {"original_max_position_embeddings": 8192, "rope_theta": 1e4}, 16, 32768, 8193),
]
