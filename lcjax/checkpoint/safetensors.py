"""Safetensors files: one file or shards with an index, read lazily, written shard by shard."""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from lcjax.checkpoint.source import TensorFileError, check_finite, existing_file, unknown_tensor, verify_sha256

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class _Shard:
    """One file, mapped read-only, its header checked."""

    def __init__(self, path: Path, sha256: str | None):
        self.path = existing_file(path)
        verify_sha256(path, sha256)
        size = path.stat().st_size
        if size < 8:
            raise TensorFileError(f"{path} has {size} bytes, too few for a safetensors header: fetch the file again")
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata, self.entries = _read_header(path, self._data)

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        flat = np.frombuffer(self._data, entry.dtype, math.prod(entry.shape), entry.start)
        return check_finite(flat.reshape(entry.shape), self.path, name)


def _damaged(path: Path, what: str) -> TensorFileError:
    return TensorFileError(f"{path}: {what}: the file is damaged, fetch it again")


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, str], dict[str, _Entry]]:
    (length,) = struct.unpack_from("<Q", data)
    if length > min(_MAX_HEADER, len(data) - 8):
        raise _damaged(path, f"the header claims {length} bytes in a file of {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise _damaged(path, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    base = 8 + length
    entries: dict[str, _Entry] = {}
    end = 0
    spans = []
    for name, info in header.items():
        entry, stop = _read_entry(path, name, info, base)
        entries[name] = entry
        spans.append((entry.start - base, stop, name))
    for start, stop, name in sorted(spans):
        if start != end:
            raise _damaged(path, f"tensor {name!r} starts at byte {start} where {end} was due")
        end = stop
        if base + end > len(data):
            missing = base + end - len(data)
            raise TensorFileError(
                f"{path}: tensor {name!r} ends {missing} bytes past the end of the file: "
                "the file is truncated, fetch it again"
            )
    if base + end != len(data):
        raise _damaged(path, f"{len(data) - base - end} bytes belong to no tensor")
    return metadata, entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _read_entry(path: Path, name: str, info: Any, base: int) -> tuple[_Entry, int]:
    """One tensor's place and its end relative to the data section."""
    try:
        code, shape, (start, stop) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        sizes_ok = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header row of tensor {name!r} is malformed") from error
    if not sizes_ok:
        raise _damaged(path, f"the header row of tensor {name!r} is malformed")
    if code not in _DTYPES:
        raise TensorFileError(
            f"{path}: tensor {name!r} has type {code!r}, which is not read; use one of {', '.join(_DTYPES)}"
        )
    dtype = np.dtype(_DTYPES[code])
    due = math.prod(shape) * dtype.itemsize
    if stop - start != due:
        raise _damaged(path, f"tensor {name!r} of shape {shape} needs {due} bytes and has {stop - start}")
    return _Entry(dtype, shape, base + start), stop


class SafetensorsFolder:
    """A `TensorSource` over one file or over shards; `read` returns a read-only view in the stored dtype."""

    def __init__(self, path: Path, shards: list[_Shard], place: dict[str, _Shard]):
        self.path = path
        self.metadata: dict[str, Any] = {}
        for shard in shards:
            self.metadata |= shard.metadata
        self._place = place

    def names(self) -> list[str]:
        """Tensor names, in index or file order."""
        return list(self._place)

    def _shard(self, name: str) -> _Shard:
        if name not in self._place:
            raise unknown_tensor(self.path, name, self.names())
        return self._place[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header alone."""
        return self._shard(name).entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype, from the header alone."""
        return self._shard(name).entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor, mapped from the file; raises `TensorFileError` if a value is not finite."""
        return self._shard(name).read(name)


def open_folder(path: str | Path, *, sha256: Mapping[str, str] | None = None) -> SafetensorsFolder:
    """Open a folder of safetensors (sharded index or single file) or one `*.safetensors` file.

    Args:
      path: the folder or file.
      sha256: hexadecimal digests by file name, checked for the files named. The format holds no checksum: without
        a digest, a flipped bit of the payload is seen only where it makes a value infinite or NaN.

    Raises:
      TensorFileError: missing, truncated or damaged file, an index that disagrees with its shards.
    """
    path = Path(path)
    digests = sha256 or {}
    if path.is_dir():
        if (path / INDEX_NAME).is_file():
            return _open_index(path, digests)
        files = sorted(path.glob("*.safetensors"))
        if (path / SINGLE_NAME) in files:
            files = [path / SINGLE_NAME]
        if len(files) != 1:
            raise TensorFileError(
                f"{path} holds {len(files)} safetensors files and no {INDEX_NAME}: give a folder with one of either"
            )
        path = files[0]
    shard = _Shard(existing_file(path), digests.get(path.name))
    return SafetensorsFolder(path, [shard], dict.fromkeys(shard.entries, shard))


def _open_index(folder: Path, digests: Mapping[str, str]) -> SafetensorsFolder:
    index = folder / INDEX_NAME
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, "the index has no valid 'weight_map'") from error
    shards: dict[str, _Shard] = {}
    place: dict[str, _Shard] = {}
    for name, file in pairs:
        if file not in shards:
            if Path(file).name != file:
                raise _damaged(index, f"shard name {file!r} is not a plain file name")
            if not (folder / file).is_file():
                raise TensorFileError(f"{folder / file} is missing: {index.name} places tensor {name!r} in it")
            shards[file] = _Shard(folder / file, digests.get(file))
        if name not in shards[file].entries:
            raise TensorFileError(f"{folder / file} holds no tensor {name!r}, which {index.name} places in it")
        place[name] = shards[file]
    return SafetensorsFolder(folder, list(shards.values()), place)


def write_folder(
    path: str | Path,
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write tensors as safetensors, holding at most one shard in memory.

    Args:
      path: the folder, made if absent. It must hold no safetensors yet: nothing is overwritten.
      tensors: a mapping, or pairs of name and array, consumed once and in order.
      metadata: strings for each file's header; `format: pt` is added, which Hugging Face loaders ask for.
      max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets its own shard.

    Returns:
      The shard files. Two or more come with `model.safetensors.index.json`. Until the last tensor is written, files
      carry the suffix `.part`, so a broken run leaves no folder that looks whole.

    Raises:
      TensorFileError: a name given twice, a dtype without a safetensors type, existing files, a failing disk.
    """
    folder = Path(path)
    if max_shard_bytes <= 0:
        raise TensorFileError(f"max_shard_bytes is {max_shard_bytes}: give a positive number of bytes")
    present = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if present:
        raise TensorFileError(f"{present[0]} exists: write to an empty folder, nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"} | dict(metadata or {})
    pairs = cast(Iterable[tuple[str, np.ndarray]], tensors.items() if isinstance(tensors, Mapping) else tensors)
    parts: list[Path] = []
    shard_of: dict[str, int] = {}
    total = 0
    for number, shard in enumerate(_split(pairs, max_shard_bytes)):
        parts.append(folder / f"model-{number + 1:05d}.part")
        _save(parts[-1], shard, header)
        shard_of |= dict.fromkeys(shard, number)
        total += sum(array.nbytes for array in shard.values())
    count = len(parts)
    files = [
        folder / (SINGLE_NAME if count == 1 else f"model-{n + 1:05d}-of-{count:05d}.safetensors") for n in range(count)
    ]
    for part, file in zip(parts, files, strict=True):
        part.rename(file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: files[n].name for name, n in shard_of.items()}}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _split(pairs: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    """Consecutive groups of at most `limit` bytes, or one tensor."""
    shard: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    size = 0
    for name, value in pairs:
        if name in seen:
            raise TensorFileError(f"tensor {name!r} was given twice: every name is written once")
        seen.add(name)
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    if shard or not seen:
        yield shard


def _save(path: Path, shard: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """One shard, flushed to the disk before it counts as written."""
    codes = {np.dtype(dtype) for dtype in _DTYPES.values()}
    for name, array in shard.items():
        if array.dtype not in codes:
            raise TensorFileError(
                f"tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold: cast it first"
            )
    try:
        safetensors.numpy.save_file(shard, path, metadata)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, safetensors.SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise TensorFileError(f"{path} could not be written ({error}): free space or choose another folder") from error
