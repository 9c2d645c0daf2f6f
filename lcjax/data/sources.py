"""Where text comes from: records that name a corpus and, once prepared, open it as a sequence of documents.

Local corpora are read once, split by a hash of each document's origin, and stored as array_record by the TFDS
builders of `lcjax.data.builders`; later runs read that copy. Nothing is written outside `data_dir`.
"""

import ast
import dataclasses
import glob
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np


class DataError(ValueError):
    """A corpus is missing, empty or malformed, or the pipeline was asked for what cannot be."""


class Document(NamedTuple):
    """One text. `origin` (a file, or a line of one) decides the split, so what belongs together stays together."""

    name: str
    origin: str
    text: str


@runtime_checkable
class Corpus(Protocol):
    """A prepared split: random access to texts, their sizes, and a hash of what it holds."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...

    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of every document, int64."""
        ...


@runtime_checkable
class Source(Protocol):
    """Names a split of a corpus; `open` prepares it under `data_dir` if that has not been done."""

    split: str

    def open(self, data_dir: str | Path) -> Corpus: ...


@dataclass(frozen=True, kw_only=True)
class LocalSource:
    """Shared by corpora of local files: `files` lists them, `read` reads one.

    `split` is `train`, `validation` or any TFDS split expression over them; `validation` is the share of origins
    held back.
    """

    split: str = "train"
    validation: float = 0.0
    kind: ClassVar[str]

    def open(self, data_dir: str | Path) -> Corpus:
        """Prepare under `data_dir` unless done, and open the split.

        Raises:
          DataError: no file, no text, a damaged file, or a split that does not exist.
        """
        from lcjax.data.builders import open_local

        return open_local(self, data_dir)

    def files(self) -> list[Path]:
        """The corpus files in a fixed order, at least one."""
        raise NotImplementedError

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file."""
        raise NotImplementedError

    def origins(self, path: Path) -> Iterator[str]:
        """What decides the split of a file's documents: the file's name, unless a subclass goes finer."""
        yield path.name

    def split_of(self, origin: str) -> str:
        """`validation` for a share of the origins that their hash picks, else `train`."""
        digest = hashlib.sha256(origin.encode("utf-8", "surrogateescape")).digest()
        return "validation" if int.from_bytes(digest[:8]) < self.validation * 2**64 else "train"

    def splits(self) -> list[str]:
        """The splits that some origin falls in."""
        return sorted({self.split_of(origin) for path in self.files() for origin in self.origins(path)})

    def documents(self, split: str) -> Iterator[Document]:
        """Every document of a split with text in it, in file order; files of other splits are not read."""
        for path in self.files():
            if all(self.split_of(origin) != split for origin in self.origins(path)):
                continue
            for document in self.read(path):
                if self.split_of(document.origin) == split and document.text.strip():
                    yield document

    def identity(self) -> str:
        """Changes with the record and with any file's name, size or time: the name of the prepared copy."""
        stats = [(str(path), path.stat()) for path in self.files()]
        content = [repr(_without_split(self)), *(f"{name}|{s.st_size}|{s.st_mtime_ns}" for name, s in stats)]
        return hashlib.sha256("\n".join(content).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _without_split(source: LocalSource) -> dict[str, object]:
    return {"kind": source.kind} | {k: v for k, v in vars(source).items() if k != "split"}


def matches(patterns: Sequence[str], what: str) -> list[Path]:
    """Files of paths or glob patterns, sorted within a pattern, each once; every pattern must match."""
    found: dict[Path, None] = {}
    if isinstance(patterns, str) or not patterns:
        raise DataError(f"{what} got paths {patterns!r}: give a tuple of at least one path or glob pattern")
    for pattern in patterns:
        files = [Path(pattern)] if Path(pattern).is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"{what}: {pattern!r} matches no file: give an existing path or glob pattern")
        found |= dict.fromkeys(files)
    return list(found)


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: convert it or leave it out") from error


@dataclass(frozen=True)
class PythonStdlib(LocalSource):
    """The running Python's own standard library: each module's source, and its docstrings as a second document.

    Tests, third-party packages and generated files are left out. The text stays on the machine it came with.
    """

    validation: float = dataclasses.field(default=0.05, kw_only=True)
    kind: ClassVar[str] = "python_stdlib"

    _SKIP: ClassVar[frozenset[str]] = frozenset(
        ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "pydoc_data")
    )

    def files(self) -> list[Path]:
        """Modules, by path."""
        root = Path(sysconfig.get_path("stdlib"))
        modules = [path for path in root.rglob("*.py") if not self._SKIP & set(path.relative_to(root).parts)]
        if not modules:
            raise DataError(f"{root} holds no Python sources: use a Python that has its standard library as files")
        return sorted(modules)

    def origins(self, path: Path) -> Iterator[str]:
        """The module's path in the library."""
        yield path.relative_to(sysconfig.get_path("stdlib")).as_posix()

    def read(self, path: Path) -> Iterator[Document]:
        """The source, then the docstrings; a file that is not Python text has none."""
        (name,) = self.origins(path)
        try:
            with tokenize.open(path) as file:
                source = file.read()
            yield Document(name, name, source)
            yield Document(f"{name}#docstrings", name, _docstrings(source))
        except (SyntaxError, UnicodeDecodeError):
            return


def _docstrings(source: str) -> str:
    """The docstrings of a module in order, each under the dotted name it documents."""
    texts: list[str] = []

    def visit(node: ast.AST, scope: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{scope}.{child.name}" if scope else child.name
                if text := ast.get_docstring(child):
                    texts.append(f"{name}\n\n{text}")
                visit(child, name)

    module = ast.parse(source)
    if text := ast.get_docstring(module):
        texts.append(text)
    visit(module, "")
    return "\n\n\n".join(texts)


@dataclass(frozen=True)
class TextFiles(LocalSource):
    """UTF-8 text files, one document each. `paths` are files or glob patterns (`**` goes down folders)."""

    paths: tuple[str, ...]
    kind: ClassVar[str] = "text_files"

    def files(self) -> list[Path]:
        """The files in the order of the patterns."""
        return matches(self.paths, "TextFiles")

    def read(self, path: Path) -> Iterator[Document]:
        """The file, whole."""
        yield Document(path.name, path.name, _utf8(path))


@dataclass(frozen=True)
class JsonLines(LocalSource):
    """JSON-lines files, one document a line, its text under `field`."""

    paths: tuple[str, ...]
    field: str = "text"
    kind: ClassVar[str] = "json_lines"

    def files(self) -> list[Path]:
        """The files in the order of the patterns."""
        return matches(self.paths, "JsonLines")

    def origins(self, path: Path) -> Iterator[str]:
        """One a line that is not empty."""
        for number, _ in lines(path):
            yield f"{path.name}:{number}"

    def read(self, path: Path) -> Iterator[Document]:
        """One document a line that is not empty."""
        for number, line in lines(path):
            name = f"{path.name}:{number}"
            yield Document(name, name, self._text(path, number, line))

    def _text(self, path: Path, number: int, line: bytes) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON ({error}): mend or remove the line") from error
        if not isinstance(record, dict) or self.field not in record:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path} line {number} has no field {self.field!r} (it has {keys}): set JsonLines.field")
        if not isinstance(record[self.field], str):
            kind = type(record[self.field]).__name__
            raise DataError(f"{path} line {number}: field {self.field!r} is {kind}, not text: set JsonLines.field")
        return record[self.field]


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


@dataclass(frozen=True)
class SourceTree(LocalSource):
    """A folder of source code: the files under `root` that match `globs`; files that are not UTF-8 text are none."""

    root: str
    globs: tuple[str, ...] = ("**/*.py",)
    exclude: tuple[str, ...] = (".git", "node_modules", "__pycache__", ".venv")
    kind: ClassVar[str] = "source_tree"

    def files(self) -> list[Path]:
        """The matching files, by path; `exclude` names folders and files to pass over."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"SourceTree root {self.root!r} is not a folder: give an existing one")
        found = {path for pattern in self.globs for path in root.glob(pattern) if path.is_file()}
        kept = [path for path in found if not set(self.exclude) & set(path.relative_to(root).parts)]
        if not kept:
            raise DataError(f"SourceTree {self.root!r}: no file matches {', '.join(self.globs)}: change globs")
        return sorted(kept)

    def origins(self, path: Path) -> Iterator[str]:
        """The file's path under the root."""
        yield path.relative_to(self.root).as_posix()

    def read(self, path: Path) -> Iterator[Document]:
        """The file, whole, unless it is binary."""
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return
        if "\0" not in text:
            (name,) = self.origins(path)
            yield Document(name, name, text)


@dataclass(frozen=True)
class TFDSText:
    """A text set of the TensorFlow Datasets catalogue, such as `TFDSText("lm1b")`, read from the text under `field`.

    It is downloaded and prepared as array_record under `data_dir`; older sets may need TensorFlow for that step.
    """

    name: str
    split: str = "train"
    field: str = "text"

    def open(self, data_dir: str | Path) -> Corpus:
        """Prepare under `data_dir` unless done, and open the split.

        Raises:
          DataError: an unknown set, split or field.
        """
        from lcjax.data.builders import open_named

        return open_named(self.name, self.split, self.field, data_dir)
