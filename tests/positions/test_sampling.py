"""Sampled positions: the papers' properties, resumption, the training step that takes them, and bad input."""

import numpy as np
import pytest

from lcjax.positions.sampling import E2LLM, CLEXPositions, LongRecipe, Randomised, Sampler, Stretch

LENGTH = 64
ROWS = np.random.default_rng(0).integers(0, 20, (200, LENGTH))
WHOLE = np.ones_like(ROWS)
PACKED = np.broadcast_to(np.repeat([1, 2, 3, 0], [10, 17, 30, 7]), ROWS.shape)
SAMPLERS = [
    Randomised(),
    E2LLM(original_length=LENGTH, max_scale=8),
    CLEXPositions(original_length=LENGTH, max_factor=8),
    LongRecipe(target=512, boundaries=(3, 7)),
]
named = lambda x: type(x).__name__


@pytest.mark.parametrize("sampler", SAMPLERS, ids=named)
def test_rows_ascend_differ_and_resume(sampler):
    found = sampler.positions(ROWS, WHOLE, seed=1, step=5, first_row=0)
    assert found.dtype == np.float32
    assert (np.diff(found, axis=1) > 0).all()
    assert len(np.unique(found[:, -1])) > 2
    again = sampler.positions(ROWS[40:50], WHOLE[40:50], seed=1, step=5, first_row=40)
    np.testing.assert_array_equal(again, found[40:50])
    assert not np.array_equal(sampler.positions(ROWS, WHOLE, seed=1, step=6, first_row=0), found)


@pytest.mark.parametrize("sampler", [Randomised(), SAMPLERS[1], SAMPLERS[3]], ids=named)
def test_documents_of_a_row_draw_for_themselves(sampler):
    """As if they came one after the other from the row's generator, on rows of their own; padding is at 0."""
    found = sampler.positions(ROWS, PACKED, seed=1, step=5, first_row=3)
    for row, (ids, segments) in enumerate(zip(ROWS[:20], PACKED[:20], strict=True)):
        rng = np.random.default_rng([1, 5, 3 + row])
        for number in (1, 2, 3):
            ids_of_one = ids[segments == number]
            want = sampler.row(rng, ids_of_one, np.ones_like(ids_of_one))
            np.testing.assert_array_equal(found[row, segments == number], want.astype(np.float32))
    assert not found[PACKED == 0].any()


@pytest.mark.parametrize("sampler", [SAMPLERS[2], Stretch(factor=8.0, boundaries=(3,))], ids=named)
def test_documents_of_a_row_draw_together(sampler):
    found = sampler.positions(ROWS, PACKED, seed=1, step=5, first_row=0)
    np.testing.assert_array_equal(found, sampler.positions(ROWS, WHOLE, seed=1, step=5, first_row=0))


@pytest.mark.parametrize(
    "sampler",
    [Sampler(), E2LLM(original_length=LENGTH, max_scale=1), CLEXPositions(original_length=LENGTH, max_factor=1)],
    ids=named,
)
def test_identity_settings_count_tokens(sampler):
    np.testing.assert_array_equal(sampler.positions(ROWS[:3], WHOLE[:3], 0, 0, 0), np.tile(np.arange(LENGTH), (3, 1)))


@pytest.mark.parametrize("sampler", [Sampler(), E2LLM(original_length=LENGTH, max_scale=1)], ids=named)
def test_identity_settings_count_from_the_document(sampler):
    want = np.concatenate([np.arange(10), np.arange(17), np.arange(30), np.zeros(7)])
    np.testing.assert_array_equal(sampler.positions(ROWS[:3], PACKED[:3], 0, 0, 0), np.tile(want, (3, 1)))


def test_randomised_ends_within_the_row():
    found = SAMPLERS[0].positions(ROWS, WHOLE, 0, 0, 0)
    assert found.max() <= LENGTH
    assert 0.9 < found[:, -1].mean() / LENGTH <= 1


def test_e2llm_covers_its_range_and_no_more():
    found = SAMPLERS[1].positions(ROWS, WHOLE, 0, 0, 0)
    assert found.max() < LENGTH
    scale = np.round(1 / (found[:, 1] - found[:, 0]))
    assert set(scale) == set(range(1, 9))
    jump = found[:, 4] - found[:, 3]  # from the anchors to the rest
    assert jump.max() > 0.8 * LENGTH
    np.testing.assert_allclose(np.diff(found[:, 4:], axis=1), np.broadcast_to(1 / scale[:, None], (200, 59)), atol=1e-5)


def test_e2llm_draws_the_scales_that_a_document_fits_in():
    """Documents of 10, 17 and 30 tokens under an original length of 12: every scale and offset, no other."""
    sampler = E2LLM(original_length=12, max_scale=4)
    found = np.concatenate([sampler.positions(ROWS, PACKED, 0, step, 0) for step in range(10)])
    for number, (least, length) in enumerate(((1, 10), (2, 17), (3, 30)), 1):
        mine = found[:, PACKED[0] == number]
        scale = np.round(1 / (mine[:, 1] - mine[:, 0])).astype(int)
        assert set(scale) == set(range(least, 5))
        own = np.round(mine * scale[:, None]).astype(int)
        offset = own[:, 4] - 4
        want = np.arange(length) + np.where(np.arange(length) < 4, 0, offset[:, None])
        np.testing.assert_allclose(mine * scale[:, None], want, rtol=1e-6)
        for g in range(least, 5):
            assert set(offset[scale == g]) == set(range(g * 12 - max(length, 12) + 1))
    assert found.max() < 12


def test_clex_spans_its_factor():
    found = SAMPLERS[2].positions(ROWS, WHOLE, 0, 0, 0)
    factor = (found[:, -1] + 1) / LENGTH
    np.testing.assert_array_equal(factor, np.round(factor))
    assert set(factor) == set(range(1, 9))
    assert not found[:, 0].any()
    longer = CLEXPositions(original_length=LENGTH // 2, max_factor=4).positions(ROWS, WHOLE, 0, 0, 0)
    assert longer.max() == (4 * LENGTH - 1) / 2


def test_longrecipe_keeps_sentences_together():
    sampler = SAMPLERS[3]
    found = sampler.positions(ROWS, WHOLE, 0, 0, 0)
    assert found.max() < 512
    assert found[:, -1].mean() > 0.8 * 512
    step, ends = np.diff(found, axis=1), np.isin(ROWS[:, :-1], sampler.boundaries)
    inside = np.arange(LENGTH - 1) >= LENGTH // 2  # beyond every prefix
    assert (step[:, inside][~ends[:, inside]] == 1).all()
    assert (step[:, inside][ends[:, inside]] > 1).any()
    same = LongRecipe(target=LENGTH, boundaries=(3,)).positions(ROWS[:5], WHOLE[:5], 0, 0, 0)
    np.testing.assert_array_equal(same, np.tile(np.arange(LENGTH), (5, 1)))


def test_stretch_keeps_lines_even():
    found = np.diff(Stretch(factor=8.0, boundaries=(3,)).positions(ROWS, WHOLE, 0, 0, 0), axis=1)
    assert found.min() == pytest.approx(1, rel=1e-4)
    assert 4 < found.max() < 8
    inside = ~np.isin(ROWS[:, 1:-1], (3,))  # tokens that end no line: the next one lies as far on
    np.testing.assert_allclose(np.diff(found, axis=1)[inside], 0, atol=1e-4)
    assert 0.3 < (found > 1.01).mean() < 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stretch(factor=4.0), "boundaries is empty"),
        (lambda: E2LLM(8, max_scale=0), "max_scale is 0"),
        (lambda: E2LLM(), "E2LLM.original_length is 0"),
        (
            lambda: E2LLM(12, max_scale=2).positions(ROWS, PACKED, 0, 0, 0),
            "E2LLM.max_scale is 2; a document of 30 tokens needs 3 to lie below original_length 12",
        ),
        (lambda: CLEXPositions(max_factor=4), "original_length is 0"),
        (lambda: LongRecipe(target=8), "boundaries is empty"),
        (
            lambda: LongRecipe(target=8, boundaries=(1,)).positions(ROWS, WHOLE, 0, 0, 0),
            "target 8 is below a document of 64 tokens",
        ),
    ],
)
def test_bad_samplers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
