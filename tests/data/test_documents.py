"""Documents in parts: the same ids as in one go, each part tokenised once and only when it is due."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lcjax.data.documents import PART, Document, cuts


def document(text, calls=None):
    def encode(part):
        if calls is not None:
            calls.append(len(part))
        return list(part.encode())

    return Document(text, encode, [256], [257])


def test_cuts_fall_between_words():
    text = "some words, and\nlines of them. " * 20_000
    borders = cuts(text)
    assert borders[0] == 0
    assert borders[-1] == len(text)
    assert all(0 < high - low <= PART for low, high in itertools.pairwise(borders))
    assert all(text[b - 1].isalnum() and text[b] == " " and text[b + 1].isalnum() for b in borders[1:-1])


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet=" \nab,é", max_size=300), st.integers(20, 60))
def test_cuts_lose_nothing(text, size):
    borders = cuts(text, size)
    assert "".join(text[low:high] for low, high in itertools.pairwise(borders)) == text
    assert max(np.diff(borders)) <= size


def test_text_without_a_place_to_cut():
    assert cuts("x" * 2 * PART) == [0, PART, 2 * PART]
    assert cuts("") == [0, 0]


def test_walking_a_document_in_any_steps_gives_its_ids():
    text = "word " * 60_000
    whole = [256, *text.encode(), 257]
    for step in (1_000, 65_536, 100_003):
        book, place, found = document(text), (0, 0), []
        while len(piece := book.ids(*place, step + 1)) > 1:
            found += piece[:-1].tolist()
            place = book.move(*place, len(piece) - 1)
        assert [*found, piece[-1]] == whole


def test_only_what_is_due_is_tokenised():
    calls: list[int] = []
    book = document("word " * 60_000, calls)
    book.ids(0, 0, 1_000)
    assert len(calls) == 1
    place = book.move(0, 0, 70_000)
    assert place[0] == 1
    book.ids(*place, 1_000)
    assert len(calls) == 2
    document("word " * 60_000, calls).ids(3, 5, 10)
    assert len(calls) == 3
