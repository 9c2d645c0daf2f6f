"""What a decoder is, as data: frozen records without arrays."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from lcjax.positions.laws import Rope
from pallas_kernels import masks

FEATURE_MAPS = ("none", "elu", "relu", "softmax")
DECAYS = ("none", "scalar", "vector")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = ("bfloat16", "float32")
PLAIN_ROPE = Rope()


def _one_of(record: object, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(record, field)
    if value not in allowed:
        raise ValueError(f"{type(record).__name__}.{field} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


def _positive(record: object, *fields: str) -> None:
    for field in fields:
        value = getattr(record, field)
        if value is not None and value <= 0:
            raise ValueError(f"{type(record).__name__}.{field} must be positive, got {value}")


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention: full, or the last `window` tokens (own included), plus the first `sink` tokens.

    Of packed documents, each sees its own sinks.
    """

    window: int | None = None
    sink: int = 0
    rope: Rope | None = PLAIN_ROPE
    scale: float | None = None  # None: head_dim ** -0.5
    soft_cap: float | None = None
    sink_logits: bool = False  # one learned logit per head that joins the softmax's denominator

    def __post_init__(self):
        _positive(self, "window", "scale", "soft_cap")
        if self.sink < 0 or (self.sink and self.window is None):
            raise ValueError(
                f"Attention.sink must be >= 0 and needs a window; got sink={self.sink}, window={self.window}"
            )

    def mask(self) -> masks.Mask:
        """The layer's pattern in the kernels' mask algebra (segments are passed beside it)."""
        if self.window is None:
            return masks.Causal()
        if self.sink:
            return masks.Causal() & (masks.Sink(self.sink) | masks.Window(self.window))
        return masks.Causal() & masks.Window(self.window)


@dataclass(frozen=True)
class GatedLinear:
    """Gated linear attention (Yang et al., arXiv 2312.06635): state S_t = decay_t S_(t-1) + k_t^T v_t, output q_t S_t.

    `None` sizes are the model's own (num_heads, head_dim). `normalise` divides by the same recurrence over ones and
    needs a non-negative feature map. Decay is logsigmoid of a low-rank projection over 16, per head or per key feature.
    """

    num_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    feature_map: str = "none"
    decay: str = "vector"
    decay_rank: int = 16
    conv_width: int = 0  # causal depthwise convolution over q, k and v; 0: none
    normalise: bool = False
    output_gate: bool = True  # per-head RMSNorm, then a SiLU gate

    def __post_init__(self):
        _one_of(self, "feature_map", FEATURE_MAPS)
        _one_of(self, "decay", DECAYS)
        _positive(self, "num_heads", "key_dim", "value_dim", "decay_rank")
        if self.conv_width < 0 or self.conv_width == 1:
            raise ValueError(f"GatedLinear.conv_width must be 0 (none) or at least 2, got {self.conv_width}")
        if self.normalise and self.feature_map == "none":
            raise ValueError(
                "GatedLinear.normalise needs a non-negative feature_map ('elu', 'relu' or 'softmax'), got 'none'"
            )

    def sizes(self, spec: "ModelSpec") -> tuple[int, int, int]:
        """Heads, key features and value features of a head."""
        return self.num_heads or spec.num_heads, self.key_dim or spec.head_dim, self.value_dim or spec.head_dim


type Mixer = Attention | GatedLinear


@dataclass(frozen=True)
class ModelSpec:
    """Every number of a decoder. Layer i uses mixer `pattern[i % len(pattern)]`."""

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    pattern: tuple[Mixer, ...] = (Attention(),)
    name: str = "decoder"
    max_length: int = 2048  # trained context in tokens
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to every norm weight (Gemma: 1)
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    post_norm: bool = False  # a norm after each sublayer too, before the residual sum
    embed_scale: float = 1.0
    tie_embeddings: bool = True
    logit_soft_cap: float | None = None
    activation: str = "silu"
    dtype: str = "bfloat16"  # compute; parameters have their own

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "width",
            "mlp_width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_length",
        )
        _positive(self, *sizes, "norm_eps", "logit_soft_cap", "embed_scale")
        _one_of(self, "activation", ACTIVATIONS)
        _one_of(self, "dtype", DTYPES)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"ModelSpec: {self.num_heads} query heads don't divide into {self.num_kv_heads} KV heads")
        if not 1 <= len(self.pattern) <= self.num_layers:
            raise ValueError(f"ModelSpec.pattern has {len(self.pattern)} mixers for {self.num_layers} layers")
        for mixer in self.pattern:
            if isinstance(mixer, Attention) and mixer.rope is not None:
                mixer.rope.frequencies(self.head_dim)

    @property
    def layers(self) -> tuple[Mixer, ...]:
        """One mixer per layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def compute_dtype(self) -> DTypeLike:
        """The JAX dtype of activations."""
        return jnp.dtype(self.dtype)
