"""What every tokenizer offers, and how its fingerprint is made."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, SupportsInt, runtime_checkable


class TokenizerError(ValueError):
    """A tokenizer is missing, damaged, of an unknown kind, or asked for what it does not have."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. `decode(encode(text)) == text` for text in the tokenizer's normal form."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool  # whether the model was trained with `bos_id` before every text
    stop_ids: frozenset[int]  # ids that end an answer
    chat_template: str | None
    fingerprint: str  # SHA-256 of vocabulary, merges, special tokens and normalisation

    def encode(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text. `special` reads special tokens written out in the text, as chat templates need."""
        ...

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The chat template filled with messages such as `{"role": "user", "content": "Hello"}`."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write files that `load_tokenizer(folder)` reads back as the same tokenizer."""
        ...


def around(tokenizer: Tokenizer, before: str, after: str) -> tuple[str, str]:
    """A user's message in the chat template, on both sides of the place that lies between `before` and `after`."""
    mark = "\u2063"  # an invisible character
    left, right = tokenizer.render_chat([{"role": "user", "content": before + mark + after}]).split(mark)
    return left, right


def fingerprint(**parts: Any) -> str:
    """SHA-256 of JSON-able parts, independent of key order, machine and library version."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def with_bos(ids: list[int], add_bos: bool, bos_id: int | None) -> list[int]:
    """The ids, after `bos_id` where asked for."""
    if not add_bos:
        return ids
    if bos_id is None:
        raise TokenizerError("add_bos=True was asked of a tokenizer without a beginning-of-text token: leave it False")
    return [bos_id, *ids]


def stop_tokens(eos_id: int | None, ids: Iterable[int | None]) -> frozenset[int]:
    """The ids that end an answer: the end of text and the ends of turns that are known."""
    return frozenset(i for i in (eos_id, *ids) if i is not None)


# Tokens that end a chat turn in the shipped families; a file rarely names them.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
