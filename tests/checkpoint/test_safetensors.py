"""Safetensors: round trips, agreement with the `safetensors` library, and every kind of damage."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lcjax.checkpoint.safetensors import INDEX_NAME, open_folder, write_folder
from lcjax.checkpoint.source import TensorFileError, TensorSource


def make_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": rng.standard_normal((7, 4)).astype(np.float32),
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "bf16": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(6, dtype=np.int64),
        "flag": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def assert_same(source: TensorSource, tensors: dict[str, np.ndarray]) -> None:
    assert sorted(source.names()) == sorted(tensors)
    for name, value in tensors.items():
        assert source.shape(name) == value.shape
        got = source.read(name)
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, value)


def test_round_trip_single_file(tmp_path):
    tensors = make_tensors()
    files = write_folder(tmp_path / "out", tensors, {"note": "x"})
    assert [f.name for f in files] == ["model.safetensors"]
    source = open_folder(tmp_path / "out")
    assert isinstance(source, TensorSource)
    assert source.metadata == {"format": "pt", "note": "x"}
    assert_same(source, tensors)
    assert_same(open_folder(files[0]), tensors)


def test_round_trip_shards_from_an_iterator(tmp_path):
    tensors = {f"layer.{i}": np.full((10,), i, np.float32) for i in range(7)}
    files = write_folder(tmp_path, iter(tensors.items()), max_shard_bytes=85)
    assert [f.name for f in files] == [f"model-{i}-of-00004.safetensors" for i in ("00001", "00002", "00003", "00004")]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 280
    assert index["weight_map"]["layer.2"] == "model-00002-of-00004.safetensors"
    assert_same(open_folder(tmp_path), tensors)


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    tensors = {"a": np.zeros(2, np.float32), "big": np.ones(100, np.float32), "b": np.zeros(2, np.float32)}
    assert len(write_folder(tmp_path, tensors, max_shard_bytes=16)) == 3
    assert_same(open_folder(tmp_path), tensors)


def test_the_library_reads_ours_and_we_read_the_library(tmp_path):
    tensors = {k: v for k, v in make_tensors().items() if k != "bf16"}
    (file,) = write_folder(tmp_path / "ours", tensors)
    theirs = safetensors.numpy.load_file(file)
    for name, value in tensors.items():
        np.testing.assert_array_equal(theirs[name], value)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    assert_same(open_folder(tmp_path / "theirs.safetensors"), tensors)


def test_write_refuses(tmp_path):
    one = np.zeros(2, np.float32)
    with pytest.raises(TensorFileError, match="tensor 'a' was given twice"):
        write_folder(tmp_path / "twice", iter([("a", one), ("a", one)]))
    with pytest.raises(TensorFileError, match="tensor 'c' has dtype complex128"):
        write_folder(tmp_path / "complex", {"c": np.zeros(2, np.complex128)})
    with pytest.raises(TensorFileError, match="max_shard_bytes is 0"):
        write_folder(tmp_path / "zero", {"a": one}, max_shard_bytes=0)
    write_folder(tmp_path / "once", {"a": one})
    with pytest.raises(TensorFileError, match=r"model\.safetensors exists"):
        write_folder(tmp_path / "once", {"a": one})


def test_full_disk_leaves_no_whole_looking_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(TensorFileError, match=r"could not be written .*No space left"):
        write_folder(tmp_path, {"a": np.zeros(2, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_missing_files(tmp_path):
    write_folder(tmp_path / "m", {"model.embed.weight": np.zeros(2, np.float32)})
    with pytest.raises(TensorFileError, match=r"no tensor 'model.embed.weigth'; the nearest is 'model.embed.weight'"):
        open_folder(tmp_path / "m").read("model.embed.weigth")
    with pytest.raises(TensorFileError, match=r"nothing\.safetensors is not a file"):
        open_folder(tmp_path / "nothing.safetensors")
    (tmp_path / "none").mkdir()
    with pytest.raises(TensorFileError, match="holds 0 safetensors files"):
        open_folder(tmp_path / "none")


def sharded(tmp_path):
    return write_folder(tmp_path, {f"w{i}": np.ones(8, np.float32) for i in range(3)}, max_shard_bytes=32)


def test_missing_shard_and_disagreeing_index(tmp_path):
    files = sharded(tmp_path)
    index = tmp_path / INDEX_NAME
    content = json.loads(index.read_text())
    content["weight_map"]["w0"] = files[1].name
    good = index.read_text()
    index.write_text(json.dumps(content))
    with pytest.raises(TensorFileError, match="holds no tensor 'w0'"):
        open_folder(tmp_path)
    content["weight_map"]["w0"] = "../" + files[1].name
    index.write_text(json.dumps(content))
    with pytest.raises(TensorFileError, match="not a plain file name"):
        open_folder(tmp_path)
    index.write_text(good[: len(good) // 2])
    with pytest.raises(TensorFileError, match="weight_map"):
        open_folder(tmp_path)
    index.write_text(good)
    files[2].unlink()
    with pytest.raises(TensorFileError, match=r"00003-of-00003.safetensors is missing: .* tensor 'w2'"):
        open_folder(tmp_path)


def test_every_truncation_is_caught(tmp_path):
    (file,) = write_folder(tmp_path, make_tensors())
    whole = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(TensorFileError, match=r"cut\.safetensors"):
            open_folder(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(TensorFileError, match="1 bytes belong to no tensor"):
        open_folder(cut)


def test_truncation_names_the_tensor(tmp_path):
    (file,) = write_folder(tmp_path, {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)})
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(TensorFileError, match=r"tensor 'b' ends 3 bytes past the end .* truncated"):
        open_folder(file)


def test_flipped_header_bits_never_pass_as_another_layout(tmp_path):
    tensors = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.float32)}
    (file,) = write_folder(tmp_path, tensors)
    whole = bytearray(file.read_bytes())
    header = 8 + struct.unpack_from("<Q", whole)[0]
    flipped = tmp_path / "flipped.safetensors"
    for bit in range(header * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        try:
            source = open_folder(flipped)
        except TensorFileError:
            continue
        # What a flip can still change silently: a name, the free-text metadata, or the type to one of equal width.
        assert sorted(source.shape(n) for n in source.names()) == [(3, 4), (5,)]


def test_flipped_payload(tmp_path):
    import hashlib

    (file,) = write_folder(tmp_path, {"good": np.ones(4, np.float32), "w": np.ones(4, np.float32)})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert open_folder(file, sha256={file.name: digest}).names() == ["good", "w"]
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 0x40  # 1.0 becomes infinity
    file.write_bytes(damaged)
    source = open_folder(file)
    source.read("good")
    with pytest.raises(TensorFileError, match="tensor 'w' holds NaN or infinite"):
        source.read("w")
    with pytest.raises(TensorFileError, match="has SHA-256"):
        open_folder(file, sha256={file.name: digest})


def test_unknown_dtype_is_refused_by_name(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(TensorFileError, match="tensor 'w' has type 'F4'"):
        open_folder(file)
