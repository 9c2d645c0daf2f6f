"""UTF-8 bytes as tokens: no file, no vocabulary to fit, every text exact."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsInt

from lcjax.data.tokenizers import chat
from lcjax.data.tokenizers.base import fingerprint, with_bos

CONFIG_CLASS = "ByteTokenizer"


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256, 257 and 258 begin, end and pad. Special tokens have no written form."""

    vocab_size: int = 259
    adds_bos: bool = False

    def __init__(self, chat_template: str | None = None):
        self.bos_id: int | None = 256
        self.eos_id: int | None = 257
        self.pad_id: int | None = 258
        self.stop_ids = frozenset((257,))
        self.chat_template = chat_template
        self.fingerprint = fingerprint(kind="bytes", special=[256, 257, 258])

    def encode(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """One id a byte; a lone surrogate, which UTF-8 cannot hold, gives three bytes that decode to U+FFFD."""
        del special
        return with_bos(list(text.encode("utf-8", "surrogatepass")), add_bos, self.bos_id)

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = False) -> str:
        """Bytes read as UTF-8; special ids leave no text."""
        del skip_special
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", "replace")

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The chat template given at construction, filled."""
        return chat.render(self.chat_template, messages, add_generation_prompt, {}, variables)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer_config.json`."""
        chat.write_config(folder, {"tokenizer_class": CONFIG_CLASS}, self.chat_template)
