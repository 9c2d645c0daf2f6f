"""The zoo: one row for every mixer, position law and family of the decoder. A new one is a new row."""

import dataclasses
from dataclasses import dataclass

from lcjax.models.patterns import Spans, Strided
from lcjax.models.recurrent import DeltaNet, GatedLinear, Linearized, Mamba2
from lcjax.models.spec import Attention, Mixer, ModelSpec
from lcjax.positions import DynamicNTK, Linear, Llama3, LongRoPE, Proportional, Rope, YaRN

SIZES = {
    "vocab_size": 61,
    "width": 24,
    "mlp_width": 32,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dtype": "float32",
}
LENGTH = 26  # tokens of a row in every test


@dataclass(frozen=True)
class Row:
    """A model, and the setting of the same thing that must change nothing: `identity` equals `dense` in its outputs."""

    spec: ModelSpec
    identity: ModelSpec | None = None
    dense: ModelSpec | None = None

    @property
    def follows_length(self) -> bool:
        """Frequencies depend on how many tokens a row has: its documents turn by the longest of them."""
        return any(isinstance(m, Attention) and m.rope and m.rope.follows_length for m in self.spec.pattern)

    @property
    def turns_otherwise(self) -> bool:
        """It differs from full attention in its frequencies alone: the parameters and their programs are the same."""
        plain = all(isinstance(m, Attention) and m == Attention(rope=m.rope) for m in self.spec.pattern)
        return plain and dataclasses.replace(self.spec, pattern=FULL.pattern) == FULL and self.spec != FULL

    @property
    def counts_in_rows(self) -> bool:
        """What a token sees depends on its place in the row: a document behind another one differs by design."""
        return any(isinstance(m, Attention) and isinstance(m.pattern, Strided) for m in self.spec.pattern)


def model(*pattern: Mixer, **fields: object) -> ModelSpec:
    """A decoder with a layer of each of these mixers."""
    return ModelSpec(**SIZES | {"num_layers": len(pattern), "pattern": pattern} | fields)


FULL = model(Attention())


def attention(mixer: Attention, identity: Attention, dense: Attention = Attention()) -> Row:  # noqa: B008
    """A pattern beside full attention, as in a hybrid."""
    return Row(model(mixer, Attention()), model(identity), model(dense))


def law(rope: Rope, identity: Rope) -> Row:
    """A position law in every layer."""
    return Row(model(Attention(rope=rope)), model(Attention(rope=identity)), FULL)


def linear(**fields: object) -> Row:
    """A linear layer beside full attention; there is no setting at which it is softmax attention."""
    return Row(model(GatedLinear(**fields), Attention()))


YARN = YaRN(factor=4.0, original_length=8)
LONG = LongRoPE(short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0), original_length=8, factor=8.0)

ROWS = {
    "full": Row(FULL),
    "window": attention(Attention(window=5), Attention(window=LENGTH)),
    "sink_window": attention(Attention(window=7, sink=2), Attention(window=LENGTH - 3, sink=3)),
    "spans": attention(Attention(pattern=Spans((2, 0), (7, None))), Attention(pattern=Spans((3, 0), (LENGTH, None)))),
    "strided": attention(Attention(pattern=Strided(2, 2, 5, step=2)), Attention(pattern=Strided(2, 1, 1))),
    "soft_cap": Row(model(Attention(window=5, soft_cap=3.0, scale=0.3))),
    "sink_logits": Row(model(Attention(window=7, sink=2, rope=None, sink_logits=True))),
    "linear_vector": linear(conv_width=4, feature_map="elu", normalise=True),
    "linear_scalar": linear(decay="scalar", num_heads=2, key_dim=6, value_dim=10),
    "linear_plain": linear(decay="none", feature_map="softmax", output_gate=False, conv_width=2),
    "lawcat": Row(model(Linearized(conv_value=True), Attention())),
    "lolcats": Row(model(Linearized.lolcats(window=5), Attention())),
    "delta": Row(model(DeltaNet(), DeltaNet(num_heads=2, gated=True, negative_eigenvalues=True))),
    "mamba2": Row(model(Mamba2(num_heads=4, head_dim=6, state=10, groups=2, conv_width=3))),
    "linear_rope": law(Linear(factor=4.0), Linear(factor=1.0)),
    "dynamic_ntk": law(DynamicNTK(factor=2.0, original_length=8), DynamicNTK(factor=2.0, original_length=64)),
    "yarn": law(YARN, dataclasses.replace(YARN, factor=1.0)),
    "llama3": law(Llama3(factor=8.0, original_length=8), Llama3(factor=1.0, original_length=8)),
    "longrope": law(LONG, dataclasses.replace(LONG, long_factor=(1.0,) * 4, factor=1.0)),
    "proportional": law(Proportional(partial=0.5), Proportional(partial=1.0)),
    "llama": Row(model(Attention(), qkv_bias=True, out_bias=True, mlp_bias=True)),
    "qwen3": Row(model(Attention(), qk_norm=True, tie_embeddings=False)),
    "gemma3": Row(
        model(
            Attention(window=8, scale=0.3),
            Attention(rope=Rope(1e6), scale=0.3),
            norm_offset=1.0,
            post_norm=True,
            embed_scale=4.0,
            activation="gelu_tanh",
            qk_norm=True,
            logit_soft_cap=30.0,
        )
    ),
}

# Rows that only sweep numbers: CI keeps one that shares each one's code, the slow tests run all.
SWEPT = {"window": "sink_window", "linear_rope": "yarn", "llama3": "yarn", "proportional": "yarn"}
