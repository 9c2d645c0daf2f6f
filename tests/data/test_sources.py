"""Local corpora through TFDS: what is stored, which split it is in, and every way a corpus can be wrong."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lcjax.data import DataError, DataSpec, JsonLines, PythonStdlib, SourceTree, TextFiles, TFDSText, load_tokenizer
from lcjax.data.pipeline import build_pipeline


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One folder for prepared corpora."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def books(tmp_path):
    """Six small text files, one with other scripts."""
    for number in range(6):
        (tmp_path / f"book{number}.txt").write_text(f"Book {number}.\nnaïve 日本語 🤗\n" * (number + 1))
    return tmp_path


def all_texts(corpus):
    return [corpus[i] for i in range(len(corpus))]


def test_text_files(books, prepared):
    corpus = TextFiles((str(books / "*.txt"),)).open(prepared)
    assert all_texts(corpus) == [path.read_text() for path in sorted(books.glob("*.txt"))]
    np.testing.assert_array_equal(corpus.sizes(), [path.stat().st_size for path in sorted(books.glob("*.txt"))])
    np.testing.assert_array_equal(corpus.sizes(), TextFiles((str(books / "*.txt"),)).open(prepared).sizes())
    stored = {path.name.split("-")[0] for path in prepared.glob("text_files/*/1.0.0/*array_record*")}
    assert stored == {"text_files"}


def test_one_corpus_prepared_at_the_same_moment_is_read_whole_by_all(books, tmp_path):
    source = TextFiles((str(books / "*.txt"),))
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: source.open(tmp_path / "new"), range(4)))
    assert {corpus.fingerprint for corpus in corpora} == {source.open(tmp_path / "new").fingerprint}
    assert all(len(corpus) == 6 for corpus in corpora)


def test_splits_are_disjoint_whole_and_stable(books, prepared):
    paths = (str(books / "*.txt"),)
    parts = {split: TextFiles(paths, split=split, validation=0.5) for split in ("train", "validation")}
    texts = {split: all_texts(source.open(prepared)) for split, source in parts.items()}
    assert sorted(texts["train"] + texts["validation"]) == sorted(p.read_text() for p in books.glob("*.txt"))
    assert texts["train"]
    assert texts["validation"]
    assert parts["train"].open(prepared).fingerprint != parts["validation"].open(prepared).fingerprint
    train_and_validation = TextFiles(paths, split="train+validation", validation=0.5).open(prepared)
    assert len(train_and_validation) == 6


def test_a_changed_file_is_prepared_again_and_the_fingerprint_follows_the_text(books, prepared):
    source = TextFiles((str(books / "*.txt"),))
    before = source.open(prepared)
    path = books / "book0.txt"
    path.write_text(path.read_text())  # same text, another time
    assert source.open(prepared).fingerprint == before.fingerprint
    path.write_text("changed")
    assert source.open(prepared).fingerprint != before.fingerprint
    assert source.open(prepared)[0] == "changed"


def test_json_lines(tmp_path, prepared):
    file = tmp_path / "x.jsonl"
    file.write_text('{"body": "one", "id": 1}\n\n{"body": "two\\n2"}\n{"body": " "}\n')
    assert all_texts(JsonLines((str(file),), field="body").open(prepared)) == ["one", "two\n2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "x", "n": 1}', r"x\.jsonl line 2 has no field 'text' \(it has txt, n\)"),
        ('{"text": 5}', "line 2: field 'text' is int, not text"),
        ('["text"]', r"line 2 has no field 'text' \(it has list\)"),
        ('{"text": "x', "line 2 is not JSON"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, prepared, line, message):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        JsonLines((str(file),)).open(prepared)
    assert not list(prepared.glob("json_lines/*/incomplete*"))


def test_source_tree(tmp_path, prepared):
    for name, data in {
        "a/one.py": b"x = 1\n",
        "a/b/two.py": b"y = 2\n",
        ".git/three.py": b"z",
        "binary.py": b"\xff\xfe\0",
        "nul.py": b"a\0b",
        "other.txt": b"text",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert all_texts(SourceTree(str(tmp_path)).open(prepared)) == ["y = 2\n", "x = 1\n"]
    with_text = SourceTree(str(tmp_path), globs=("**/*.py", "*.txt")).open(prepared)
    assert len(with_text) == 3


def test_python_stdlib_lists_modules_and_their_docstrings():
    source = PythonStdlib()
    files = {next(source.origins(path)): path for path in source.files()}
    assert {"json/decoder.py", "textwrap.py", "asyncio/tasks.py"} <= files.keys()
    assert not any(name.startswith(("test/", "site-packages/")) for name in files)
    assert 0.02 < sum(source.split_of(name) == "validation" for name in files) / len(files) < 0.09
    code, docs = source.read(files["textwrap.py"])
    assert code.text == files["textwrap.py"].read_text()
    assert docs.text.startswith("Text wrapping and filling.")
    assert "TextWrapper.wrap\n\nwrap(text : string)" in docs.text
    assert code.origin == docs.origin


def test_errors_name_the_thing(tmp_path, prepared):
    with pytest.raises(DataError, match=r"nothing/\*\.txt' matches no file"):
        TextFiles((str(tmp_path / "nothing/*.txt"),)).open(prepared)
    with pytest.raises(DataError, match="give a tuple"):
        TextFiles(()).open(prepared)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt.* holds no text for split 'train'"):
        TextFiles((str(empty),)).open(prepared)
    empty.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"empty\.txt is not UTF-8 at byte 2"):
        TextFiles((str(empty),)).open(prepared)
    empty.write_text("text")
    with pytest.raises(DataError, match="has no split 'tarin': choose one of train"):
        TextFiles((str(empty),), split="tarin").open(prepared)
    with pytest.raises(DataError, match=r"validation=1\.5 must be a share"):
        TextFiles((str(empty),), validation=1.5).open(prepared)
    with pytest.raises(DataError, match="is not a folder"):
        SourceTree(str(tmp_path / "no")).open(prepared)
    with pytest.raises(DataError, match=r"no file matches \*\.rs"):
        SourceTree(str(tmp_path), globs=("*.rs",)).open(prepared)
    with pytest.raises(DataError, match="TFDS has no set 'no_such_set'"):
        TFDSText("no_such_set").open(prepared)
    with pytest.raises(DataError, match=r"could not be prepared under .*empty\.txt"):
        TextFiles((str(empty),)).open(empty)


def test_a_full_disk_leaves_no_corpus_that_looks_whole(books, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    source = TextFiles((str(books / "*.txt"),))
    with monkeypatch.context() as patch:
        patch.setattr(TextFiles, "read", full)
        with pytest.raises(DataError, match=r"could not be prepared under .*No space left"):
            source.open(tmp_path / "data")
    assert len(source.open(tmp_path / "data")) == 6


def test_a_named_set_is_read_from_its_prepared_copy(books, prepared):
    """Any prepared TFDS folder opens by name; here one of our own stands in for a set of the catalogue."""
    source = TextFiles((str(books / "*.txt"),))
    source.open(prepared)
    name = f"text_files/{source.identity()}"
    named = TFDSText(name).open(prepared)
    assert all_texts(named) == all_texts(source.open(prepared))
    with pytest.raises(DataError, match="has no field 'txt': choose one of name, text"):
        TFDSText(name, field="txt").open(prepared)
    with pytest.raises(DataError, match="has no split 'test'"):
        TFDSText(name, split="test").open(prepared)


def test_from_files_to_batches(books, prepared):
    spec = DataSpec(TextFiles((str(books / "*.txt"),)), data_dir=str(prepared), packing="pad", window=2, prefetch=0)
    tokenizer = load_tokenizer("bytes")
    pipeline = build_pipeline(spec, tokenizer, batch=1, length=2048)
    batches = [next(pipeline) for _ in range(6)]
    pipeline.close()
    texts = [tokenizer.decode(batch["inputs"][batch["segment_ids"] == 1]) for batch in batches]
    assert sorted(texts) == sorted(path.read_text() for path in books.glob("*.txt"))


def test_importing_the_package_loads_neither_grain_nor_tfds():
    code = "import sys, lcjax.data; assert not {'grain', 'tensorflow_datasets', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_records_are_json_free_of_machine_state(books):
    source = TextFiles((str(books / "*.txt"),))
    assert source == TextFiles((str(books / "*.txt"),))
    assert json.dumps(vars(source))
    assert hash(source)
