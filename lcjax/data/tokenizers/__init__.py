"""Tokenizers: bytes, Hugging Face `tokenizer.json`, SentencePiece, and those inside GGUF files."""

from pathlib import Path

from lcjax.data.tokenizers.base import Tokenizer, TokenizerError

__all__ = ["Tokenizer", "TokenizerError", "load_tokenizer"]

_HUB_FILES = ("tokenizer.json", "tokenizer.model", "*config.json", "special_tokens_map.json", "chat_template.jinja")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
      source: `"bytes"`; a `tokenizer.json` or a folder with one; a SentencePiece `*.model` or a folder with
        `tokenizer.model`; a `*.gguf` file; or `"hf:org/name"`, fetched once by `huggingface_hub`.

    Raises:
      TokenizerError: nothing there, or nothing that can be read.
    """
    if str(source) == "bytes":
        from lcjax.data.tokenizers.bytes import ByteTokenizer

        return ByteTokenizer()
    if str(source).startswith("hf:"):
        import huggingface_hub

        return load_tokenizer(huggingface_hub.snapshot_download(str(source)[3:], allow_patterns=list(_HUB_FILES)))
    path = Path(source)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise TokenizerError(
            f"{path} is not a file or folder: give 'bytes', tokenizer.json, *.model, *.gguf or hf:org/name"
        )
    if path.suffix == ".json":
        from lcjax.data.tokenizers.fast import load_json

        return load_json(path)
    if path.suffix == ".model":
        from lcjax.data.tokenizers.pieces import load_model

        return load_model(path)
    if path.suffix == ".gguf":
        from lcjax.data.tokenizers.gguf import load_gguf

        return load_gguf(path)
    raise TokenizerError(f"{path} has suffix {path.suffix!r}: a tokenizer is read from .json, .model or .gguf")


def _load_folder(folder: Path) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return load_tokenizer(folder / name)
    from lcjax.data.tokenizers.bytes import CONFIG_CLASS, ByteTokenizer
    from lcjax.data.tokenizers.fast import sidecar

    config = sidecar(folder)
    if config.get("tokenizer_class") == CONFIG_CLASS:
        return ByteTokenizer(config.get("chat_template"))
    raise TokenizerError(f"{folder} holds neither tokenizer.json nor tokenizer.model: give a folder that does")
