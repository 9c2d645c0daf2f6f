"""One logical shard of ranking rows."""

from typing import Any

import grain
import numpy as np

from lcjax.data.ranking import RankingData
from lcjax.data.shards import Batch, seed_of
from lcjax.data.sources import DataError
from lcjax.data.tokenizers.base import Tokenizer


class RankedRows(grain.IterDataset):
    """Row n is made from the n-th text of the shard, with a generator keyed by (seed, shard, n).

    documents: a `grain.MapDataset` of texts, without end.
    """

    def __init__(self, documents: Any, spec: RankingData, tokenizer: Tokenizer, length: int, shard: int):
        super().__init__()
        self.documents, self.spec, self.tokenizer, self.shard = documents, spec, tokenizer, shard
        self.blocks = spec.blocks(length)

    def row(self, number: int) -> Batch:
        """One row; the error of one that cannot be made names the text."""
        rng = np.random.default_rng(seed_of(self.spec.seed, self.shard, number))
        try:
            return self.spec.row(self.tokenizer, self.documents[number], self.blocks, rng)
        except DataError as error:
            raise DataError(f"{self.spec.source}, row {number} of shard {self.shard}: {error}") from None

    def __iter__(self) -> "_RankedIterator":
        return _RankedIterator(self)


class _RankedIterator(grain.DatasetIterator):
    """State: the next row's number."""

    def __init__(self, rows: RankedRows):
        super().__init__()
        self._rows, self._next = rows, 0

    def __next__(self) -> Batch:
        self._next += 1
        return self._rows.row(self._next - 1)

    def get_state(self) -> dict[str, Any]:
        return {"row": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = state["row"]
