"""Tokenizers and small data sets that the tests of the suites share."""

import functools
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lcjax.data.tokenizers import load_tokenizer
from lcjax.data.tokenizers.bytes import ByteTokenizer
from lcjax.data.tokenizers.pieces import load_model
from lcjax.eval.haystack import load_haystack

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def plain() -> Any:
    """Bytes, no template."""
    return load_tokenizer("bytes")


def chatty() -> Any:
    """Bytes with a chat template."""
    return ByteTokenizer(CHAT)


@functools.cache
def pieces(folder: Path) -> Any:
    """A SentencePiece model trained on the haystack, which adds a BOS."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(load_haystack().take(1500)),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.99,
        minloglevel=2,
        num_threads=1,
    )
    path = folder / "tiny.model"
    path.write_bytes(model.getvalue())
    return load_model(path)


@functools.cache
def smollm2() -> Any:
    """SmolLM2's tokenizer from its GGUF, or a skip."""
    places = [os.environ.get("LCJAX_SMOLLM2", ""), *map(str, Path("models").glob("**/SmolLM2*.gguf"))]
    found = next((place for place in places if place and Path(place).exists()), None)
    if found is None:
        pytest.skip("needs SmolLM2: set LCJAX_SMOLLM2 to its GGUF, or run `make smollm2`")
    return load_tokenizer(found)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """JSON lines; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
