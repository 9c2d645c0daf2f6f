"""The input pipeline: corpora into batches, with a small state that survives another process count.

Every logical shard is a stream of its own: it takes every `shards`-th document of each shuffled corpus, mixes pieces
by token share, and packs windows of rows (`lcjax.data.shards`). A batch holds the same number of rows of every shard.
"""

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lcjax.data.ranked_rows import RankedRows
from lcjax.data.ranking import RankingData
from lcjax.data.shards import Batch, ShardRows, Stream, seed_of
from lcjax.data.sources import Corpus, DataError
from lcjax.data.spec import DataSpec, Mixture
from lcjax.data.tokenizers.base import Tokenizer


class _Subset(Sequence):
    """Documents of a corpus by index."""

    def __init__(self, corpus: Corpus, indices: np.ndarray | None):
        self._corpus = corpus
        self._indices = indices

    def __len__(self) -> int:
        return len(self._corpus) if self._indices is None else len(self._indices)

    def __getitem__(self, index: Any) -> str:
        return self._corpus[int(index if self._indices is None else self._indices[index])]


def _subsets(mixture: Mixture, data_dir: str) -> tuple[list[tuple[_Subset, float, str]], list[str]]:
    """Every source's buckets with their token shares, and the corpora's fingerprints."""
    corpora = [source.open(data_dir) for source in mixture.sources]
    weights = mixture.weights or (1.0,) * len(corpora)
    buckets = mixture.bucket_weights or (1.0,) * (len(mixture.bucket_edges) + 1)
    subsets: list[tuple[_Subset, float, str]] = []
    seen: set[int] = set()
    for source, corpus, weight in zip(mixture.sources, corpora, weights, strict=True):
        if not mixture.bucket_edges:
            subsets.append((_Subset(corpus, None), weight, str(source)))
            continue
        bucket_of = np.searchsorted(mixture.bucket_edges, corpus.sizes(), side="right")
        here = np.unique(bucket_of).tolist()
        seen |= set(here)
        total = sum(buckets[b] for b in here)
        for b in here:
            indices = np.flatnonzero(bucket_of == b)
            subsets.append((_Subset(corpus, indices), weight * buckets[b] / total, f"{source} bucket {b}"))
    if mixture.bucket_edges and (empty := set(range(len(buckets))) - seen):
        raise DataError(f"Mixture.bucket_edges={mixture.bucket_edges}: bucket {min(empty)} holds no document")
    return subsets, [corpus.fingerprint for corpus in corpora]


class _Batches(grain.IterDataset):
    """Batches of this process's shards, shard-major, the same number of rows from each."""

    def __init__(self, shards: Sequence[ShardRows | RankedRows], rows_per_shard: int):
        super().__init__()
        self.shards = shards
        self.rows_per_shard = rows_per_shard

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
    """State: that of every shard, by its number."""

    def __init__(self, batches: _Batches):
        super().__init__()
        self._shards = {shard.shard: iter(shard) for shard in batches.shards}
        self._count = batches.rows_per_shard

    def __next__(self) -> Batch:
        rows = [next(shard) for shard in self._shards.values() for _ in range(self._count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        return {str(number): shard.get_state() for number, shard in self._shards.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, shard in self._shards.items():
            shard.set_state(state[str(number)])


class Pipeline(Iterator[Batch]):
    """Batches without end. `get_state` describes the shards of this process after the last batch taken.

    A state holds a few integers a shard and stream. `merge_states` joins those of all processes; `set_state` takes
    such a whole and picks its own shards, so a run may go on with another process count or batch size.
    """

    def __init__(self, batches: _Batches, prefetch: int, fingerprint: str):
        dataset = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
        # Held in a list that is emptied at exit: grain's iterator must not outlive the modules it closes with.
        self._held = [dataset.__iter__()]
        weakref.finalize(self, _let_go, self._held)
        self._numbers = [shard.shard for shard in batches.shards]
        self.fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._iterator())

    def _iterator(self) -> grain.DatasetIterator:
        if not self._held:
            raise DataError("the pipeline is closed: build another")
        return self._held[0]

    def get_state(self) -> dict[str, Any]:
        """JSON-able: `stream`, a fingerprint of what the rows depend on, and `shards`."""
        return {"stream": self.fingerprint, "shards": self._iterator().get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which the state was taken.

        Raises:
          DataError: the state is of another stream, or lacks a shard of this process.
        """
        if state.get("stream") != self.fingerprint:
            raise DataError(
                f"the data state is of stream {str(state.get('stream'))[:12]}, and this is {self.fingerprint[:12]}: "
                "restore with the same sources, tokenizer, length, shards, seed and packing"
            )
        missing = [n for n in self._numbers if str(n) not in state["shards"]]
        if missing:
            raise DataError(f"the data state lacks shard {missing[0]}: merge the states of all processes first")
        self._iterator().set_state({str(n): state["shards"][str(n)] for n in self._numbers})

    def close(self) -> None:
        """Stop the prefetching thread."""
        _let_go(self._held)


def _let_go(held: list[Any]) -> None:
    while held:
        held.pop().close()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the whole stream from the states of all processes, taken after the same step."""
    streams = {state["stream"] for state in states}
    if len(streams) != 1:
        raise DataError(f"states of {len(streams)} different streams cannot be merged: take them from one run")
    shards = {number: shard for state in states for number, shard in state["shards"].items()}
    return {"stream": streams.pop(), "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}


def build_pipeline(
    spec: DataSpec | RankingData,
    tokenizer: Tokenizer,
    *,
    batch: int,
    length: int,
    process_index: int = 0,
    process_count: int = 1,
    vocab_size: int | None = None,
) -> Pipeline:
    """Open the corpora, preparing them where needed, and build the stream of this process.

    Args:
      spec: what to read and how to pack.
      tokenizer: text to ids.
      batch: rows of the global batch, a multiple of `spec.shards`; this process yields `batch / process_count`, and
        the processes' rows in order make the global batch, the same for every process count.
      length: pairs a row, T.
      process_index, process_count: which processes read; the count divides `spec.shards`.
      vocab_size: the model's, checked against the tokenizer's.

    Raises:
      DataError: numbers that do not fit each other, or a corpus that cannot be read.
    """
    _check(spec, tokenizer, batch, length, process_index, process_count, vocab_size)
    local = spec.shards // process_count
    numbers = range(process_index * local, (process_index + 1) * local)
    if isinstance(spec, RankingData):
        shards, fingerprint = _ranked(spec, tokenizer, length, numbers)
    else:
        shards, fingerprint = _packed(spec, tokenizer, length, numbers)
    return Pipeline(_Batches(shards, batch // spec.shards), spec.prefetch, fingerprint)


def _packed(spec: DataSpec, tokenizer: Tokenizer, length: int, numbers: range) -> tuple[list[ShardRows], str]:
    """Shards of packed text, and a hash of everything that decides their rows."""
    mixture = spec.mixture if isinstance(spec.mixture, Mixture) else Mixture((spec.mixture,))
    subsets, corpora = _subsets(mixture, spec.data_dir)
    shards = []
    for shard in numbers:
        streams = []
        for number, (subset, share, name) in enumerate(subsets):
            documents = grain.MapDataset.source(subset)
            if spec.shuffle:
                documents = documents.shuffle(seed=seed_of(spec.seed, number, "documents"))
            documents = documents.repeat()[shard :: spec.shards]
            streams.append(Stream(documents, len(subset), share, name))
        shards.append(ShardRows(streams, spec, tokenizer, length, shard))
    return shards, _fingerprint(spec, mixture, tokenizer, length, corpora)


def _ranked(spec: RankingData, tokenizer: Tokenizer, length: int, numbers: range) -> tuple[list[RankedRows], str]:
    """Shards of ranking rows, and a hash of everything that decides them."""
    corpus = spec.source.open(spec.data_dir)
    documents = grain.MapDataset.source(_Subset(corpus, None))
    if spec.shuffle:
        documents = documents.shuffle(seed=seed_of(spec.seed, "documents"))
    documents = documents.repeat()
    shards = [RankedRows(documents[n :: spec.shards], spec, tokenizer, length, n) for n in numbers]
    fields = [repr(spec.prompt), spec.shards, spec.seed, spec.shuffle]
    content = [fields, corpus.fingerprint, tokenizer.fingerprint, length]
    return shards, hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _fingerprint(spec: DataSpec, mixture: Mixture, tokenizer: Tokenizer, length: int, corpora: list[str]) -> str:
    """Hash of everything that decides the rows; not the batch size, the process count, or where corpora are kept."""
    fields = {k: v for k, v in vars(spec).items() if k not in ("mixture", "data_dir", "prefetch")}
    shares = [mixture.weights, mixture.bucket_edges, mixture.bucket_weights]
    content = [fields, shares, corpora, tokenizer.fingerprint, length]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check(
    spec: DataSpec | RankingData,
    tokenizer: Tokenizer,
    batch: int,
    length: int,
    process_index: int,
    process_count: int,
    vocab_size: int | None,
) -> None:
    if length < 1:
        raise DataError(f"length is {length}: a row needs at least one token")
    if batch < 1 or batch % spec.shards:
        raise DataError(
            f"batch {batch} is not a positive multiple of DataSpec.shards={spec.shards}: change one of them"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index {process_index} is not below process_count {process_count}")
    if spec.shards % process_count:
        raise DataError(
            f"{process_count} processes cannot share DataSpec.shards={spec.shards} evenly: make shards a multiple"
        )
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model's vocabulary {vocab_size}: "
            "use the model's own tokenizer, or a larger vocab_size"
        )
