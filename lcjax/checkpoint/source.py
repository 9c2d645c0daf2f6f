"""What every reader of a tensor file offers: names, shapes and one tensor at a time."""

import hashlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

_HASH_CHUNK = 1 << 24


class TensorFileError(ValueError):
    """A tensor file is missing, damaged, truncated, or uses what this library does not read."""


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read one at a time, so that a model never sits in memory twice.

    Shapes are row-major, in the order that PyTorch and Hugging Face use: `[out, in]` for a linear weight.
    """

    metadata: dict[str, Any]

    def names(self) -> list[str]:
        """Tensor names, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header alone."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor. Raises `TensorFileError` if its payload cannot be right."""
        ...


def existing_file(path: str | Path) -> Path:
    """The path, if it is a file; else a `TensorFileError`."""
    path = Path(path)
    if not path.is_file():
        raise TensorFileError(f"{path} is not a file: give the path of an existing tensor file")
    return path


def verify_sha256(path: Path, expected: str | None) -> None:
    """Raises if the file's SHA-256 differs from `expected` (hexadecimal); `None` checks nothing."""
    if expected is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected.lower():
        raise TensorFileError(
            f"{path} has SHA-256 {digest.hexdigest()} where {expected.lower()} was expected: fetch the file again"
        )


def check_finite(array: np.ndarray, path: Path, name: str) -> np.ndarray:
    """The array; raises if a floating-point value is NaN or infinite, the visible trace of a damaged payload."""
    integral = array.dtype.kind in "iub"
    if not integral and not np.isfinite(array).all():
        raise TensorFileError(
            f"{path}: tensor {name!r} holds NaN or infinite values: the file is damaged, fetch it again"
        )
    return array


def unknown_tensor(path: Path, name: str, names: list[str]) -> TensorFileError:
    """The error for a name that a file does not hold, with the nearest one that it does."""
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return TensorFileError(f"{path} holds no tensor {name!r}{hint}")
