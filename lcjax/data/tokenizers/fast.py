"""Tokenizers that the `tokenizers` library runs: `tokenizer.json`, and byte-level BPE rebuilt from GGUF."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsInt

import tokenizers

from lcjax.data.tokenizers import chat
from lcjax.data.tokenizers.base import TURN_ENDS, TokenizerError, fingerprint, stop_tokens, with_bos


@dataclass(frozen=True)
class SpecialTokens:
    """Special ids and what the file says about their use."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    adds_bos: bool = False
    stop_ids: frozenset[int] = frozenset()


class FastTokenizer:
    """A `Tokenizer` over one `tokenizers.Tokenizer`."""

    def __init__(self, core: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None = None):
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._plain: tokenizers.Tokenizer | None = None
        self._special = special
        vocab = core.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos_id, self.eos_id, self.pad_id = special.bos_id, special.eos_id, special.pad_id
        self.adds_bos = special.adds_bos
        ends = [vocab.get(token) for token in TURN_ENDS]
        self.stop_ids = stop_tokens(self.eos_id, (*special.stop_ids, *ends))
        self.chat_template = chat_template
        content = json.loads(core.to_str())
        self.fingerprint = fingerprint(
            vocabulary=sorted((i, token) for token, i in vocab.items()),
            merges=content["model"].get("merges"),
            added=[(t["id"], t["special"], t["normalized"]) for t in content["added_tokens"]],
            normalizer=content["normalizer"],
            pre_tokenizer=content["pre_tokenizer"],
            special=[self.bos_id, self.eos_id, self.pad_id],
        )

    def encode(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text, without any token that the file's post-processor would add."""
        core = self._core if special else self._without_special()
        (encoding,) = core.encode_batch_fast([text], add_special_tokens=False)
        return with_bos(encoding.ids, add_bos, self.bos_id)

    def _without_special(self) -> tokenizers.Tokenizer:
        """A copy that reads special tokens in a text as plain text."""
        if self._plain is None:
            self._plain = tokenizers.Tokenizer.from_str(self._core.to_str())
            self._plain.encode_special_tokens = True
        return self._plain

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = False) -> str:
        """Text of ids."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _names(self) -> dict[str, str]:
        """Special tokens by the names that templates and config files use."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        ids["unk_token"] = self._special.unk_id
        tokens = {name: self._core.id_to_token(i) for name, i in ids.items() if i is not None}
        return {name: token for name, token in tokens.items() if token is not None}

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The file's chat template, filled; encode the result with `special=True` and without BOS."""
        return chat.render(self.chat_template, messages, add_generation_prompt, self._names(), variables)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.adds_bos} | self._names()
        chat.write_config(folder, config, self.chat_template)
        self._core.save(str(Path(folder) / "tokenizer.json"))


def load_json(file: Path) -> FastTokenizer:
    """A tokenizer from `tokenizer.json`, with what the files beside it say about special tokens and chat."""
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        if type(error) is not Exception:  # what the library raises for every fault of the file
            raise
        raise TokenizerError(f"{file} is not a tokenizer.json that can be read ({error}): fetch it again") from error
    config = sidecar(file.parent)
    special = SpecialTokens(
        bos_id=_special_id(core, config, "bos", file),
        eos_id=_special_id(core, config, "eos", file),
        pad_id=_special_id(core, config, "pad", file),
        unk_id=_special_id(core, config, "unk", file),
        stop_ids=frozenset(config.get("stop_ids", ())),
    )
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = special.bos_id is not None and core.encode("", add_special_tokens=True).ids[:1] == [special.bos_id]
    return FastTokenizer(core, replace(special, adds_bos=bool(adds_bos)), config.get("chat_template"))


def _special_id(core: tokenizers.Tokenizer, config: dict[str, Any], name: str, file: Path) -> int | None:
    token = config.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return config.get(f"{name}_token_id")
    index = core.token_to_id(token)
    if index is None:
        raise TokenizerError(f"{file} holds no token {token!r}, which tokenizer_config.json names as {name}_token")
    return index


def sidecar(folder: Path) -> dict[str, Any]:
    """What `config.json`, `generation_config.json`, `special_tokens_map.json`, `tokenizer_config.json` and
    `chat_template.jinja` say, the later winning; `stop_ids` collects every end-of-text id."""
    merged: dict[str, Any] = {}
    stops: list[int] = []
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise TokenizerError(f"{path} is not JSON ({error}): fetch it again") from error
        for key in ("bos", "eos", "pad", "unk"):
            ids = content.get(f"{key}_token_id")
            listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if listed:
                merged[f"{key}_token_id"] = listed[0]
            if key == "eos":
                stops += listed
        merged |= {k: v for k, v in content.items() if not k.endswith("_token_id") and v is not None}
    template = merged.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        merged["chat_template"] = named.get("default")
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        merged["chat_template"] = jinja.read_text()
    return merged | {"stop_ids": stops}
