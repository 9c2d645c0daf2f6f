"""How well a model ranks documents, by attention or in writing."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from lcjax.data.ranking import Candidates, RankingPrompt
from lcjax.data.sources import Source
from lcjax.eval.measure import Table
from lcjax.eval.metrics.ranking import ndcg
from lcjax.eval.metrics.statistics import bootstrap_interval
from lcjax.serve.rank import Ranker
from lcjax.serve.rank_writing import Writer
from lcjax.serve.source import Loaded


@dataclass(frozen=True)
class RankDocuments:
    """nDCG@10 and how often a relevant document is first, by the number of candidates, over `count` queries.

    source: a corpus of `Candidates`, with other queries than training. layer and prompt: those of training. tokens: at
    most so many are written to name the documents; 0: they are ranked by the attention of `layer`, in one pass.
    """

    source: Source
    layer: int
    prompt: RankingPrompt = field(default_factory=RankingPrompt)
    documents: tuple[int, ...] = (8, 16, 32)
    count: int = 100
    seed: int = 0
    data_dir: str = "runs/data"
    tokens: int = 0
    name: str = "ranking"

    def __post_init__(self):
        if self.count < 1 or not self.documents or min(self.documents) < 1:
            raise ValueError(
                f"{self.name}: count {self.count} must be positive, documents {self.documents} positive numbers"
            )

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{name_ndcg10, name_top1} by the number of candidates, and ..._low and ..._high, their 95 % intervals.

        Every ranking goes into name.jsonl.
        """
        ranker = Writer(model, self.prompt, self.tokens) if self.tokens else Ranker(model, self.prompt, self.layer)
        names = f"{self.name}_ndcg10", f"{self.name}_top1"
        tables: dict[str, dict[str, float]] = {f"{name}{end}": {} for name in names for end in ("", "_low", "_high")}
        with (output / f"{self.name}.jsonl").open("w", encoding="utf-8") as file:
            for documents in self.documents:
                found = []
                for query, texts, relevant in self._questions(documents):
                    order = ranker.rank(query, texts)
                    grades = {str(i): 1 for i in relevant}
                    found.append((ndcg([str(i) for i in order], grades), float(any(i in relevant for i in order[:1]))))
                    file.write(json.dumps({"query": query, "order": order, "relevant": relevant}) + "\n")
                for name, scores in zip(names, zip(*found, strict=True), strict=True):
                    mean, low, high, count = bootstrap_interval(scores)
                    for end, value in (("", mean), ("_low", low), ("_high", high)):
                        tables[f"{name}{end}"][str(documents)] = value
                    print(f"{name} of {documents}: {mean:.3f} [{low:.3f}, {high:.3f}], {count} queries", flush=True)
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
