"""Scores of an answer text against reference texts; every function returns a share in [0, 1].

Normalisation is the one of SQuAD (Rajpurkar et al., 2016): lower case, no ASCII punctuation, no English articles,
single spaces. An empty prediction always scores 0.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def normalise(text: str, *, lower: bool = True) -> str:
    """SQuAD normalisation; `lower=False` keeps the case."""
    text = (text.lower() if lower else text).translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def numbers(text: str) -> list[float]:
    """All decimal numbers of a text in order; thousands commas are understood."""
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 when the normalised text equals a normalised reference."""
    found = normalise(text)
    return float(bool(found) and any(found == normalise(reference) for reference in references))


def first_line_match(text: str, references: Sequence[str]) -> float:
    """`exact_match` of the first line that is not blank."""
    return exact_match(first_line(text), references)


def prefix_match(text: str, references: Sequence[str]) -> float:
    """1 when the text, leading blanks and quotes apart, starts with a reference (Needle Threading's single answer)."""
    found = text.lstrip(" \t\r\n\"'")
    return float(any(reference and found.startswith(reference) for reference in references))


def any_substring(text: str, references: Sequence[str]) -> float:
    """1 when a reference occurs in the text, case ignored (RULER's QA metric)."""
    found = text.lower()
    return float(any(reference.strip() and reference.strip().lower() in found for reference in references))


def all_substrings(text: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the text, case ignored (RULER's metric of the other tasks)."""
    found = printable(text).lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def normalised_substring(text: str, references: Sequence[str]) -> float:
    """1 when a normalised reference occurs in the normalised text (HELMET's substring exact match)."""
    found = normalise(text)
    return float(any(normalise(reference) in found for reference in references if normalise(reference)))


def token_f1(text: str, references: Sequence[str]) -> float:
    """Largest F1 of normalised word bags over the references (SQuAD)."""
    return max((_bag_f1(normalise(text).split(), normalise(ref).split()) for ref in references), default=0.0)


def character_f1(text: str, references: Sequence[str]) -> float:
    """F1 of character bags, blanks and punctuation dropped: for Chinese, where no word segmenter is assumed."""

    def characters(value: str) -> list[str]:
        return [c for c in value.lower() if c.isalnum()]

    return max((_bag_f1(characters(text), characters(ref)) for ref in references), default=0.0)


def edit_similarity(text: str, references: Sequence[str]) -> float:
    """Code similarity of LongBench: 2 x longest common subsequence / total length, of the first line that is code."""
    lines = [line for line in text.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//"))]
    line = lines[0] if lines else ""
    return max((subsequence_ratio(line, reference) for reference in references), default=0.0)


def first_integer_match(text: str, references: Sequence[str]) -> float:
    """1 when the first run of digits in the text equals a reference (LongChat-Lines)."""
    found = re.search(r"\d+", text)
    return float(found is not None and found.group() in references)


def number_share(text: str, references: Sequence[str]) -> float:
    """Share of the integers in the text that equal the reference's integer (LongBench retrieval and counting)."""
    gold = re.findall(r"\d+", references[0])
    found = re.findall(r"\d+", text)
    return found.count(gold[-1]) / len(found) if found and gold else 0.0


def classification(text: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """LongBench's label score: 1 / (labels found that are no proper part of the gold one) if gold is found, else 0."""
    best = 0.0
    for gold in references:
        found = [label for label in classes if label in text and not (label in gold and label != gold)]
        best = max(best, 1.0 / len(found) if gold in found else 0.0)
    return best


def first_line(text: str) -> str:
    """First line that is not blank, or the empty string."""
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def printable(text: str) -> str:
    """The text with control characters turned to newlines, stripped."""
    return re.sub(r"[\x00-\x1f]", "\n", text).strip()


def subsequence_ratio(left: str, right: str) -> float:
    """2 LCS(left, right) / (len(left) + len(right)); 0 where one is blank. Time O(len x len)."""
    if not left.strip() or not right.strip():
        return 0.0
    row = [0] * (len(right) + 1)
    for a in left:
        diagonal = 0
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return 2.0 * row[-1] / (len(left) + len(right))


def _bag_f1(found: list[str], gold: list[str]) -> float:
    common = sum((Counter(found) & Counter(gold)).values())
    return 2.0 * common / (len(found) + len(gold)) if common else 0.0
