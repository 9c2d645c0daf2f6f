"""FLOPs by the printed convention, against hand-worked sums."""

import dataclasses

import pytest

from lcjax.models.flops import flops_per_token
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec

SPEC = ModelSpec(vocab_size=100, width=8, mlp_width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4)
WEIGHTS = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 32 + 8 * 100  # q, k and v, o, MLP, unembedding


def test_full_attention_is_counted_half():
    assert flops_per_token(SPEC, 64, training=False) == 2 * WEIGHTS + 4 * 16 * (64 + 1) / 2


def test_training_is_three_times_forward():
    assert flops_per_token(SPEC, 64, training=True) == 3 * flops_per_token(SPEC, 64, training=False)


def test_a_window_is_a_triangle_and_a_rectangle():
    spec = dataclasses.replace(SPEC, pattern=(Attention(window=12, sink=4),))
    visible = (16 * 17 / 2 + (64 - 16) * 16) / 64
    assert flops_per_token(spec, 64, training=False) == pytest.approx(2 * WEIGHTS + 4 * 16 * visible)
    short = flops_per_token(spec, 8, training=False)
    assert short == flops_per_token(SPEC, 8, training=False), "a window longer than the text is full attention"


def test_an_untied_embedding_is_looked_up_not_multiplied():
    untied = dataclasses.replace(SPEC, tie_embeddings=False)
    assert flops_per_token(untied, 64, training=False) == flops_per_token(SPEC, 64, training=False)


def test_a_linear_layer_costs_the_same_at_any_length():
    spec = dataclasses.replace(SPEC, pattern=(GatedLinear(),))
    assert flops_per_token(spec, 64, training=False) == flops_per_token(spec, 1 << 20, training=False)
