"""What a checkpoint is made of: fingerprints of the run that wrote it and a checksum of every file in it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1

type Sections = dict[str, Any]
"""Section name ('model', 'optimizer', 'data', 'tokenizer', ...) -> JSON value. Two runs may share checkpoints when all
sections are equal."""


def describe(value: Any) -> Any:
    """A JSON value that says what `value` is: records by type name and fields, everything else as it stands."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def rebuild(value: Any, types: Mapping[str, type]) -> Any:
    """What `describe` described, from records named in `types`; lists come back as tuples."""
    if isinstance(value, dict) and "" in value:
        fields = {key: rebuild(item, types) for key, item in value.items() if key}
        if value[""] not in types:
            raise ValueError(f"{NAME} describes a {value['']}, which this version does not know")
        return types[value[""]](**fields)
    if isinstance(value, list):
        return tuple(rebuild(item, types) for item in value)
    return value


def differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Every leaf that differs, as 'name: saved -> wanted'."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [*saved, *(key for key in wanted if key not in saved)]
        parts = [differences(saved.get(k), wanted.get(k), f"{name}.{k}".strip(".")) for k in keys]
        return [line for part in parts for line in part]
    if isinstance(saved, list) and isinstance(wanted, list) and len(saved) == len(wanted):
        parts = [differences(s, w, f"{name}[{i}]") for i, (s, w) in enumerate(zip(saved, wanted, strict=True))]
        return [line for part in parts for line in part]
    return [] if saved == wanted else [f"{name or 'value'}: {_short(saved)} -> {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def write(folder: Path, step: int, sections: Sections) -> None:
    """Hash every file under `folder` and write its manifest there, flushed to disk."""
    files = {str(path.relative_to(folder)): _entry(path) for path in _files(folder)}
    body = {"format": FORMAT, "step": step, "sections": sections, "files": files}
    text = json.dumps({"sha256": _digest(body), "manifest": body}, indent=1)
    with open(folder / NAME, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError when it is missing or not one."""
    try:
        text = json.loads((folder / NAME).read_text())
        manifest, digest = text["manifest"], text["sha256"]
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{NAME} is damaged ({error})") from None
    if _digest(manifest) != digest:
        raise ValueError(f"{NAME} does not match its own checksum")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{NAME} has format {manifest['format']}, and this version reads format {FORMAT}")
    return manifest


def damage(folder: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with the files of a checkpoint, or '' when each has its recorded size and SHA-256."""
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if _entry(path) != entry:
            return f"{name} does not match its checksum"
    return ""


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
