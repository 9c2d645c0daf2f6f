"""Ranking scores."""

import math
import re
from collections.abc import Mapping


def parse_ranking(text: str, known: Mapping[str, int]) -> list[str]:
    """Ids of a ranking written as "a > b > c" (first line that holds one), unknown and repeated ids dropped."""
    line = next((line for line in text.split("\n") if ">" in line), text.strip().split("\n")[0])
    ranking: list[str] = []
    for piece in line.split(">"):
        match = re.search(r"[\w-]+", piece.split(":")[-1])
        if match and match.group() in known and match.group() not in ranking:
            ranking.append(match.group())
    return ranking


def ndcg(ranking: list[str], grades: Mapping[str, int], depth: int = 10) -> float:
    """NDCG@depth with linear gains, as in trec_eval; ids that the ranking leaves out are never appended."""
    gains = [grades.get(name, 0) for name in ranking[:depth]]
    ideal = sorted(grades.values(), reverse=True)[:depth]
    best = _discounted(ideal)
    return _discounted(gains) / best if best else 0.0


def _discounted(gains: list[int]) -> float:
    return float(sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains)))
