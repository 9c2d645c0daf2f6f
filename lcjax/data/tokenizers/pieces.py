"""SentencePiece tokenizers: `*.model` files, and the scored vocabulary inside a GGUF as the same model."""

import hashlib
import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import sentencepiece

from lcjax.data.tokenizers import chat
from lcjax.data.tokenizers.base import TURN_ENDS, TokenizerError, fingerprint, stop_tokens, with_bos
from lcjax.data.tokenizers.fast import SpecialTokens, sidecar


class SentencePieceTokenizer:
    """A `Tokenizer` over one SentencePiece model, whose control pieces can be written out in a text.

    The library never reads control pieces from text; here the text is cut at them first, and each stretch between
    is encoded for itself.
    """

    def __init__(self, model: bytes, special: SpecialTokens, chat_template: str | None = None):
        self._model = model
        self._core = sentencepiece.SentencePieceProcessor()
        try:
            self._core.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise TokenizerError(f"the SentencePiece model cannot be read ({error}): fetch it again") from error
        self.vocab_size = self._core.GetPieceSize()
        pieces = [self._core.IdToPiece(i) for i in range(self.vocab_size)]
        control = {pieces[i]: i for i in range(self.vocab_size) if self._core.IsControl(i)}
        self._control = control
        self._control_ids = frozenset(control.values())
        longest_first = sorted(control, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if control else None
        self._special = special
        self.bos_id, self.eos_id, self.pad_id = special.bos_id, special.eos_id, special.pad_id
        self.adds_bos = special.adds_bos
        self.stop_ids = stop_tokens(self.eos_id, (*special.stop_ids, *(control.get(token) for token in TURN_ENDS)))
        self.chat_template = chat_template
        self.fingerprint = fingerprint(
            model=hashlib.sha256(model).hexdigest(), special=[self.bos_id, self.eos_id, self.pad_id]
        )

    def encode(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text."""
        if not special or self._cut is None:
            return with_bos(self._core.EncodeAsIds(text), add_bos, self.bos_id)
        ids: list[int] = []
        for part in self._cut.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids += self._core.EncodeAsIds(part)
        return with_bos(ids, add_bos, self.bos_id)

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = False) -> str:
        """Text of ids; control pieces appear as written unless skipped."""
        text: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i not in self._control_ids:
                run.append(i)
                continue
            text.append(self._core.DecodeIds(run))
            run = []
            if not skip_special:
                text.append(self._core.IdToPiece(i))
        text.append(self._core.DecodeIds(run))
        return "".join(text)

    def _names(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        ids["unk_token"] = self._special.unk_id
        return {name: self._core.IdToPiece(i) for name, i in ids.items() if i is not None}

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The chat template, filled; encode the result with `special=True`, and BOS only if it is not in it."""
        return chat.render(self.chat_template, messages, add_generation_prompt, self._names(), variables)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` and `tokenizer_config.json`."""
        chat.write_config(folder, {"add_bos_token": self.adds_bos} | self._names(), self.chat_template)
        (Path(folder) / "tokenizer.model").write_bytes(self._model)


def load_model(file: Path) -> SentencePieceTokenizer:
    """A tokenizer from a SentencePiece `*.model` file, with the special ids that the model itself names."""
    data = file.read_bytes()
    core = sentencepiece.SentencePieceProcessor()
    try:
        core.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise TokenizerError(f"{file} is not a SentencePiece model ({error}): fetch it again") from error
    config = sidecar(file.parent)
    bos, eos, pad = (i if i >= 0 else None for i in (core.bos_id(), core.eos_id(), core.pad_id()))
    adds_bos = bool(config.get("add_bos_token", bos is not None))
    stops = frozenset(config["stop_ids"])
    special = SpecialTokens(bos, eos, pad, core.unk_id(), adds_bos, stops)
    return SentencePieceTokenizer(data, special, config.get("chat_template"))


def model_from_scores(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], unk_id: int | None, dummy_prefix: bool
) -> bytes:
    """A serialised SentencePiece BPE model from the fields of a GGUF, whose token types are SentencePiece's own.

    Args:
      pieces, scores, kinds: one entry a token; kinds as in `gguf.TokenType`.
      unk_id: the unknown token, where no token has that type: some converters mark it as a control token.
      dummy_prefix: whether a space is put before a text.
    """
    schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    types = schema.ModelProto.SentencePiece
    kinds = list(kinds)
    if types.UNKNOWN not in kinds and unk_id is not None and 0 <= unk_id < len(kinds):
        kinds[unk_id] = types.UNKNOWN
    if kinds.count(types.UNKNOWN) != 1:
        raise TokenizerError(f"the vocabulary has {kinds.count(types.UNKNOWN)} unknown tokens: SentencePiece needs one")
    unk_id = kinds.index(types.UNKNOWN)
    proto = schema.ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        # Converters write the spaces of user-defined tokens plainly; SentencePiece sees them escaped.
        text = piece.replace(" ", "\u2581") if kind == types.USER_DEFINED else piece
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = schema.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = kinds.count(types.BYTE) == 256
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.unk_id = unk_id
    proto.trainer_spec.unk_piece = pieces[unk_id]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString()
