"""Excerpts: every text once, lengths as drawn, the same stretches whenever asked, a stream that can be resumed."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from lcjax.data import DataError, DataSpec, Excerpts, load_tokenizer
from lcjax.data.documents import Scored
from lcjax.data.pipeline import build_pipeline


@dataclass(frozen=True)
class Texts:
    """Given texts, as a source and as its corpus."""

    texts: tuple[str, ...]
    split: str = "train"

    @property
    def fingerprint(self):
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()

    def open(self, data_dir):
        del data_dir
        return self

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index]

    def sizes(self):
        return np.array([len(text.encode()) for text in self.texts], np.int64)


BOOK = "".join(f"line {i} of a book, with words. Déjà vu;\n" for i in range(40_000))
SOURCE = Texts((BOOK, "short", "€" * 3_000, BOOK[:500_000]))
LEAST, MOST = 8_192, 131_072


def texts_of(source):
    corpus = source.open("")
    return [corpus[i] for i in range(len(corpus))]


def test_stretches_make_up_the_texts():
    found = texts_of(Excerpts(SOURCE, LEAST, MOST))
    assert "".join(found) == "".join(SOURCE.texts)
    assert "short" in found
    # Lines of 3-byte characters and stretches of at least one: the smallest that is allowed.
    tiny = texts_of(Excerpts(Texts(("€€€", "", "𝄞 𝄞a b𝄞")), least=4, most=5))
    assert "".join(tiny) == "€€€𝄞 𝄞a b𝄞"
    assert all(tiny)


def test_stretches_end_between_words():
    found = texts_of(Excerpts(Texts((BOOK,)), LEAST, MOST))
    assert len(found) > 20
    assert all(a[-1].isalnum() and b[0] == " " and b[1].isalnum() for a, b in itertools.pairwise(found))


def test_lengths_are_log_uniform():
    corpus = Excerpts(Texts((BOOK,) * 12), LEAST, MOST).open("")
    sizes = corpus.sizes()
    assert sizes.sum() == 12 * len(BOOK.encode())
    assert sizes.max() < MOST + 4_096
    share = np.histogram(np.log2(sizes / LEAST), range(5))[0] / (sizes >= LEAST).sum()
    np.testing.assert_allclose(share, 0.25, atol=0.06)  # of each doubling, by number


def test_another_seed_or_length_cuts_elsewhere_and_is_another_stream():
    sources = [Excerpts(SOURCE, *sizes) for sizes in ((LEAST, MOST), (LEAST, MOST, 1), (LEAST, 2 * MOST))]
    sources.append(Excerpts(Texts(SOURCE.texts[:1]), LEAST, MOST))
    assert len({source.open("").fingerprint for source in sources}) == len(sources)
    assert len({len(text) for text in (texts_of(source)[0] for source in sources[:3])}) == 3
    assert texts_of(sources[0]) == texts_of(sources[0])
    assert sources[0].open("").fingerprint == sources[0].open("").fingerprint


def test_a_stream_of_excerpts_can_be_resumed():
    spec = DataSpec(Excerpts(SOURCE, LEAST, MOST), packing="fit", window=2, prefetch=0)
    first, second = (build_pipeline(spec, load_tokenizer("bytes"), batch=1, length=MOST) for _ in range(2))
    try:
        rows = [next(first) for _ in range(3)]
        second.set_state(first.get_state())
        np.testing.assert_array_equal(next(first)["inputs"], next(second)["inputs"])
        assert max(row["segment_ids"].max() for row in rows) > 1
    finally:
        first.close()
        second.close()


def test_errors_name_what_is_wrong():
    for sizes in ((3, 8), (100, 99)):
        with pytest.raises(DataError, match=f"least {sizes[0]}"):
            Excerpts(SOURCE, *sizes)
    with pytest.raises(DataError, match=r"Excerpts\.source"):
        Excerpts(Texts((Scored("a question", 2),)), LEAST, MOST).open("")
    assert Excerpts(Texts(("a",), split="validation")).split == "validation"
