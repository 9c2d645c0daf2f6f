"""What to read and how to make rows of it: frozen records, checked before anything is opened."""

from dataclasses import dataclass
from typing import ClassVar

from lcjax.data.sources import DataError, Source

PACKINGS = ("split", "fit", "pad")
LONG_DOCUMENTS = ("split", "truncate", "skip")


@dataclass(frozen=True)
class Mixture:
    """Sources, mixed by shares of the tokens read.

    `weights` has one share a source (empty: equal). `bucket_edges` cuts documents by UTF-8 bytes into buckets,
    ascending, a document of exactly an edge falling above it; `bucket_weights` has one share a bucket, one more than
    edges. A source without documents in a bucket gives that share to its other buckets.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] = ()
    bucket_edges: tuple[int, ...] = ()
    bucket_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("Mixture has no sources: give at least one")
        _check_weights("Mixture.weights", self.weights, len(self.sources), "source")
        if list(self.bucket_edges) != sorted(set(self.bucket_edges)) or min(self.bucket_edges, default=1) <= 0:
            raise DataError(f"Mixture.bucket_edges={self.bucket_edges} must be positive and ascending")
        buckets = len(self.bucket_edges) + 1
        if self.bucket_weights or self.bucket_edges:
            _check_weights("Mixture.bucket_weights", self.bucket_weights, buckets, "bucket")


def _check_weights(name: str, weights: tuple[float, ...], count: int, what: str) -> None:
    if not weights:
        return
    if len(weights) != count:
        raise DataError(f"{name} has {len(weights)} entries for {count} {what}s: give one share a {what}")
    for index, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise DataError(f"{name}[{index}] is {weight}: a share must be positive; leave the {what} out instead")


@dataclass(frozen=True)
class DataSpec:
    """A stream of packed rows.

    `shards` logical shards are dealt to processes: row r of the stream comes from shard r mod `shards`, whatever the
    process count, which must divide it. Rows are made in windows of `window` rows a shard and shuffled within them.

    Documents over 65,536 characters are tokenised in parts, cut between words, which the ids do not show.

    `packing`: `split` fills every row and cuts documents at row ends, the rest following later; `fit` cuts no
    document that fits a row and pads; `pad` gives a piece a row. `long_documents`, those over a row: `split` into
    consecutive rows, `truncate` to one, or `skip`.
    """

    mixture: Mixture | Source
    shards: int = 1
    seed: int = 0
    packing: str = "split"
    long_documents: str = "split"
    window: int = 16
    shuffle: bool = True
    add_bos: bool | None = None
    """Begin documents with the tokenizer's BOS; `None`: if the tokenizer's model was trained so."""
    add_eos: bool = True
    """End documents with the tokenizer's EOS, where it has one."""
    separator: str | None = None
    """The token, as text, at both ends of every document instead of BOS and EOS. The documents of a row then read one
    another: the row is one segment and its positions run on. `None`: documents are masked from one another."""
    parse_special: bool = False
    """Read special tokens written out in documents as such, for corpora of rendered chats; else they are text."""
    prefetch: int = 2
    """Batches made ahead in a thread; 0 makes them on demand."""
    data_dir: str = "runs/data"
    """Where prepared corpora are kept."""
    extra: ClassVar[tuple[str, ...]] = ()
    """Integer arrays of a batch beside the usual ones."""

    def __post_init__(self) -> None:
        for name, least in (("shards", 1), ("window", 1), ("prefetch", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise DataError(f"DataSpec.{name} is {getattr(self, name)}: it must be at least {least}")
        for name, known in (("packing", PACKINGS), ("long_documents", LONG_DOCUMENTS)):
            if getattr(self, name) not in known:
                raise DataError(f"DataSpec.{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.separator is not None and (self.packing == "pad" or self.add_bos):
            other = "packing='pad', which joins no documents" if self.packing == "pad" else "add_bos=True"
            raise DataError(f"DataSpec.separator is {self.separator!r} with {other}: leave one of the two out")
