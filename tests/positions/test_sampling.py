"""Sampled positions: the papers' properties, resumption, the training step that takes them, and bad input."""

import numpy as np
import pytest

from lcjax.positions.sampling import E2LLM, CLEXPositions, LongRecipe, Randomised, Sampler, Stretch

LENGTH = 64
ROWS = np.random.default_rng(0).integers(0, 20, (200, LENGTH))
SAMPLERS = [
    Randomised(),
    E2LLM(max_scale=8),
    CLEXPositions(original_length=LENGTH, max_factor=8),
    LongRecipe(target=512, boundaries=(3, 7)),
]
named = lambda x: type(x).__name__


@pytest.mark.parametrize("sampler", SAMPLERS, ids=named)
def test_rows_ascend_differ_and_resume(sampler):
    found = sampler.positions(ROWS, seed=1, step=5, first_row=0)
    assert found.dtype == np.float32
    assert (np.diff(found, axis=1) > 0).all()
    assert len(np.unique(found[:, -1])) > 2
    np.testing.assert_array_equal(sampler.positions(ROWS[40:50], seed=1, step=5, first_row=40), found[40:50])
    assert not np.array_equal(sampler.positions(ROWS, seed=1, step=6, first_row=0), found)


@pytest.mark.parametrize(
    "sampler", [Sampler(), E2LLM(max_scale=1), CLEXPositions(original_length=LENGTH, max_factor=1)], ids=named
)
def test_identity_settings_count_columns(sampler):
    np.testing.assert_array_equal(sampler.positions(ROWS[:3], 0, 0, 0), np.tile(np.arange(LENGTH), (3, 1)))


def test_randomised_ends_within_the_row():
    found = SAMPLERS[0].positions(ROWS, 0, 0, 0)
    assert found.max() <= LENGTH
    assert 0.9 < found[:, -1].mean() / LENGTH <= 1


def test_e2llm_covers_its_range_and_no_more():
    found = SAMPLERS[1].positions(ROWS, 0, 0, 0)
    assert found.max() < LENGTH
    scale = np.round(1 / (found[:, 1] - found[:, 0]))
    assert set(scale) == set(range(1, 9))
    jump = found[:, 4] - found[:, 3]  # from the anchors to the rest
    assert jump.max() > 0.8 * LENGTH
    np.testing.assert_allclose(np.diff(found[:, 4:], axis=1), np.broadcast_to(1 / scale[:, None], (200, 59)), atol=1e-5)


def test_e2llm_of_longer_rows_starts_at_the_scale_that_they_need():
    found = E2LLM(max_scale=8, original_length=24).positions(ROWS, 0, 0, 0)
    assert 22 < found.max() < 24
    assert set(np.round(1 / (found[:, 1] - found[:, 0]))) == set(range(3, 9))


def test_clex_spans_its_factor():
    found = SAMPLERS[2].positions(ROWS, 0, 0, 0)
    factor = (found[:, -1] + 1) / LENGTH
    np.testing.assert_array_equal(factor, np.round(factor))
    assert set(factor) == set(range(1, 9))
    assert not found[:, 0].any()
    longer = CLEXPositions(original_length=LENGTH // 2, max_factor=4).positions(ROWS, 0, 0, 0)
    assert longer.max() == (4 * LENGTH - 1) / 2


def test_longrecipe_keeps_sentences_together():
    sampler = SAMPLERS[3]
    found = sampler.positions(ROWS, 0, 0, 0)
    assert found.max() < 512
    assert found[:, -1].mean() > 0.8 * 512
    step, ends = np.diff(found, axis=1), np.isin(ROWS[:, :-1], sampler.boundaries)
    inside = np.arange(LENGTH - 1) >= LENGTH // 2  # beyond every prefix
    assert (step[:, inside][~ends[:, inside]] == 1).all()
    assert (step[:, inside][ends[:, inside]] > 1).any()
    same = LongRecipe(target=LENGTH, boundaries=(3,)).positions(ROWS[:5], 0, 0, 0)
    np.testing.assert_array_equal(same, np.tile(np.arange(LENGTH), (5, 1)))


def test_stretch_keeps_lines_even():
    found = np.diff(Stretch(factor=8.0, boundaries=(3,)).positions(ROWS, 0, 0, 0), axis=1)
    assert found.min() == pytest.approx(1, rel=1e-4)
    assert 4 < found.max() < 8
    inside = ~np.isin(ROWS[:, 1:-1], (3,))  # tokens that end no line: the next one lies as far on
    np.testing.assert_allclose(np.diff(found, axis=1)[inside], 0, atol=1e-4)
    assert 0.3 < (found > 1.01).mean() < 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stretch(factor=4.0), "boundaries is empty"),
        (lambda: E2LLM(max_scale=0), "max_scale is 0"),
        (lambda: E2LLM(2, original_length=24).positions(ROWS, 0, 0, 0), "rows of 64 tokens need 3 to lie below"),
        (lambda: CLEXPositions(max_factor=4), "original_length is 0"),
        (lambda: LongRecipe(target=8), "boundaries is empty"),
        (
            lambda: LongRecipe(target=8, boundaries=(1,)).positions(ROWS, 0, 0, 0),
            "target 8 is below the row's length 64",
        ),
    ],
)
def test_bad_samplers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
