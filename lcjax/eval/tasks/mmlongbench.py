"""MMLongBench's text side (Wang et al., NeurIPS 2025, arXiv 2505.10610): token rule, metrics, and rows whose context is
text. Rows with images are refused by name until a model here can see.

Rows: question, answer (text, number or list), kind ("retrieval", "choice", "count" or "document") and context, a list
of {"text": ...} and {"image": ..., "height": ..., "width": ...}.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lcjax.eval.budget import Draft
from lcjax.eval.metrics.text import first_line, normalised_substring, numbers, token_f1
from lcjax.eval.task import Example
from lcjax.eval.tasks.loaded import LoadedTask, Row
from lcjax.eval.tasks.rows import RowError, read_rows

KINDS = ("retrieval", "choice", "count", "document")
_LITERAL = re.compile(r"https?://|@\w|\d{1,4}[-/]\d{1,2}[-/]\d{1,4}|^p(?:age|\.)\s*\d+", re.IGNORECASE)


def image_tokens(height: int, width: int) -> int:
    """Tokens of an image by the benchmark's rule: one a patch of 28 x 28 pixels, edges rounded up."""
    return math.ceil(height / 28) * math.ceil(width / 28)


def count_score(answer: str, counts: Sequence[int]) -> float:
    """1 when the sum of the list in the answer equals the sum of the counts; no list counts as a sum of 0."""
    found = re.search(r"\[[^\]]*\]", answer)
    return float(bool(answer.strip()) and sum(numbers(found.group()) if found else []) == sum(counts))


def mirrored_accuracy(accuracy: float) -> float:
    """The two Visual Haystacks tasks report 1 - accuracy below one half. Report the raw value beside it."""
    return max(accuracy, 1.0 - accuracy)


def document_score(answer: str, reference: Any) -> float:
    """The rule of the document questions.

    Integers must be equal; floats within 1 %, also after x100 or /100; links, dates, mail addresses and page numbers
    must occur; other text scores token F1. A list of texts is compared as one text, one of numbers item by item.
    """
    if isinstance(reference, list):
        if all(isinstance(item, str) for item in reference):
            return token_f1(answer, (" ".join(reference),))
        found = numbers(answer)
        pairs = list(zip(reference, found, strict=False))
        return sum(document_score(str(said), item) for item, said in pairs) / len(reference)
    if isinstance(reference, int):
        return float(reference in numbers(answer)[:1])
    if isinstance(reference, float):
        return float(
            any(math.isclose(said * k, reference, rel_tol=0.01) for said in numbers(answer)[:1] for k in (1, 100, 0.01))
        )
    if _LITERAL.search(reference):
        return float(reference.lower() in answer.lower())
    return token_f1(answer, (reference,))


@dataclass(frozen=True, kw_only=True)
class MmLongBenchText(LoadedTask):
    """Questions over interleaved text."""

    kind: ClassVar[str] = "mmlongbench_text"

    def rows(self) -> Iterator[Row]:
        """One row a question; RowError for an image or an unknown kind."""
        for number, row in enumerate(read_rows(self.source, ("question", "answer", "kind", "context")), 1):
            label = f"{self.name}, row {number}"
            if row["kind"] not in KINDS:
                raise RowError(f"{label}: unknown kind {row['kind']!r}; known: {', '.join(KINDS)}")
            images = [part for part in row["context"] if "image" in part]
            if images:
                tokens = sum(image_tokens(part["height"], part["width"]) for part in images)
                raise RowError(
                    f"{label}: {len(images)} images ({tokens} tokens) need a model with vision; leave the row out"
                )
            answer = row["answer"]
            ideal = json.dumps(answer) if row["kind"] == "count" or isinstance(answer, float) else _plain(answer)
            draft = Draft("", (_plain(answer),), 128, answer=ideal, metadata={"kind": row["kind"], "answer": answer})
            context = "\n".join(part["text"] for part in row["context"])
            template = f"{{document}}\n\nQuestion: {row['question']}\nReply with the answer alone."
            yield Row(f"{self.name}-{number - 1}", context, template, draft)

    def score(self, example: Example, text: str) -> float:
        """By the kind of the row."""
        kind, answer = example.metadata["kind"], example.metadata["answer"]
        if kind == "count":
            return count_score(text, answer if isinstance(answer, list) else [answer])
        if kind == "choice":
            letter = re.search(r"\b([A-H])\b", first_line(text))
            return float(letter is not None and letter.group(1) == answer)
        if kind == "retrieval":
            return normalised_substring(text, example.references)
        return document_score(text, answer)


def _plain(answer: Any) -> str:
    return " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
