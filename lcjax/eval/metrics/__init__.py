"""Scores by name: `metric("token_f1")(text, references)` is a share in [0, 1]."""

import difflib
from collections.abc import Callable, Sequence

from lcjax.eval.metrics import ngram, text

type Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "exact_match": text.exact_match,
    "first_line_match": text.first_line_match,
    "prefix_match": text.prefix_match,
    "any_substring": text.any_substring,
    "all_substrings": text.all_substrings,
    "normalised_substring": text.normalised_substring,
    "token_f1": text.token_f1,
    "character_f1": text.character_f1,
    "edit_similarity": text.edit_similarity,
    "first_integer_match": text.first_integer_match,
    "number_share": text.number_share,
    "rougeL": ngram.rouge,
    "bleu": ngram.bleu,
    "chrf": ngram.chrf,
}


def metric(name: str) -> Metric:
    """The score function of that name; ValueError with the nearest name for one that does not exist."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}"
        raise ValueError(f"unknown metric {name!r}; {hint}")
    return METRICS[name]
