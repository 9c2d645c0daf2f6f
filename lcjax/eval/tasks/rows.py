"""Rows of data sets: JSON lines in a file, a folder or a zip; a Hugging Face data set file; a named TFDS set."""

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

type Row = dict[str, Any]

_ANSWERS = ("answers", "references", "outputs")


class RowError(ValueError):
    """A row or file that does not have its data set's schema; the message names file, line and field."""


def read_rows(source: str, fields: Sequence[str], member: str = "") -> list[Row]:
    """All rows of `source`, each with at least `fields`.

    source: a `*.jsonl` or `*.json` file; a folder or zip, of which `member` (such as "qasper.jsonl") is read wherever
    it lies; "hf:org/name/path/in/set" (the file is downloaded with `huggingface_hub`); or "tfds:name:split".
    Raises FileNotFoundError, or RowError naming the line and the missing field.
    """
    if source.startswith("tfds:"):
        return check_rows(_tfds_rows(source.removeprefix("tfds:")), fields, source)
    path = _download(source.removeprefix("hf:")) if source.startswith("hf:") else Path(source)
    label, text = _read(path, member)
    return check_rows(_parse(text, label), fields, label)


def check_rows(rows: Iterable[Row], fields: Sequence[str], label: str) -> list[Row]:
    """The rows as a list; RowError for no rows, a missing field, and no answer in a list of them."""
    checked = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RowError(f"{label}, row {number}: a JSON object is wanted, got {type(row).__name__}")
        missing = [name for name in fields if name not in row]
        if missing:
            raise RowError(
                f"{label}, row {number}: the field {missing[0]!r} is missing; it has {', '.join(sorted(row))}"
            )
        if empty := [name for name in _ANSWERS if name in fields and not row[name]]:
            raise RowError(f"{label}, row {number}: `{empty[0]}` is empty; give at least one answer")
        checked.append(row)
    if not checked:
        raise RowError(f"{label} holds no rows")
    return checked


def members(source: str, suffix: str = ".jsonl") -> list[str]:
    """Names of the files with that suffix in a folder or zip, sorted."""
    path = Path(source)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return sorted(Path(name).name for name in archive.namelist() if name.endswith(suffix))
    return sorted(file.name for file in path.rglob(f"*{suffix}"))


def _read(path: Path, member: str) -> tuple[str, str]:
    if not path.exists():
        raise FileNotFoundError(
            f"data set {str(path)!r} does not exist; give a file, a folder, a zip or 'hf:org/name/file'"
        )
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if Path(name).name == member]
            if names:
                return f"{path.name}:{names[0]}", archive.read(names[0]).decode("utf-8")
        raise FileNotFoundError(f"{path.name} holds no file {member!r}")
    if path.is_dir():
        found = sorted(path.rglob(member)) if member else []
        if not found:
            raise FileNotFoundError(f"folder {path.name!r} holds no file {member!r}")
        path = found[0]
    return path.name, path.read_text(encoding="utf-8")


def _parse(text: str, label: str) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        yield from _json(text, label)
        return
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            yield _json(line, f"{label}, line {number}")


def _json(text: str, label: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as cause:
        raise RowError(f"{label}: no JSON ({cause.msg}, line {cause.lineno}, column {cause.colno})") from None


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    organisation, repository, file = name.split("/", 2)
    return Path(hf_hub_download(f"{organisation}/{repository}", file, repo_type="dataset"))


def _tfds_rows(name: str) -> Iterator[Row]:
    import tensorflow_datasets as tfds

    data_set, _, split = name.partition(":")
    rows: Any = tfds.data_source(data_set, split=split or "test")
    for row in rows:
        yield {key: value.decode("utf-8") if isinstance(value, bytes) else value for key, value in row.items()}
