"""Citation scores in the style of ALCE (Gao et al., 2023) with a pluggable entailment test.

The published scores use a large NLI model. The default here is a word-overlap proxy, so its numbers carry `_proxy` in
their names and are not comparable with published ones.
"""

import re
from collections.abc import Callable, Sequence

from lcjax.eval.metrics.text import normalise

type Entails = Callable[[str, str], bool]

_CITED = re.compile(r"\[(\d+)\]")
_SENTENCE = re.compile(r"(?<=[.!?\]])\s+(?=[A-Z0-9\"'])")


def overlap_entails(passage: str, claim: str, share: float = 0.7) -> bool:
    """Proxy for entailment: at least `share` of the claim's distinct words occur in the passage."""
    words = set(normalise(claim).split())
    return bool(words) and len(words & set(normalise(passage).split())) >= share * len(words)


def citation_scores(text: str, passages: Sequence[str], entails: Entails = overlap_entails) -> dict[str, float]:
    """Citation recall and precision of an answer that cites passages as [1], [2], ...

    Recall: share of sentences that their cited passages, joined, entail. Precision: share of citations that are needed
    or that entail alone; a citation of a passage that does not exist counts against it. No sentence: both 0.
    """
    sentences = [piece for piece in _SENTENCE.split(text.strip()) if _CITED.sub("", piece).strip()]
    supported = needed = cited = 0
    for sentence in sentences:
        claim = _CITED.sub("", sentence).strip()
        ids = list(dict.fromkeys(int(found) - 1 for found in _CITED.findall(sentence)))
        real = [passages[i] for i in ids if 0 <= i < len(passages)]
        cited += len(ids)
        if not real or not entails(" ".join(real), claim):
            continue
        supported += 1
        for i, passage in enumerate(real):
            others = " ".join(real[:i] + real[i + 1 :])
            needed += entails(passage, claim) or not (others and entails(others, claim))
    recall = supported / len(sentences) if sentences else 0.0
    return {"citation_recall_proxy": recall, "citation_precision_proxy": needed / cited if cited else 0.0}
