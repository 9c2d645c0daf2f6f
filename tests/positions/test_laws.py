"""The extension laws: known vectors, identity settings, exactness far out, tables that follow the length, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.positions import (
    CLEX,
    NTK,
    ByParts,
    DynamicLinear,
    DynamicYaRN,
    Giraffe,
    Linear,
    Llama3,
    LongRoPE,
    MRope,
    MRopePlus,
    Rope,
    Tabulated,
    XPos,
    YaRN,
    apply_rope,
    grid_positions,
    law_from_hf,
    law_to_hf,
    rope_table,
)
from lcjax.positions.clex import Flow
from lcjax.positions.tables import of_slots, of_tokens

D = 64
FAR = np.array([[0, 1, 4095, 65_537, 2**20 + 1, 2**24 - 1]], np.int32)
POSITIONS = jnp.asarray(FAR)
FOLLOWING = [
    DynamicLinear(1e5, original_length=8192, max_factor=8),
    DynamicYaRN(1e5, original_length=8192, max_factor=8),
    CLEX(1e5, original_length=8192, max_factor=8),
]
IDENTITIES = [
    NTK(factor=1.0),
    ByParts(factor=1.0, original_length=128),
    Giraffe(),
    XPos(scale_base=None),
    MRope(sections=(16, 8, 8)),
    MRopePlus(sections=(16, 8, 8), factor=1.0),
    DynamicLinear(original_length=128),
    DynamicYaRN(original_length=128),
    CLEX(original_length=128, max_factor=1),
    Tabulated(original_length=128),
]
named = lambda law: type(law).__name__


@pytest.mark.parametrize("law", IDENTITIES, ids=named)
def test_identity_setting_is_plain_bit_for_bit(law):
    plain = Rope().frequencies(D)[0]
    for length in (None, 100, 1 << 20):
        np.testing.assert_array_equal(law.frequencies(D, length)[0], plain)
        assert law.frequencies(D, length)[1] == 1.0
    positions = jnp.broadcast_to(FAR, (3, *FAR.shape)) if isinstance(law, MRope) else jnp.asarray(FAR)
    tables = of_tokens(law, None, law.frequencies(D), D, positions, 3)
    for got, want in zip(tables.queries[0], rope_table(Rope(), D, POSITIONS), strict=True):
        np.testing.assert_array_equal(got, want)


def test_known_vectors():
    """Values worked out from the papers' formulas for SmolLM2's head (64 features, base 1e5)."""
    at = [0, 8, 16, 24, 31]
    power = Giraffe(1e5, power=0.5).frequencies(D)[0]
    np.testing.assert_allclose(power[at], [1, 4.87001873e-2, 2.23606798e-3, 8.89139705e-5, 2.53323226e-6], rtol=1e-6)
    cut, plain = Giraffe(1e5, truncate=8192).frequencies(D)[0], Rope(1e5).frequencies(D)[0]
    np.testing.assert_array_equal(cut[:20], plain[:20])
    np.testing.assert_allclose(cut[20:26], 4.79368996e-5, rtol=1e-6)
    assert not cut[26:].any()
    ntk = NTK(1e5, factor=4.0).frequencies(D)[0]
    np.testing.assert_allclose(ntk, Rope(418_293.7).frequencies(D)[0], rtol=2e-6)
    np.testing.assert_allclose([ntk[0], ntk[31] * 4], [1, plain[31]], rtol=1e-6)
    # Raising the base 50 times (ABF) is NTK-aware scaling by 50^((d-2)/d).
    abf = Rope(50 * 1e4).frequencies(128)[0]
    np.testing.assert_allclose(abf, NTK(factor=50 ** (126 / 128)).frequencies(128)[0], rtol=1e-6)
    long = Llama3(5e5, factor=128.0, original_length=8192).frequencies(128)[0]  # UltraLong's
    np.testing.assert_allclose(long[[32, 36]], [4.05734347e-4, 4.86540966e-6], rtol=1e-6)
    np.testing.assert_array_equal(
        ByParts(5e5, factor=8.0, original_length=8192, high_turns=4.0).frequencies(128)[0],
        Llama3(5e5, factor=8.0, original_length=8192).frequencies(128)[0],
    )


def test_linear_scaling_commutes_with_positions():
    scaled = rope_table(Linear(factor=4.0), D, 4 * POSITIONS[:, :4])
    for got, want in zip(scaled, rope_table(Rope(), D, POSITIONS[:, :4]), strict=True):
        np.testing.assert_allclose(got, want, atol=6e-7)
    halves = jnp.array([[0.0, 0.5, 1000.25, 8191.75]])  # fractions of a token
    cos, _ = rope_table(Rope(), D, halves)
    exact = np.cos(np.asarray(halves, np.float64)[..., None] * np.asarray(Rope().frequencies(D)[0], np.float64))
    np.testing.assert_allclose(cos, exact, atol=1e-6)


@pytest.mark.parametrize("law", FOLLOWING, ids=named)
def test_a_table_that_follows_the_length(law):
    """Each row of a batch has its own factor, exact to 2^24 positions, plain within the trained length."""
    lengths = [1, 8192, 8193, 16384, 65_536, 1 << 20]
    rows, factor = jax.jit(lambda n: law.frequencies(D, n))(jnp.array(lengths))
    for n, length in enumerate(lengths):
        want, factor_want = law.frequencies(D, length)
        np.testing.assert_array_equal(rows[n], want)
        assert factor[n] == np.float32(factor_want)
        if length <= 8192:
            np.testing.assert_array_equal(want, Rope(1e5).frequencies(D)[0])
    cos, _ = jax.jit(lambda p, n: rope_table(law, D, p, n))(FAR, jnp.array([20_000]))
    frequencies, factor = law.frequencies(D, 20_000)
    want = np.cos(FAR[..., None] * np.asarray(frequencies, np.float64)) * factor
    np.testing.assert_allclose(cos, want, atol=8e-7)
    assert law.frequencies(D, 20_000)[0][31] < Rope(1e5).frequencies(D)[0][31] / 2


def test_laws_that_are_others_in_other_words():
    """E2-LLM serves by linear scaling; a base 50 times as large is NTK-aware scaling by 50 ** (126 / 128) (ABF)."""
    linear = Linear(1e5, factor=4.0)
    np.testing.assert_array_equal(FOLLOWING[0].frequencies(D, 32_768)[0], linear.frequencies(D)[0])
    base, ntk = Rope(5e5), NTK(1e4, factor=50 ** (126 / 128))
    np.testing.assert_allclose(base.frequencies(128)[0], ntk.frequencies(128)[0], rtol=1e-6)
    assert ntk.factor == pytest.approx(47.04, abs=5e-3)


def test_dynamic_yarn_is_yarn_at_its_factor():
    law, yarn = FOLLOWING[1], YaRN(1e5, factor=4.0, original_length=8192)
    np.testing.assert_array_equal(law.frequencies(D, 32_768)[0], yarn.frequencies(D)[0])
    assert law.frequencies(D, 32_768)[1] == pytest.approx(yarn.frequencies(D)[1])


def test_clex_starts_as_ntk_and_learns():
    law = CLEX(1e4, original_length=16, max_factor=4, steps=20)
    flow = Flow(law, 16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(flow.rows(), law.table(16)[0])
    np.testing.assert_allclose(flow.rows()[3], NTK(1e4, factor=7.0).frequencies(16)[0], rtol=1e-6)
    graphdef, params = nnx.split(flow, nnx.Param)

    def last_pair(params, length):
        return jnp.log(nnx.merge(graphdef, params).frequencies(jnp.array([length]))[0, -1])

    grads = jax.jit(jax.grad(last_pair))(params, 64)
    assert float(jnp.abs(grads["down"][...]).max()) > 0.1
    none = jax.jit(jax.grad(last_pair))(params, 16)
    assert not np.asarray(none["down"][...]).any()

    # With a flow that is not zero: the whole ODE by classical Runge-Kutta in float64.
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(8, 16)) * 0.05, rng.normal(size=(16, 8)) * 0.05
    params["up"][...], params["down"][...] = jnp.asarray(up, jnp.float32), jnp.asarray(down, jnp.float32)
    moved = nnx.merge(graphdef, params)
    exponents, plain, h = np.arange(8) * 2 / 14, np.log(law.plain(16)), 0.01

    def slope(z, t):
        prior = plain - exponents * math.log(2 * t - 1)
        return np.tanh((z + prior) @ up) @ down - exponents * 2 / (2 * t - 1)

    z = plain
    for t in 1 + h * np.arange(300):
        k1 = slope(z, t)
        k2 = slope(z + h / 2 * k1, t + h / 2)
        k3 = slope(z + h / 2 * k2, t + h / 2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(z + h * k3, t + h))
    np.testing.assert_allclose(np.log(moved.rows()[3]), z, atol=2e-5)
    solved = moved.solved()
    np.testing.assert_array_equal(solved.table(16)[0], moved.rows())


def test_xpos_decays_with_distance_and_nothing_else():
    law = XPos(1e4, scale_base=64.0)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, D))

    def score(i, j, cached=False):
        places = jnp.array([[i]]), jnp.array([[j]])
        frequencies, length = law.frequencies(D), jnp.array([i + 1])
        queries = of_tokens(law, None, frequencies, D, places[0], length if cached else 64).queries[0]
        keys = of_tokens(law, None, frequencies, D, places[1], 64).keys[0]
        keys = of_slots(law, None, frequencies, D, places[1], length)[0] if cached else keys
        return np.asarray((apply_rope(q, queries) * apply_rope(k, keys))[0, 0, 0])

    per_pair = lambda s: s[:32] + s[32:]
    np.testing.assert_allclose(per_pair(score(40, 10)), per_pair(score(90, 60)), atol=2e-5)
    np.testing.assert_allclose(per_pair(score(90, 60, cached=True)), per_pair(score(40, 10)), atol=2e-5)
    zeta = (np.arange(0, D, 2) / D + 0.4) / 1.4
    plain = lambda x, p: apply_rope(x, rope_table(Rope(1e4), D, jnp.array([[p]])))
    want = per_pair(np.asarray((plain(q, 40) * plain(k, 10))[0, 0, 0])) * zeta ** (30 / 64)
    np.testing.assert_allclose(per_pair(score(40, 10)), want, atol=2e-5)
    with pytest.raises(ValueError, match=r"scale_base 64\.0 is too small for 8192 tokens"):
        of_tokens(law, None, law.frequencies(D), D, jnp.zeros((1, 16_384), jnp.int32), 8192)


def test_mrope_axes_and_ramp():
    """A grid of 3 x 2 x 2 after three tokens, then text: positions, and which axis turns which pair."""
    positions, delta = grid_positions((3, (3, 2, 2), 2))
    np.testing.assert_array_equal(positions[0], [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 7])
    np.testing.assert_array_equal(positions[1, 3:11], [3, 3, 4, 4] * 2)
    np.testing.assert_array_equal(positions[2, 3:11], [3, 4] * 4)
    assert delta == 8 - 17
    law = MRope(1e6, sections=(16, 24, 24))
    tables = of_tokens(law, None, law.frequencies(128), 128, jnp.asarray(positions)[:, None], 0)
    for axis, pairs in enumerate((slice(0, 16), slice(16, 40), slice(40, 64))):
        want = rope_table(Rope(1e6), 128, jnp.asarray(positions[axis])[None])[0]
        np.testing.assert_array_equal(tables.queries[0][0][..., pairs], want[..., pairs])
    for ramp, want in (
        ("turns", [1, 0.829, 0.491, 0.186, 0.126, 0.125]),
        ("index", [1, 0.964, 0.854, 0.563, 0.162, 0.125]),
    ):
        stretched = MRopePlus(1e6, sections=(16, 24, 24), factor=8.0, ramp=ramp).frequencies(128)[0]
        ratio = stretched / Rope(1e6).frequencies(128)[0]
        np.testing.assert_allclose(ratio[[16, 17, 20, 28, 39, 40]], want, atol=6e-4)
        assert (np.diff(ratio) <= 1e-7).all()


def test_hf_has_no_name_for_ours():
    for law in (NTK(factor=2.0), Giraffe(power=0.5), FOLLOWING[1]):
        with pytest.raises(ValueError, match="no rope type"):
            law_to_hf(law, max_length=8192)
    axes = MRope(1e6, sections=(16, 8, 8))
    assert law_from_hf(law_to_hf(axes, max_length=8), max_length=8) == axes
    assert law_from_hf(law_to_hf(ByParts(factor=2.0, original_length=64), max_length=8), max_length=8).high_turns == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NTK(factor=0.5), "factor must be at least 1, got 0.5"),
        (lambda: ByParts(factor=2.0), "original_length must be positive, got 0"),
        (lambda: ByParts(factor=2.0, original_length=8, high_turns=1.0), "high_turns"),
        (lambda: Giraffe(power=-1.0), "power must not be negative"),
        (lambda: DynamicYaRN(max_factor=4), "original_length must be positive"),
        (lambda: CLEX(original_length=8, max_factor=0), "max_factor must be at least 1"),
        (lambda: Tabulated(original_length=8, max_factor=3), "rows must hold the factors 2..3, got 0"),
        (lambda: XPos(scale_base=0.0), "scale_base must be positive"),
        (lambda: MRope(sections=(1, 2, 3)).axis_of_pair(64), r"sections \(1, 2, 3\) must sum to 32 pairs"),
        (lambda: LongRoPE(original_length=8, factor=0.5), "LongRoPE: factor must be at least 1, got 0.5"),
        (lambda: MRopePlus(factor=0.5), "factor must be at least 1"),
    ],
)
def test_bad_laws(make, message):
    with pytest.raises(ValueError, match=message):
        make()
