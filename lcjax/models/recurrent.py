"""Records of the recurrent mixers: layers whose memory is one state of fixed size instead of a growing cache."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from lcjax.models.spec import Attention, Mixer, check_choice, check_positive

if TYPE_CHECKING:
    from lcjax.models.spec import ModelSpec

FEATURE_MAPS = ("none", "elu", "relu", "softmax")
DECAYS = ("none", "scalar", "vector")
PLAIN_ATTENTION = Attention()


class Memory(NamedTuple):
    """What a recurrent mixer carries from token to token: a state `[heads, keys, values]`, and recent inputs.

    normalise: there is a second state, the sum of the keys. tails: stream -> (tokens held, channels).
    """

    heads: int
    keys: int
    values: int
    normalise: bool
    tails: dict[str, tuple[int, int]]


class RecurrentMixer(Mixer):
    """Base of the records below."""

    def memory(self, spec: "ModelSpec") -> Memory:
        """The sizes of what the layer carries in this model."""
        raise NotImplementedError


def _check_conv(record: "GatedLinear | Linearized | DeltaNet | Mamba2", least: int = 0) -> None:
    width = record.conv_width
    if width < least or width == 1 or width > 8:
        allowed = "2 to 8" if least else "0 (none) or 2 to 8"
        raise ValueError(f"{type(record).__name__}.conv_width must be {allowed}, got {width}")


@dataclass(frozen=True)
class GatedLinear(RecurrentMixer):
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
        check_choice(self, "feature_map", FEATURE_MAPS)
        check_choice(self, "decay", DECAYS)
        check_positive(self, "num_heads", "key_dim", "value_dim", "decay_rank")
        _check_conv(self)
        if self.normalise and self.feature_map == "none":
            raise ValueError(
                "GatedLinear.normalise needs a non-negative feature_map ('elu', 'relu' or 'softmax'), got 'none'"
            )

    def sizes(self, spec: "ModelSpec") -> tuple[int, int, int]:
        """Heads, key features and value features of a head."""
        return self.num_heads or spec.num_heads, self.key_dim or spec.head_dim, self.value_dim or spec.head_dim

    def memory(self, spec: "ModelSpec") -> Memory:
        heads, keys, values = self.sizes(spec)
        channels = {"q": heads * keys, "k": heads * keys, "v": heads * values} if self.conv_width else {}
        tails = {name: (self.conv_width - 1, count) for name, count in channels.items()}
        return Memory(heads, keys, values, self.normalise, tails)


@dataclass(frozen=True)
class Linearized(RecurrentMixer):
    """A softmax attention layer turned linear: its projections stay, learned feature maps replace the softmax.

    Each query head maps its queries and keys to `2 x features` positive numbers, [softmax(W u), softmax(-W u)]
    (Hedgehog, arXiv 2402.04347, as LoLCATs has it); the outputs are weighted sums of values, divided by the sum of
    weights. The defaults are LAWCAT's layer (arXiv 2509.18467): a causal convolution over q and k before the maps, a
    forget gate per key feature, no rotary positions. LoLCATs (arXiv 2410.10254) is `Linearized.lolcats()`.

    teacher: the attention layer that this one stands for; its rotary law and scale serve the window branch.
    features: f, by default half the head dimension. tied: one map for queries and keys. decay: 'vector' or 'none'.
    horizons: tokens in which a head's first and last feature decay to 1/e before training, the others spread between
    them; None: 23 tokens for all, as published. stretched: in training a token whose position lies n beyond the one
    before it stands for n such tokens, decays and weighs n times as much (`Stretch` draws such positions).
    normalise: divide by the sum of weights. rotate: rotary positions before the maps. window: tokens, own included,
    over which a softmax branch is mixed in with a learned factor per head; 0: no branch. overlap: whether the linear
    branch also covers the tokens of the window. window_logit: the factor's initial logit.
    """

    teacher: Attention = PLAIN_ATTENTION
    features: int | None = None
    tied: bool = False
    conv_width: int = 4
    conv_value: bool = False
    decay: str = "vector"
    decay_rank: int = 16
    horizons: tuple[float, float] | None = None
    stretched: bool = False
    normalise: bool = True
    rotate: bool = False
    window: int = 0
    overlap: bool = True
    window_logit: float = 0.0

    def __post_init__(self):
        check_positive(self, "features", "decay_rank")
        check_choice(self, "decay", ("none", "vector"))
        _check_conv(self)
        if self.stretched and self.window:
            raise ValueError("Linearized.stretched with a window is not supported: set window=0")
        if self.horizons is not None and self.decay == "none":
            raise ValueError("Linearized.horizons is for decays, and decay is 'none': leave out one of them")
        if self.horizons is not None and not 1 <= self.horizons[0] <= self.horizons[1]:
            raise ValueError(f"Linearized.horizons is {self.horizons}: give two numbers of tokens, the smaller first")
        if self.window and self.teacher.soft_cap is not None:
            raise ValueError("Linearized.window with a soft-capped teacher is not supported: set window=0")
        if self.teacher.remap is not None:
            raise ValueError("Linearized.teacher has a remap of positions: linearise the model without it")
        if self.teacher.sink_logits:
            raise ValueError("Linearized.teacher has sink_logits, which a linear layer cannot imitate")
        if self.window < 0 or (self.window and not self.normalise):
            raise ValueError(f"Linearized.window is {self.window}: it must be >= 0, and a window needs normalise=True")
        if not self.overlap and (self.conv_width or self.decay != "none" or not self.window):
            raise ValueError(
                "Linearized.overlap=False delays the keys until they leave the window: it needs a window, "
                f"conv_width=0 and decay='none', got {self.window}, {self.conv_width} and {self.decay!r}"
            )

    @classmethod
    def lolcats(cls, teacher: Attention = PLAIN_ATTENTION, window: int = 64) -> "Linearized":
        """LoLCATs' layer: rotary positions, then maps; a softmax window, and the linear part for what lies before."""
        plain = cls(teacher, conv_width=0, decay="none", rotate=True)
        return replace(plain, window=window, overlap=window == 0, window_logit=-2.1972)  # sigmoid: 0.1

    @property
    def rope(self):
        """The rotary law of the teacher."""
        return self.teacher.rope

    def keys(self, spec: "ModelSpec") -> int:
        """Key features of a head."""
        return 2 * (self.features or spec.head_dim // 2)

    def memory(self, spec: "ModelSpec") -> Memory:
        dim, held = spec.head_dim, self.conv_width - 1
        queries, grouped = spec.num_heads * dim, spec.num_kv_heads * dim
        tails = {"q": (held, queries), "k": (held, grouped)} if self.conv_width else {}
        if self.conv_width and self.conv_value:
            tails["v"] = (held, grouped)
        if self.window:  # the mixture needs the sum of weights by itself: a value column of ones in place of z
            tails |= {"window_k": (self.window, grouped), "window_v": (self.window, grouped)}
            return Memory(spec.num_heads, self.keys(spec), dim + 1, False, tails)
        return Memory(spec.num_heads, self.keys(spec), dim, self.normalise, tails)


@dataclass(frozen=True)
class DeltaNet(RecurrentMixer):
    """The delta rule: what the state holds at a key is replaced, not added to (Yang et al., arXiv 2406.06484).

    q and k are L2-normalised after a convolution and SiLU. `gated` adds a forget gate per head and an output gate
    (Gated DeltaNet, arXiv 2412.06464). `None` sizes are the model's own.
    """

    num_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    conv_width: int = 4
    gated: bool = False
    negative_eigenvalues: bool = False  # writing strength up to 2 instead of 1

    def __post_init__(self):
        check_positive(self, "num_heads", "key_dim", "value_dim")
        _check_conv(self, least=2)

    def memory(self, spec: "ModelSpec") -> Memory:
        heads, keys = self.num_heads or spec.num_heads, self.key_dim or spec.head_dim
        values = self.value_dim or spec.head_dim
        channels = {"q": heads * keys, "k": heads * keys, "v": heads * values}
        tails = {name: (self.conv_width - 1, count) for name, count in channels.items()}
        return Memory(heads, keys, values, False, tails)


@dataclass(frozen=True)
class Mamba2(RecurrentMixer):
    """Mamba-2's state-space layer (Dao and Gu, arXiv 2405.21060): linear attention with scalar decay and a skip.

    h_t = exp(step_t A) h_(t-1) + B_t step_t x_t, y_t = C_t h_t + D x_t, with A and D learned per head.

    num_heads: by default 2 x width / head_dim. state: numbers a channel remembers. groups: heads share B and C.
    """

    num_heads: int | None = None
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    conv_width: int = 4

    def __post_init__(self):
        check_positive(self, "num_heads", "head_dim", "state", "groups")
        _check_conv(self, least=2)

    def memory(self, spec: "ModelSpec") -> Memory:
        heads = self.num_heads or 2 * spec.width // self.head_dim
        if heads < 1 or heads % self.groups:
            raise ValueError(f"Mamba2: {heads} heads of {self.head_dim} don't divide into {self.groups} groups")
        channels = {"x": heads * self.head_dim, "b": self.groups * self.state, "c": self.groups * self.state}
        tails = {name: (self.conv_width - 1, count) for name, count in channels.items()}
        return Memory(heads, self.state, self.head_dim, False, tails)
