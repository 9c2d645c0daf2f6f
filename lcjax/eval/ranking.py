"""How well a model ranks documents by attention."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from lcjax.data.ranking import Candidates, RankingPrompt
from lcjax.data.sources import Source
from lcjax.eval.measure import Table
from lcjax.eval.metrics.ranking import ndcg
from lcjax.serve.rank import Ranker
from lcjax.serve.source import Loaded


@dataclass(frozen=True)
class RankDocuments:
    """nDCG@10 and how often a relevant document is first, by the number of candidates, over `count` queries.

    source: a corpus of `Candidates`, with other queries than training. layer and prompt: those of training.
    """

    source: Source
    layer: int
    prompt: RankingPrompt = field(default_factory=RankingPrompt)
    documents: tuple[int, ...] = (8, 16, 32)
    count: int = 100
    seed: int = 0
    data_dir: str = "runs/data"
    name: str = "ranking"

    def __post_init__(self):
        if self.count < 1 or not self.documents or min(self.documents) < 1:
            raise ValueError(
                f"{self.name}: count {self.count} must be positive, documents {self.documents} positive numbers"
            )

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{name_ndcg10, name_top1} by the number of candidates; every ranking goes into name.jsonl."""
        ranker = Ranker(model, self.prompt, self.layer)
        tables: dict[str, dict[str, float]] = {f"{self.name}_ndcg10": {}, f"{self.name}_top1": {}}
        with (output / f"{self.name}.jsonl").open("w", encoding="utf-8") as file:
            for documents in self.documents:
                found = []
                for query, texts, relevant in self._questions(documents):
                    order = ranker.rank(query, texts)
                    grades = {str(i): 1 for i in relevant}
                    found.append((ndcg([str(i) for i in order], grades), float(order[0] in relevant)))
                    file.write(json.dumps({"query": query, "order": order, "relevant": relevant}) + "\n")
                for name, value in zip(tables, np.mean(found, axis=0).tolist(), strict=True):
                    tables[name][str(documents)] = value
        return dict(tables)

    def _questions(self, documents: int) -> Iterator[tuple[str, list[str], list[int]]]:
        """(query, candidates, indices of the relevant ones) of the first `count` examples."""
        corpus = self.source.open(self.data_dir)
        for index in range(min(self.count, len(corpus))):
            query, relevant, others = Candidates.read(corpus[index])
            if len(relevant) + len(others) < documents:
                raise ValueError(
                    f"{self.name}: example {index} of {self.source} has {len(relevant) + len(others)} candidates and "
                    f"{documents} are asked for; lower {self.name}.documents"
                )
            rng = Random(f"ranking-{self.seed}-{index}")
            texts = [*relevant, *rng.sample(others, max(documents - len(relevant), 0))][:documents]
            good = set(relevant)
            rng.shuffle(texts)
            yield query, texts, [i for i, text in enumerate(texts) if text in good]
