"""What families of checkpoints share: reading a HF config field by field, and the tables of weight names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lcjax.models.spec import Attention, Mixer, ModelSpec
from lcjax.positions.from_hf import law_from_hf, law_to_hf
from lcjax.positions.laws import Rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields that don't change what the decoder computes.
INERT = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "cache_implementation"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "return_dict", "problem_type"),
    *("output_attentions", "output_hidden_states", "id2label", "label2id", "is_llama_config", "transformers.js_config"),
}
# Fields that would change it, each with the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "chunk_size_feed_forward": (0, None),
    "is_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "add_cross_attention": (False, None),
}


class Fields:
    """A HF config being consumed: every field is taken, known to be neutral, or refused by name."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.family = config.get("model_type", "?")
        self.defaults = defaults
        self.left = dict(config)

    def take(self, name: str, fallback: Any = None) -> Any:
        """Consume a field; absent or null gives the family's default, then `fallback`."""
        value = self.left.pop(name, None)
        if value is None:
            value = self.defaults.get(name)
        return fallback if value is None else value

    def need(self, name: str) -> Any:
        """Consume a field that must be there."""
        value = self.take(name)
        if value is None:
            raise ValueError(f"the {self.family} config lacks the field {name!r}")
        return value

    def finish(self) -> None:
        """Refuse what nobody consumed."""
        for name, value in self.left.items():
            if name in INERT:
                continue
            if name not in NEUTRAL:
                raise ValueError(f"the {self.family} config has the field {name!r} = {value!r}, which is not supported")
            if value not in NEUTRAL[name]:
                raise ValueError(
                    f"the {self.family} config has {name!r} = {value!r}; only {NEUTRAL[name][0]!r} is supported"
                )


def number(value: Any) -> float | None:
    """A JSON number (which may be an integer) as a float; null stays None."""
    return None if value is None else float(value)


def shared_fields(fields: Fields) -> dict[str, Any]:
    """The ModelSpec fields that every family spells the same way."""
    activation = fields.take("hidden_activation") or fields.need("hidden_act")
    fields.take("hidden_act")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    return {
        "name": fields.family,
        "vocab_size": fields.need("vocab_size"),
        "width": width,
        "mlp_width": fields.need("intermediate_size"),
        "num_layers": fields.need("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.take("num_key_value_heads", heads),
        "head_dim": fields.take("head_dim", width // heads),
        "max_length": fields.need("max_position_embeddings"),
        "norm_eps": float(fields.need("rms_norm_eps")),
        "tie_embeddings": fields.take("tie_word_embeddings"),
        "activation": ACTIVATIONS[activation],
    }


def rope_law(fields: Fields, max_length: int) -> Rope:
    """The one law of a family whose layers all rotate alike, from either spelling."""
    parameters, scaling = fields.take("rope_parameters"), fields.take("rope_scaling")
    if parameters and scaling:
        raise ValueError(f"the {fields.family} config has both rope_parameters and rope_scaling; keep one")
    return law_from_hf(
        parameters or scaling,
        theta=float(fields.take("rope_theta", 10_000.0)),
        max_length=max_length,
        original_length=fields.take("original_max_position_embeddings"),
        partial=float(fields.take("partial_rotary_factor", 1.0)),
    )


def shared_config(spec: ModelSpec) -> dict[str, Any]:
    """The HF fields that every family spells the same way."""
    hf_activation = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[spec.activation]
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_length,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "hidden_act": hf_activation,
    }


def rope_config(law: Rope | None, max_length: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` (read by 4.x and 5.x alike) of a law."""
    if law is None:
        raise ValueError("HF families have no layers without positions")
    parameters = law_to_hf(law, max_length=max_length)
    config: dict[str, Any] = {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": None}
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    if parameters["rope_type"] != "default":
        config["rope_scaling"] = parameters
    return config


def period[M: Mixer](layers: tuple[M, ...]) -> tuple[M, ...]:
    """The shortest pattern that, repeated, gives these layers."""
    for size in range(1, len(layers) + 1):
        if all(mixer == layers[i % size] for i, mixer in enumerate(layers)):
            return layers[:size]
    return layers


def attention_layers(spec: ModelSpec) -> tuple[Attention, ...]:
    """The layers, if all are softmax attention without learned sinks, sink tokens or patterns; else a ValueError."""
    for i, mixer in enumerate(spec.layers):
        plain = type(mixer) is Attention and mixer.pattern is None
        if not plain or mixer.sink or mixer.sink_logits:
            raise ValueError(f"layer {i} is {mixer}, which no HF family can express")
    return tuple(mixer for mixer in spec.layers if isinstance(mixer, Attention))


def only(values: set[Any], what: str) -> Any:
    """The single member of a set; ValueError when layers disagree."""
    if len(values) != 1:
        raise ValueError(f"the layers differ in {what} ({values}), which this family cannot express")
    return next(iter(values))


LAYER_NAMES = {
    # parameter below layers.<i>: (HF name below model.layers.<i>, GGUF name below blk.<i>)
    "mixer.query.kernel": ("self_attn.q_proj.weight", "attn_q.weight"),
    "mixer.key.kernel": ("self_attn.k_proj.weight", "attn_k.weight"),
    "mixer.value.kernel": ("self_attn.v_proj.weight", "attn_v.weight"),
    "mixer.out.kernel": ("self_attn.o_proj.weight", "attn_output.weight"),
    "mixer.query.bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "mixer.key.bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "mixer.value.bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "mixer.out.bias": ("self_attn.o_proj.bias", "attn_output.bias"),
    "mixer.query_norm.weight": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "mixer.key_norm.weight": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "mlp.gate.kernel": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "mlp.up.kernel": ("mlp.up_proj.weight", "ffn_up.weight"),
    "mlp.down.kernel": ("mlp.down_proj.weight", "ffn_down.weight"),
    "mlp.gate.bias": ("mlp.gate_proj.bias", "ffn_gate.bias"),
    "mlp.up.bias": ("mlp.up_proj.bias", "ffn_up.bias"),
    "mlp.down.bias": ("mlp.down_proj.bias", "ffn_down.bias"),
    "mixer_norm.weight": ("input_layernorm.weight", "attn_norm.weight"),
    "mlp_norm.weight": ("post_attention_layernorm.weight", "ffn_norm.weight"),
}
SANDWICH_NAMES = LAYER_NAMES | {
    "post_mixer_norm.weight": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    "mlp_norm.weight": ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    "post_mlp_norm.weight": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
}
TOP_NAMES = {
    "embed.table": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm.weight": ("model.norm.weight", "output_norm.weight"),
    "head.kernel": ("lm_head.weight", "output.weight"),
}


@dataclass(frozen=True)
class Family:
    """A family of checkpoints, as data.

    gguf_pairs: GGUF stores the rows of q and k as interleaved pairs. gguf_architectures: the names GGUF gives it.
    """

    name: str
    model_types: tuple[str, ...]
    spec_from_hf: Callable[[Mapping[str, Any]], ModelSpec]
    spec_to_hf: Callable[[ModelSpec], dict[str, Any]]
    layer_names: Mapping[str, tuple[str, str]]
    gguf_architectures: tuple[str, ...] = ()
    gguf_pairs: bool = False

    def names(self, path: str) -> tuple[str, str]:
        """(HF name, GGUF name) of the parameter at a dotted path such as `layers.3.mlp.up.kernel`."""
        if path in TOP_NAMES:
            return TOP_NAMES[path]
        _, index, rest = path.split(".", 2)
        if rest not in self.layer_names:
            raise ValueError(f"the {self.name} family has no weight for {path}")
        hf, gguf = self.layer_names[rest]
        return f"model.layers.{index}.{hf}", f"blk.{index}.{gguf}"
