"""Rotary tables and laws: exact at any position, identity settings, relative positions, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcjax.positions import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Proportional,
    Rope,
    YaRN,
    apply_rope,
    law_from_hf,
    law_to_hf,
    rope_table,
)

D = 64
ONES = (1.0,) * (D // 2)
FAR = np.array([[0, 1, 4095, 4096, 65_535, 65_537, 2**20 + 1, 2**22 - 3, 2**24 - 1]], np.int32)
POSITIONS = jnp.asarray(FAR)
IDENTITIES = [
    Linear(factor=1.0),
    DynamicNTK(factor=4.0, original_length=2**24),
    YaRN(factor=1.0, original_length=128),
    Llama3(factor=1.0, original_length=128),
    LongRoPE(original_length=128, short_factor=ONES, long_factor=ONES),
    Proportional(factor=1.0),
]
SCALED = [
    Rope(base=5e5),
    Linear(factor=4.0),
    DynamicNTK(factor=4.0, original_length=8192),
    YaRN(base=1e5, factor=4.0, original_length=8192),
    Llama3(base=5e5, factor=8.0, original_length=8192),
    LongRoPE(original_length=128, factor=4.0, short_factor=ONES, long_factor=(3.0,) * (D // 2)),
    Proportional(partial=0.25),
    Rope(partial=0.5),
]


@pytest.mark.parametrize("law", SCALED, ids=lambda law: type(law).__name__)
def test_exact_to_2_24(law):
    """float64 of (position * float32 frequency), at every distance, to a few float32 roundings of cos itself."""
    frequencies, factor = law.frequencies(D)
    angles = FAR[..., None].astype(np.float64) * np.asarray(frequencies, np.float64)
    cos, sin = jax.jit(lambda p: rope_table(law, D, p))(FAR)
    np.testing.assert_allclose(cos, np.cos(angles) * factor, atol=6e-7)
    np.testing.assert_allclose(sin, np.sin(angles) * factor, atol=6e-7)


@pytest.mark.parametrize("law", SCALED[2:6:3], ids=lambda law: type(law).__name__)
def test_traced_length(law):
    """Laws that follow the length give the same frequencies for a traced length, on both sides of the border."""
    for length in (law.original_length - 1, law.original_length, law.original_length + 1, 4 * law.original_length):
        static, _ = law.frequencies(D, length)
        traced = jax.jit(lambda n: law.frequencies(D, n)[0])(jnp.int32(length))
        np.testing.assert_allclose(traced, static, rtol=1e-6)
    cos, _ = jax.jit(lambda p, n: rope_table(law, D, p, n))(FAR[:, :5], jnp.int32(4 * law.original_length))
    frequencies = np.asarray(law.frequencies(D, 4 * law.original_length)[0], np.float64)
    np.testing.assert_allclose(cos, np.cos(FAR[:, :5, None] * frequencies) * law.frequencies(D)[1], atol=0.02)


@pytest.mark.parametrize("law", IDENTITIES, ids=lambda law: type(law).__name__)
def test_identity_setting_is_plain_bit_for_bit(law):
    for length in (None, 100, 1 << 20):
        frequencies, factor = law.frequencies(D, length)
        np.testing.assert_array_equal(frequencies, Rope().frequencies(D)[0])
        assert factor == 1.0
    traced = jax.jit(lambda p, n: rope_table(law, D, p, n))(FAR[:, :4], jnp.int32(1 << 20))
    plain = jax.jit(lambda p: rope_table(Rope(), D, p))(FAR[:, :4])
    tolerance = 3e-3 if law.follows_length else 0  # a traced frequency is rounded once more, to float32 turns
    np.testing.assert_allclose(traced, plain, atol=tolerance, rtol=0)


def test_scores_depend_on_distance_only():
    """Even a million tokens on, the score of two tokens is what it is at the start."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, D))
    law = Rope(base=1e5)

    def score(i, j):
        rotate = lambda x, p: apply_rope(x, rope_table(law, D, jnp.full((1, 1), p)))
        return jnp.sum(rotate(q, i) * rotate(k, j))

    for shift in (7, 65_537, 2**20 + 3, 2**24 - 600):
        np.testing.assert_allclose(score(500 + shift, shift), score(500, 0), atol=2e-5)


def test_partial_passes_the_rest_through():
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, D))
    table = rope_table(Rope(partial=0.5), D, POSITIONS)
    rotated = apply_rope(x, table)
    np.testing.assert_array_equal(rotated[..., D // 2 :], x[..., D // 2 :])
    assert not np.allclose(rotated[:, 1:, :, 0], x[:, 1:, :, 0])
    assert apply_rope(x.astype(jnp.bfloat16), table).dtype == jnp.bfloat16


def test_known_vectors():
    """Yarn for SmolLM2 x4, and the NTK base: first pair kept, last pair divided by the factor."""
    got, factor = YaRN(base=1e5, factor=4.0, original_length=8192).frequencies(D)
    np.testing.assert_allclose(
        got[[0, 8, 16, 20, 31]], [1, 5.62341288e-2, 1.73925271e-3, 1.87473546e-4, 3.58253169e-6], rtol=1e-6
    )
    assert factor == pytest.approx(1.138629, rel=1e-6)
    dynamic, _ = DynamicNTK(base=1e5, factor=4.0, original_length=8192).frequencies(D, 32768)
    np.testing.assert_allclose(dynamic[[0, 16, 31]], [1, 8.41514324e-4, 1.10231724e-6], rtol=2e-6)
    assert dynamic[31] == pytest.approx(Rope(base=1e5).frequencies(D)[0][31] / 13, rel=1e-6)


@pytest.mark.parametrize("law", SCALED, ids=lambda law: type(law).__name__)
def test_dictionary_round_trip(law):
    assert law_from_hf(law_to_hf(law, max_length=8192), max_length=8192) == law


def test_dictionary_spellings():
    old = {"type": "su", "short_factor": list(ONES), "long_factor": list(ONES)}
    law = law_from_hf(old, theta=5e5, max_length=131072, original_length=4096)
    assert law == LongRoPE(5e5, factor=32.0, original_length=4096, short_factor=ONES, long_factor=ONES)
    assert law.frequencies(D)[1] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert law_from_hf(None, theta=8e6, max_length=1) == Rope(8e6)
    assert law_from_hf({"type": "linear", "factor": 2}, max_length=1) == Linear(factor=2.0)
    assert law_from_hf({"rope_type": "yarn", "factor": 4.0, "beta_fast": None}, max_length=64).original_length == 64


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "warp"}, "'warp' is not known"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "no field 'beta'"),
        ({"rope_type": "linear", "type": "yarn"}, "two types"),
        ({"rope_type": "linear"}, "needs a number 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "'high_freq_factor'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "high_turns"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}, "beta_fast"),
    ],
)
def test_bad_dictionaries(parameters, message):
    with pytest.raises(ValueError, match=message):
        law_from_hf(parameters, max_length=8192)


def test_bad_laws():
    with pytest.raises(ValueError, match="original_length"):
        YaRN(factor=2.0)
    with pytest.raises(ValueError, match="short_factor needs 32 entries, got 3"):
        LongRoPE(original_length=8, short_factor=(1.0,) * 3).frequencies(D)
    with pytest.raises(ValueError, match="even"):
        Rope(partial=0.3).frequencies(10)
    with pytest.raises(ValueError, match="no rope type"):
        law_to_hf(DynamicNTK(factor=2.0, original_length=5), max_length=6)
