"""TFDS builders over local text, stored as array_record, and the reader of any prepared text set.

Importing this module imports `tensorflow_datasets` (seconds); `lcjax.data.sources` does so on first use.
TensorFlow itself is not imported.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lcjax.data.sources import Corpus, DataError, LocalSource

_FORMAT = "array_record"


class _LocalConfig(tfds.core.BuilderConfig):
    """A builder configuration that carries the record to read."""

    def __init__(self, source: LocalSource):
        super().__init__(name=source.identity(), description=repr(source))
        self.source = source


class _LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents of one local source, split by origin."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksums to look for beside the code

    def _source(self) -> LocalSource:
        return self.builder_config.source

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Local text, read from this machine.",
            features=tfds.features.FeaturesDict({"text": text, "name": text}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._source().splits()}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The documents; a hash of their texts goes into the metadata when the last is written."""
        digest = hashlib.sha256()
        count = 0
        for document in self._source().documents(split):
            text = _encode(document.text)
            digest.update(hashlib.sha256(text).digest())
            yield count, {"text": text, "name": _encode(document.name)}
            count += 1
        if count == 0:
            raise DataError(f"{self._source()} holds no text for split {split!r}: give files with text in them")
        self.info.metadata[split] = digest.hexdigest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _builder(source: LocalSource, data_dir: Path) -> tfds.core.DatasetBuilder:
    """A builder of its own class, which names the source and knows its one configuration."""
    attributes = {"name": source.kind, "BUILDER_CONFIGS": [_LocalConfig(source)], "__module__": __name__}
    kind = type(type(source).__name__, (_LocalBuilder,), attributes, skip_registration=True)
    return kind(data_dir=data_dir, file_format=_FORMAT)


@contextlib.contextmanager
def _alone(folder: Path) -> Generator[None]:
    """One process of a host prepares at a time; the others wait and find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepared(make: Callable[[], Any], folder: Path, what: str) -> Any:
    """A builder whose set is on disk. It is made alone too: it reads what is there when it is made."""
    try:
        with _alone(folder):
            builder = make()
            builder.download_and_prepare(file_format=_FORMAT)
            return builder
    except ImportError as error:
        raise DataError(f"preparing {what} needs the package {error.name!r}: install it once") from error
    except OSError as error:
        raise DataError(
            f"{what} could not be prepared under {folder} ({error}): check free space, permissions and the network"
        ) from error


def open_local(source: LocalSource, data_dir: str | Path) -> Corpus:
    """Prepare a local source under `data_dir` unless done, and open its split."""
    if not 0 <= source.validation < 1:
        raise DataError(f"{source.kind}: validation={source.validation} must be a share of at least 0 and below 1")
    folder = Path(data_dir)
    builder = _prepared(lambda: _builder(source, folder), folder, str(source))
    corpus = _PreparedCorpus(builder, source.split, "text", str(source))
    digests = dict(builder.info.metadata or {})
    corpus.fingerprint = hashlib.sha256(f"{source.split}|{sorted(digests.items())}".encode()).hexdigest()
    return corpus


def open_named(name: str, split: str, field: str, data_dir: str | Path) -> Corpus:
    """Prepare a set of the TFDS catalogue under `data_dir` unless done, and open its split."""
    folder = Path(data_dir)

    def named() -> tfds.core.DatasetBuilder:
        try:
            return tfds.builder(name, data_dir=folder, file_format=_FORMAT)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise DataError(f"TFDS has no set {name!r} ({str(error).splitlines()[0]}): check the name") from error

    builder = _prepared(named, folder, f"TFDS set {name!r}")
    return _PreparedCorpus(builder, split, field, f"TFDS set {name!r}")


class _PreparedCorpus:
    """A `Corpus` over one split of a prepared TFDS builder."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, field: str, what: str):
        fields = sorted(builder.info.features or {})
        if field not in fields:
            raise DataError(f"{what} has no field {field!r}: choose one of {', '.join(fields)}")
        try:
            self._records = builder.as_data_source(split=split)
        except (ValueError, KeyError) as error:
            splits = ", ".join(builder.info.splits)
            raise DataError(f"{what} has no split {split!r}: choose one of {splits}") from error
        if len(self._records) == 0:
            raise DataError(f"{what} has no documents in split {split!r}: choose another split")
        self._field = field
        self._cache = (
            Path(builder.data_path) / f"sizes-{hashlib.sha256(f'{split}|{field}'.encode()).hexdigest()[:16]}.npy"
        )
        shape = [(name, info.num_examples, info.num_bytes) for name, info in sorted(builder.info.splits.items())]
        self.fingerprint = hashlib.sha256(f"{builder.info.full_name}|{split}|{field}|{shape}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        value = self._records[index][self._field]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of every document, counted on the first call and kept beside the records."""
        if self._cache.is_file():
            return np.load(self._cache)
        sizes = np.array([len(_encode(self[i])) for i in range(len(self))], np.int64)
        part = self._cache.with_suffix(f".{os.getpid()}.part.npy")
        np.save(part, sizes)
        part.replace(self._cache)
        return sizes
