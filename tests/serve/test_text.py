"""Streaming text: characters stay whole, stop strings are never shown."""

import pytest

from lcjax.data.tokenizers import load_tokenizer
from lcjax.serve.text import TextStream

TOKENIZER = load_tokenizer("bytes")


def stream(text: str, stop: tuple[str, ...] = (), size: int = 1) -> tuple[list[str], TextStream]:
    out, ids = TextStream(TOKENIZER, stop), TOKENIZER.encode(text)
    pieces = [out.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*pieces, out.finish()], out


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_characters_come_whole(size):
    text = "naïve 世界 🙂 end"
    pieces, out = stream(text, size=size)
    assert "".join(pieces) == out.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_are_shown_at_the_end():
    out = TextStream(TOKENIZER)
    pieces = out.push(TOKENIZER.encode("ok") + TOKENIZER.encode("世")[:2])
    assert (pieces, out.finish()) == ("ok", "\ufffd")


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_stop_strings_split_over_tokens(size):
    pieces, out = stream("one STOX two STOP three", stop=("STOP", "never"), size=size)
    assert "".join(pieces) == "one STOX two "
    assert out.stopped


def test_text_that_might_be_a_stop_waits():
    out = TextStream(TOKENIZER, stop=("END",))
    assert [out.push(TOKENIZER.encode(c)) for c in "aENx"] == ["a", "", "", "ENx"]
    assert not out.stopped


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        TextStream(TOKENIZER, stop=("",))
