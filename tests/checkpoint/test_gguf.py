"""GGUF: every readable type against the library's own reader, and every kind of damage."""

import hashlib
import struct

import gguf
import numpy as np
import pytest

from lcjax.checkpoint.gguf import READABLE_TYPES, open_file
from lcjax.checkpoint.source import TensorFileError, TensorSource

WIDTH = 512


def raw_rows(type_name: str, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Random but valid stored rows: random bits everywhere except the half-precision scales."""
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in ("F32", "F16"):
        return rng.standard_normal((rows, WIDTH)).astype(np.float32 if type_name == "F32" else np.float16)
    if type_name == "BF16":
        return gguf.quants.quantize(rng.standard_normal((rows, WIDTH)).astype(np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, WIDTH // block, size), dtype=np.uint8)
    scale = rng.uniform(0.1, 1, (rows, WIDTH // block, 2)).astype(np.float16).view(np.uint8)
    if type_name == "Q6_K":
        blocks[..., -2:] = scale[..., :2]
    else:
        count = 4 if type_name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 2
        blocks[..., :count] = scale[..., :count]
    return blocks.reshape(rows, -1)


def write_file(path, tensors, metadata=()):
    """`tensors`: name -> (stored rows, type name)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata:
        (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)
    for name, (rows, type_name) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"blk.0.w": (raw_rows("Q4_1", 3, rng), "Q4_1"), "norm": (raw_rows("F32", 1, rng)[0], "F32")}
    return write_file(tmp_path / "small.gguf", tensors, [("general.name", "tiny"), ("list", ["a", "b", "é"])])


def test_every_type_equals_the_library(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {f"t.{name}": (raw_rows(name, 3, rng), name) for name in READABLE_TYPES}
    path = write_file(tmp_path / "all.gguf", tensors)
    source = open_file(path)
    assert isinstance(source, TensorSource)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert source.names() == list(theirs)
    for name, tensor in theirs.items():
        assert source.shape(name) == (3, WIDTH)
        assert source.type_name(name) == tensor.tensor_type.name
        got = source.read(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def test_f32_values_and_row_major_shape(tmp_path):
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    path = write_file(tmp_path / "x.gguf", {"w": (value, "F32")})
    assert open_file(path).shape("w") == (2, 3, 4)
    np.testing.assert_array_equal(open_file(path).read("w"), value)


def test_metadata_equals_the_library(tmp_path):
    path = tmp_path / "meta.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(7)
    writer.add_rope_freq_base(10000.0)
    writer.add_bool("flag", True)
    writer.add_int8("small", -3)
    writer.add_uint64("large", 2**40)
    writer.add_float64("double", 0.1)
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("ints", [1, -2])
    writer.add_array("texts", ["", "Ġthe", "日本"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = open_file(path).metadata
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert metadata == fields
    assert metadata["llama.block_count"] == 7
    assert metadata["texts"] == ["", "Ġthe", "日本"]


def test_missing_empty_and_foreign_files(tmp_path):
    with pytest.raises(TensorFileError, match=r"no\.gguf is not a file"):
        open_file(tmp_path / "no.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"")
    with pytest.raises(TensorFileError, match=r"bad\.gguf is empty"):
        open_file(bad)
    bad.write_bytes(b"PK\3\4 a zip file")
    with pytest.raises(TensorFileError, match="is not a GGUF file"):
        open_file(bad)
    bad.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(16))
    with pytest.raises(TensorFileError, match="GGUF version 1"):
        open_file(bad)


def test_unreadable_type_is_refused_by_name(tmp_path):
    rows = np.zeros((2, 66 * 2), np.uint8)
    path = write_file(tmp_path / "x.gguf", {"blk.3.w": (rows, "IQ2_XXS")})
    with pytest.raises(TensorFileError, match=r"tensor 'blk.3.w' has type IQ2_XXS, which is not read"):
        open_file(path)


def test_split_file_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(TensorFileError, match="one of 3 split files"):
        open_file(path)


def test_unknown_tensor_names_the_nearest(small):
    with pytest.raises(TensorFileError, match=r"no tensor 'nrom'; the nearest is 'norm'"):
        open_file(small).read("nrom")


def test_every_truncation_is_caught(small):
    whole = small.read_bytes()
    cut = small.with_name("cut.gguf")
    for length in range(0, len(whole), 5):
        cut.write_bytes(whole[:length])
        with pytest.raises(TensorFileError, match=r"cut\.gguf"):
            open_file(cut)
    cut.write_bytes(whole[:-40])
    with pytest.raises(TensorFileError, match=r"tensor 'norm' ends \d+ bytes past the end"):
        open_file(cut)


def test_flipped_header_bits_never_pass_as_another_layout(small):
    whole = small.read_bytes()
    source = open_file(small)
    header = len(whole) - sum(source._entries[n].size for n in source.names())
    shapes = [source.shape(n) for n in source.names()]
    flipped = small.with_name("flipped.gguf")
    for bit in range(0, header * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        try:
            other = open_file(flipped)
        except TensorFileError:
            continue
        # What a flip can still change silently: a name, a metadata value, or the type to one of equal size.
        assert [other.shape(n) for n in other.names()] == shapes


def test_flipped_payload(small):
    digest = hashlib.sha256(small.read_bytes()).hexdigest()
    open_file(small, sha256=digest.upper())
    damaged = bytearray(small.read_bytes())
    entry = open_file(small)._entries["blk.0.w"]
    damaged[entry.start + 1] = 0x7C  # the first block's scale becomes infinite or NaN
    small.write_bytes(damaged)
    source = open_file(small)
    source.read("norm")
    with pytest.raises(TensorFileError, match=r"tensor 'blk\.0\.w' holds NaN or infinite"):
        source.read("blk.0.w")
    with pytest.raises(TensorFileError, match="has SHA-256"):
        open_file(small, sha256=digest)
