"""A small model with every kind of mixer, over bytes."""

from lcjax.data.tokenizers import load_tokenizer
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec
from lcjax.serve.source import Loaded, random_model

TOKENIZER = load_tokenizer("bytes")
SPEC = ModelSpec(
    vocab_size=TOKENIZER.vocab_size, width=32, mlp_width=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    pattern=(Attention(), Attention(window=24, sink=2), GatedLinear(conv_width=3)), dtype="float32", max_length=160,
)  # fmt: skip


def toy() -> Loaded:
    """Random weights; float32, so that greedy answers do not depend on the batch."""
    return random_model(SPEC, TOKENIZER, seed=3)
