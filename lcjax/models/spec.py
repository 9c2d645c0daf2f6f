"""What a decoder is, as data: frozen records without arrays."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.typing import DTypeLike

from lcjax.models.patterns import Pattern
from lcjax.positions.dpe import DPE
from lcjax.positions.laws import Rope
from lcjax.positions.remap import Remap
from lcjax.positions.tables import rotates_at_read
from lcjax.positions.xpos import XPos
from pallas_kernels import masks

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = ("bfloat16", "float32")
PLAIN_ROPE = Rope()


def check_choice(record: object, field: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError when a field of a record is none of the allowed values."""
    value = getattr(record, field)
    if value not in allowed:
        raise ValueError(f"{type(record).__name__}.{field} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


def check_positive(record: object, *fields: str) -> None:
    """Raise ValueError when a field of a record is a number that is not positive (None passes)."""
    for field in fields:
        value = getattr(record, field)
        if value is not None and value <= 0:
            raise ValueError(f"{type(record).__name__}.{field} must be positive, got {value}")


class Mixer:
    """Base of the records that say how one layer moves information between tokens."""

    @property
    def full(self) -> bool:
        """Whether it is full causal attention, one rotation for all pairs: tokens may then lie in any order."""
        return False


@dataclass(frozen=True)
class Attention(Mixer):
    """Causal softmax attention: full, or the last `window` tokens (own included), plus the first `sink` tokens.

    Of packed documents, each sees its own sinks. `pattern`, in place of a window, may give each KV head its own reach.
    """

    window: int | None = None
    sink: int = 0
    pattern: Pattern | None = None
    rope: Rope | None = PLAIN_ROPE
    remap: Remap | None = None  # which rotation a pair of tokens gets; None: the same for all
    scale: float | None = None  # None: head_dim ** -0.5
    soft_cap: float | None = None
    sink_logits: bool = False  # one learned logit per head that joins the softmax's denominator

    def __post_init__(self):
        check_positive(self, "window", "scale", "soft_cap")
        if self.sink < 0 or (self.sink and self.window is None):
            raise ValueError(
                f"Attention.sink must be >= 0 and needs a window; got sink={self.sink}, window={self.window}"
            )
        if self.pattern is not None and self.window is not None:
            raise ValueError(
                f"Attention has the window {self.window} and the pattern {type(self.pattern).__name__}: keep one"
            )
        if self.pattern is not None and rotates_at_read(self.rope, None):
            raise ValueError(
                f"Attention.pattern {type(self.pattern).__name__} keeps rotated keys, and those of "
                f"{type(self.rope).__name__} turn with the length: use a law of fixed frequencies"
            )
        whole = self.window is None and self.pattern is None
        if self.remap is not None and (not whole or self.rope is None or isinstance(self.rope, XPos)):
            raise ValueError(
                f"Attention.remap {type(self.remap).__name__} needs full attention with rotary positions; got "
                f"window={self.window}, pattern={self.pattern}, rope={self.rope}"
            )

    @property
    def full(self) -> bool:
        return self.window is None and self.pattern is None and self.remap is None

    def mask(self, num_heads: int, num_kv_heads: int) -> masks.Mask:
        """The layer's pattern in the kernels' mask algebra (segments are passed beside it)."""
        if self.pattern is not None:
            return self.pattern.mask(num_heads, num_kv_heads)
        if self.window is None:
            return masks.Causal()
        if self.sink:
            return masks.Causal() & (masks.Sink(self.sink) | masks.Window(self.window))
        return masks.Causal() & masks.Window(self.window)


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters of `rank` on the linear layers whose dotted path one of `targets` (regular expressions) finds.

    Each adds (alpha / rank) down up to its layer's weight; `dora` also trains the length of every column.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dora: bool = False

    def __post_init__(self):
        check_positive(self, "rank", "alpha")
        if not self.targets:
            raise ValueError("Adapters.targets is empty: name at least one linear layer, such as 'mixer.query$'")


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
    adapters: Adapters | None = None

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
        check_positive(self, *sizes, "norm_eps", "logit_soft_cap", "embed_scale")
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "dtype", DTYPES)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"ModelSpec: {self.num_heads} query heads don't divide into {self.num_kv_heads} KV heads")
        if not 1 <= len(self.pattern) <= self.num_layers:
            raise ValueError(f"ModelSpec.pattern has {len(self.pattern)} mixers for {self.num_layers} layers")
        for mixer in self.pattern:
            if isinstance(mixer, Attention) and mixer.pattern is not None:
                mixer.pattern.check(self.num_heads, self.num_kv_heads)
            if isinstance(mixer, Attention) and mixer.rope is not None:
                pairs = len(mixer.rope.frequencies(self.head_dim)[0])
                if isinstance(mixer.remap, DPE) and mixer.remap.pairs != pairs:
                    raise ValueError(f"ModelSpec: DPE.pairs is {mixer.remap.pairs}, the head has {pairs} rotary pairs")

    def with_positions(self, rope: Rope, remap: Remap | None = None, max_length: int | None = None) -> "ModelSpec":
        """The same model with this law in every layer that has rotary positions and no window of its own."""

        def changed(mixer: Mixer) -> Mixer:
            if isinstance(mixer, Attention) and mixer.rope is not None and mixer.window is None:
                return replace(mixer, rope=rope, remap=remap)
            return mixer

        return replace(self, pattern=tuple(map(changed, self.pattern)), max_length=max_length or self.max_length)

    def at(self, length: int) -> "ModelSpec":
        """The model for requests of up to `length` tokens: patterns that follow the length get their numbers."""

        def fixed(mixer: Mixer) -> Mixer:
            if not isinstance(mixer, Attention) or mixer.pattern is None:
                return mixer
            return replace(mixer, pattern=mixer.pattern.at(length))

        return replace(self, pattern=tuple(map(fixed, self.pattern)))

    @property
    def laws(self) -> tuple[tuple[Rope, Remap | None], ...]:
        """The different pairs of rotary law and remap, in the order of their first layers."""
        pairs = [(getattr(m, "rope", None), getattr(m, "remap", None)) for m in self.layers]
        return tuple(dict.fromkeys((rope, remap) for rope, remap in pairs if rope is not None))

    @property
    def layers(self) -> tuple[Mixer, ...]:
        """One mixer per layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def compute_dtype(self) -> DTypeLike:
        """The JAX dtype of activations."""
        return jnp.dtype(self.dtype)
