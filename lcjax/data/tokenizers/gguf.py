"""The tokenizer inside a GGUF file, rebuilt from its metadata."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lcjax.checkpoint.gguf import open_file
from lcjax.data.tokenizers.base import Tokenizer, TokenizerError
from lcjax.data.tokenizers.fast import FastTokenizer, SpecialTokens
from lcjax.data.tokenizers.pieces import SentencePieceTokenizer, model_from_scores

_CONTROL, _USER_DEFINED = 3, 4

# How a text is cut before the merges: a name of `pre_tokenizers` below, or a pattern whose matches are the words.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"
_CUTS = {
    "gpt-2": "words",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _CASED,
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")


def load_gguf(file: Path) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE (`gpt2`) or SentencePiece with scores (`llama`)."""
    metadata = open_file(file).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise TokenizerError(f"{file} holds no tokenizer (no tokenizer.ggml.model): give one beside it")
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in builders:
        raise TokenizerError(
            f"{file} has tokenizer model {kind!r}, which is not read: use one of {', '.join(builders)}"
        )
    return builders[kind](file, metadata)


def _special(metadata: dict[str, Any], adds_bos: bool) -> SpecialTokens:
    def get(name: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{name}_token_id")

    turn = (get("eot"), get("eom"))
    return SpecialTokens(
        bos_id=get("bos"),
        eos_id=get("eos"),
        pad_id=get("padding"),
        unk_id=get("unknown"),
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        stop_ids=frozenset(i for i in turn if i is not None),
    )


def _field(file: Path, metadata: dict[str, Any], name: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values:
        raise TokenizerError(f"{file} has no tokenizer.ggml.{name}: its tokenizer is incomplete, fetch it again")
    return values


def _vocabulary(file: Path, metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types; refuses a vocabulary with a token twice or types that do not match."""
    tokens = _field(file, metadata, "tokens")
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise TokenizerError(f"{file} has {len(tokens)} tokens and {len(kinds)} token types: the file is damaged")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        for token in tokens:
            if token in seen:
                raise TokenizerError(f"{file} holds token {token!r} twice: the file is damaged")
            seen.add(token)
    return tokens, kinds


def _byte_level(file: Path, metadata: dict[str, Any]) -> Tokenizer:
    tokens, kinds = _vocabulary(file, metadata)
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    cut = _CUTS.get(pre)
    if cut is None:
        raise TokenizerError(f"{file} has pre-tokenizer {pre!r}, which is not known: use one of {', '.join(_CUTS)}")
    merges = [tuple(merge.split(" ")) for merge in _field(file, metadata, "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise TokenizerError(f"{file} has the merge {merge}, which its tokens do not allow: fetch it again")
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _COMPOSED:
        core.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in ("words", "digits"))
    first = {
        "words": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
    }.get(cut, [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated")])
    core.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([_added(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL])
    core.add_tokens([_added(t, special=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED])
    special = _special(metadata, adds_bos=pre in _WHOLE_WORDS_FIRST)
    return FastTokenizer(core, special, metadata.get("tokenizer.chat_template"))


def _added(token: str, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False, special=special)


def _sentence_piece(file: Path, metadata: dict[str, Any]) -> Tokenizer:
    tokens, kinds = _vocabulary(file, metadata)
    scores = _field(file, metadata, "scores")
    if len(scores) != len(tokens):
        raise TokenizerError(f"{file} has {len(tokens)} tokens and {len(scores)} scores: the file is damaged")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    special = _special(metadata, adds_bos=True)
    model = model_from_scores(tokens, scores, kinds, special.unk_id, prefix)
    return SentencePieceTokenizer(model, special, metadata.get("tokenizer.chat_template"))
