"""N-gram scores from `rouge-score` and `sacrebleu` in [0, 1]. Both load on first use: their imports are slow."""

import functools
from collections.abc import Sequence
from typing import Any


@functools.cache
def _scorer(kind: str) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([kind], use_stemmer=False)


def rouge(text: str, references: Sequence[str], kind: str = "rougeL") -> float:
    """Largest F measure of one ROUGE kind (`rouge1`, `rouge2`, `rougeL`) over the references, without stemming."""
    if not text.strip():
        return 0.0
    return max(float(_scorer(kind).score(reference, text)[kind].fmeasure) for reference in references)


def rouge_all(text: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-L, ROUGE-1, ROUGE-2 and the geometric mean of the three; ROUGE-L first, the headline."""
    one, two, long = (rouge(text, references, kind) for kind in ("rouge1", "rouge2", "rougeL"))
    return {"rougeL": long, "rouge1": one, "rouge2": two, "rouge_mean": (one * two * long) ** (1 / 3)}


def bleu(text: str, references: Sequence[str]) -> float:
    """Sentence BLEU with sacrebleu's defaults (13a tokens, exponential smoothing, effective order)."""
    import sacrebleu

    return sacrebleu.sentence_bleu(text, list(references)).score / 100.0 if text.strip() else 0.0


def chrf(text: str, references: Sequence[str]) -> float:
    """chrF2 with sacrebleu's defaults: works for languages without spaces."""
    import sacrebleu

    return sacrebleu.sentence_chrf(text, list(references)).score / 100.0 if text.strip() else 0.0
