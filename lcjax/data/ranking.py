"""In-context ranking: a query and its candidate documents as one row of blocks (BlockRank, arXiv 2510.05396)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from lcjax.data.sources import DataError, Document, LocalSource, Source, lines, matches
from lcjax.data.tokenizers.base import Tokenizer, around

OTHER, DOCUMENT, RELEVANT, SIGNAL = range(4)
"""What a token is: anything else, of a document, of a document that answers the query, one of the two tokens that point
at documents."""


class Candidates(NamedTuple):
    """A query, the documents that answer it, and others."""

    query: str
    relevant: tuple[str, ...]
    others: tuple[str, ...]

    def text(self) -> str:
        """As JSON, which is how a corpus keeps it."""
        return json.dumps({"query": self.query, "relevant": self.relevant, "others": self.others}, ensure_ascii=False)

    @classmethod
    def read(cls, text: str | bytes) -> "Candidates":
        """From JSON. Raises DataError for text that is none, and where a field is missing or of another kind."""
        try:
            held = json.loads(text)
            query, relevant, others = held["query"], held["relevant"], held["others"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a ranking example ({error!r}): give query, relevant and others") from None
        lists = all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in (relevant, others))
        if not isinstance(query, str) or not lists or not relevant:
            raise DataError(
                "not a ranking example: query must be text, relevant and others lists of texts, relevant not empty"
            )
        return cls(query, tuple(relevant), tuple(others))


@dataclass(frozen=True)
class RankingLines(LocalSource):
    """JSON-lines files with `query` (text), `relevant` and `others` (lists of texts) in each line."""

    paths: tuple[str, ...]
    kind: ClassVar[str] = "ranking_lines"

    def files(self) -> list[Path]:
        """The files in the order of the patterns."""
        return matches(self.paths, "RankingLines")

    def origins(self, path: Path) -> Iterator[str]:
        """One a line that is not empty."""
        yield from (f"{path.name}:{number}" for number, _ in lines(path))

    def read(self, path: Path) -> Iterator[Document]:
        """One example a line that is not empty."""
        for number, line in lines(path):
            name = f"{path.name}:{number}"
            try:
                yield Document(name, name, Candidates.read(line).text())
            except DataError as error:
                raise DataError(f"{path} line {number} is {error}") from None


@dataclass(frozen=True)
class RankingPrompt:
    """How a query and its documents become a row of blocks of `size` tokens, each block padded on its left.

    The query stands in the first block, so that documents are read with it in mind, and again in the last, which ends
    where the numbers of the best documents would follow. On a Hopper GPU the kernels want blocks of a multiple of 64
    tokens. Positions: every document begins where the first block ends, so that their order does not matter; the last
    block counts from `offset`. chat: as a user's message.
    """

    size: int = 192
    offset: int = 16384
    chat: bool = False

    def __post_init__(self):
        if self.size < 2 or self.offset < 0:
            raise DataError(f"RankingPrompt: size {self.size} must be at least 2 and offset {self.offset} not negative")

    def row(
        self,
        tokenizer: Tokenizer,
        query: str,
        documents: Sequence[str],
        relevant: Sequence[int] = (),
        blocks: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The arrays of one row, `[(blocks + 2) size]` each; blocks without a document are padding.

        inputs, targets, positions, segment_ids (1; 0 is padding), roles (see `OTHER`), all int32, and loss_weights: 1
        where the numbers of the relevant documents are predicted. With none relevant, the row ends before them.

        Raises DataError for a text that does not fit its block, and for more documents than blocks.
        """
        blocks = len(documents) if blocks is None else blocks
        if not 1 <= len(documents) <= blocks:
            raise DataError(f"ranking: {len(documents)} documents for a row of {blocks}: give one to {blocks}")
        head, texts, tail = self.parts(tokenizer, query, documents)
        numbers = ", ".join(str(i + 1) for i in sorted(relevant))
        answer = list(tokenizer.encode(f"{numbers}]", special=False)) if relevant else []
        row = _Row(self.size, blocks + 2)
        row.put(0, head, 0, OTHER, f"the question {query!r} with its instruction")
        for i, ids in enumerate(texts):
            role = RELEVANT if i in relevant else DOCUMENT
            row.put(i + 1, ids, len(head), role, f"document {i + 1} of the query {query!r}")
        row.put(blocks + 1, [*tail, *answer[:-1]], self.offset, OTHER, f"the question {query!r} and its answer")
        row.finish(answer)
        return row.fields

    def parts(
        self, tokenizer: Tokenizer, query: str, documents: Sequence[str]
    ) -> tuple[list[int], list[list[int]], list[int]]:
        """Ids of the first block, of each document and of the last block, not padded; see `row`."""
        texts = [f"\nNote {i}: {text}\nEnd of note {i}." for i, text in enumerate(documents, 1)]
        head, tail = self._frame(tokenizer, query)
        return head, [list(tokenizer.encode(text, special=False)) for text in texts], tail

    def _frame(self, tokenizer: Tokenizer, query: str) -> tuple[list[int], list[int]]:
        """Ids before and after the documents."""
        before = f"Find the notes that answer the question, and give their numbers.\nQuestion: {query}\nNotes:"
        after = f"\nQuestion, once more: {query}"
        start = "Numbers of the notes that answer it: ["
        if not self.chat:
            head = tokenizer.encode(before, add_bos=tokenizer.adds_bos)
            return list(head), list(tokenizer.encode(f"{after}\n{start}"))
        head, tail = around(tokenizer, before, after)
        return list(tokenizer.encode(head)), list(tokenizer.encode(tail + start))


class _Row:
    """A row while its blocks are filled in."""

    def __init__(self, size: int, blocks: int):
        self.size = size
        kinds: dict[str, type] = dict.fromkeys(("inputs", "targets", "positions", "segment_ids", "roles"), np.int32)
        kinds["loss_weights"] = np.float32
        self.fields: dict[str, np.ndarray] = {name: np.zeros(size * blocks, kind) for name, kind in kinds.items()}

    def put(self, block: int, ids: Sequence[int], start: int, role: int, what: str) -> None:
        """Write a block's ids at its end; their positions count from `start`."""
        if len(ids) > self.size:
            raise DataError(
                f"ranking: {what} takes {len(ids)} tokens and a block holds {self.size}: raise RankingPrompt.size "
                "or shorten it"
            )
        end = (block + 1) * self.size
        place = slice(end - len(ids), end)
        values = {"inputs": ids, "positions": np.arange(len(ids)) + start, "segment_ids": 1, "roles": role}
        for name, value in values.items():
            self.fields[name][place] = value

    def finish(self, answer: Sequence[int]) -> None:
        """Mark the two signal tokens, which are the prompt's last, and what is to be predicted from the second on."""
        length = len(self.fields["inputs"])
        first = length - max(len(answer), 1)
        self.fields["roles"][first - 1 : first + 1] = SIGNAL
        if answer:
            self.fields["targets"][first:] = answer
            self.fields["loss_weights"][first:] = 1.0


@dataclass(frozen=True)
class RankingData:
    """A stream of ranking rows, in place of a `DataSpec`: as many candidates as train.length has blocks for.

    source: a corpus whose texts are `Candidates`. Of an example all relevant documents are taken, as far as they fit,
    and others drawn to fill up, in random order. shards, seed, prefetch, data_dir: as in `DataSpec`.
    """

    source: Source
    prompt: RankingPrompt = RankingPrompt()
    shards: int = 1
    seed: int = 0
    shuffle: bool = True
    prefetch: int = 2
    data_dir: str = "runs/data"
    extra: ClassVar[tuple[str, ...]] = ("roles",)

    def __post_init__(self):
        for name, least in (("shards", 1), ("prefetch", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise DataError(f"RankingData.{name} is {getattr(self, name)}: it must be at least {least}")

    def blocks(self, length: int) -> int:
        """Documents of a row of `length` tokens."""
        if length % self.prompt.size or length < 3 * self.prompt.size:
            raise DataError(
                f"rows of {length} tokens are no three or more blocks of RankingPrompt.size={self.prompt.size}: make "
                "train.length (documents + 2) x size"
            )
        return length // self.prompt.size - 2

    def row(self, tokenizer: Tokenizer, text: str, blocks: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One row from one text of the source."""
        query, relevant, others = Candidates.read(text)
        chosen = [(document, True) for document in relevant[:blocks]]
        count = min(blocks - len(chosen), len(others))
        chosen += [(others[i], False) for i in rng.choice(len(others), count, replace=False)] if count else []
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        good = [i for i, (_, is_relevant) in enumerate(chosen) if is_relevant]
        return self.prompt.row(tokenizer, query, [document for document, _ in chosen], good, blocks)
