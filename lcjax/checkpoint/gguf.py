"""GGUF files: a checked header, and tensors dequantised one at a time by the `gguf` library.

The header is parsed here and not by `gguf.GGUFReader`, which takes seconds on a large vocabulary and does not
check a damaged file's bounds. Format: the GGUF specification, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcjax.checkpoint.source import TensorFileError, check_finite, existing_file, unknown_tensor, verify_sha256

READABLE_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: `shape` row-major, `start` and `size` in bytes."""

    shape: tuple[int, ...]
    type_name: str
    start: int
    size: int


class GGUFFile:
    """A `TensorSource` over one GGUF file; `read` returns float32 whatever the stored type."""

    def __init__(self, path: Path, metadata: dict[str, Any], entries: dict[str, _Entry], data: mmap.mmap):
        self.path = path
        self.metadata = metadata
        self._entries = entries
        self._data = data

    def names(self) -> list[str]:
        """Tensor names, in file order."""
        return list(self._entries)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise unknown_tensor(self.path, name, self.names())
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in row-major order (GGUF stores it reversed)."""
        return self._entry(name).shape

    def type_name(self, name: str) -> str:
        """Stored type, such as `Q4_1`."""
        return self._entry(name).type_name

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32; raises `TensorFileError` if a value is not finite."""
        import gguf

        entry = self._entry(name)
        raw = np.frombuffer(self._data, np.uint8, count=entry.size, offset=entry.start)
        rows = raw.reshape(*entry.shape[:-1], -1)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[entry.type_name])
        return check_finite(values.reshape(entry.shape), self.path, name)


class _Cursor:
    """Reads the header left to right; running past the end is an error that says where."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.at = 0
        self.doing = "the file header"

    def fail(self, what: str) -> TensorFileError:
        return TensorFileError(f"{self.path}: {what} while reading {self.doing}: the file is damaged, fetch it again")

    def take(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise self.fail(f"{count} bytes are needed at byte {start} of a file of {len(self.data)} bytes")
        return start

    def number(self, code: str) -> Any:
        size = struct.calcsize(code)
        return struct.unpack_from(code, self.data, self.take(size))[0]

    def text(self) -> str:
        count = self.number("<Q")
        start = self.take(count)
        try:
            return self.data[start : start + count].decode()
        except UnicodeDecodeError as error:
            raise self.fail("a string that is not UTF-8 was met") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"unknown value type {kind} was met")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.data, dtype, 1, self.take(dtype.itemsize))[0].item()

    def array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize)).tolist()
        if count > len(self.data):
            raise self.fail(f"an array of {count} values does not fit in a file of {len(self.data)} bytes")
        if kind == _STRING:
            return self.texts(count)
        if kind != _ARRAY:
            raise self.fail(f"unknown array type {kind} was met")
        return [self.array() for _ in range(count)]

    def texts(self, count: int) -> list[str]:
        """Many strings in one tight loop: a vocabulary has hundreds of thousands."""
        data, size, length_at = self.data, len(self.data), struct.Struct("<Q").unpack_from
        found: list[str] = []
        at = self.at
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                if at > size:
                    raise self.fail(f"a string that ends at byte {at} of a file of {size} bytes was met")
                found.append(data[start:at].decode())
        except struct.error as error:
            raise self.fail(f"a string at byte {at} of a file of {size} bytes was met") from error
        except UnicodeDecodeError as error:
            raise self.fail("a string that is not UTF-8 was met") from error
        self.at = at
        return found


def open_file(path: str | Path, *, sha256: str | None = None) -> GGUFFile:
    """Open a GGUF file and check its whole header.

    Args:
      path: the file.
      sha256: hexadecimal digest to check the file against. GGUF holds no checksum: without a digest, a flipped bit
        of the payload is seen only where it makes a value infinite or NaN.

    Returns:
      A `TensorSource` whose `metadata` holds the file's key/value pairs, arrays as lists.

    Raises:
      TensorFileError: missing, truncated or damaged file, a tensor type outside `READABLE_TYPES`, a split file.
    """
    path = existing_file(path)
    verify_sha256(path, sha256)
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise TensorFileError(f"{path} is empty: fetch the file again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    magic = bytes(data[:4])
    if magic != _MAGIC:
        raise TensorFileError(f"{path} is not a GGUF file: it starts with {magic!r}, not {_MAGIC!r}")
    cursor.take(4)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        raise TensorFileError(f"{path} is GGUF version {version}: versions 2 and 3, little-endian, are read")
    tensor_count, pair_count = cursor.number("<Q"), cursor.number("<Q")
    metadata = _read_metadata(cursor, pair_count)
    if metadata.get("split.count", 0) > 1:
        raise TensorFileError(
            f"{path} is one of {metadata['split.count']} split files: join them first (llama-gguf-split --merge)"
        )
    return GGUFFile(path, metadata, _read_entries(cursor, tensor_count, metadata), data)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        cursor.doing = f"metadata key {index}"
        key = cursor.text()
        cursor.doing = f"metadata {key!r}"
        if key in metadata:
            raise cursor.fail("a second value was met")
        metadata[key] = cursor.value(cursor.number("<I"))
    return metadata


def _read_entries(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, _Entry]:
    """Tensor table; every tensor must follow the last one, so a flipped size, type or offset cannot pass."""
    align = metadata.get("general.alignment", 32)
    cursor.doing = "metadata 'general.alignment'"
    if not isinstance(align, int) or align <= 0 or align & (align - 1):
        raise cursor.fail(f"{align!r}, not a power of two, was met")
    infos = [_read_info(cursor, index) for index in range(count)]
    base = _aligned(cursor.at, align)
    entries: dict[str, _Entry] = {}
    end = 0
    for name, shape, type_name, size, offset in infos:
        cursor.doing = f"tensor {name!r}"
        if name in entries:
            raise cursor.fail("a second tensor of this name was met")
        if offset != _aligned(end, align):
            raise cursor.fail(f"offset {offset} was met where {_aligned(end, align)} was due")
        end = offset + size
        if base + end > len(cursor.data):
            missing = base + end - len(cursor.data)
            raise TensorFileError(
                f"{cursor.path}: tensor {name!r} ends {missing} bytes past the end of the file: "
                "the file is truncated, fetch it again"
            )
        entries[name] = _Entry(shape, type_name, base + offset, size)
    extra = len(cursor.data) - base - _aligned(end, align)
    if extra > 0:
        cursor.doing = "the end of the file"
        raise cursor.fail(f"{extra} bytes that belong to no tensor were met")
    return entries


def _read_info(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], str, int, int]:
    """One row of the tensor table: name, row-major shape, type, bytes, offset in the data section."""
    import gguf

    cursor.doing = f"tensor table row {index}"
    name = cursor.text()
    cursor.doing = f"tensor {name!r}"
    rank = cursor.number("<I")
    if not 1 <= rank <= _MAX_DIMS:
        raise cursor.fail(f"{rank} dimensions were met")
    shape = tuple(cursor.number("<Q") for _ in range(rank))[::-1]
    kind = cursor.number("<I")
    offset = cursor.number("<Q")
    try:
        tensor_type = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise cursor.fail(f"unknown tensor type {kind} was met") from error
    if tensor_type.name not in READABLE_TYPES:
        raise TensorFileError(
            f"{cursor.path}: tensor {name!r} has type {tensor_type.name}, which is not read; "
            f"convert it to one of {', '.join(READABLE_TYPES)}"
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    if shape[-1] % block or math.prod(shape) == 0:
        raise cursor.fail(f"shape {shape}, which {tensor_type.name} (blocks of {block}) cannot have, was met")
    return name, shape, tensor_type.name, math.prod(shape) // block * block_bytes, offset


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align
