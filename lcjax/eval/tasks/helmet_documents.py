"""HELMET's two categories over one long document, question answering and summaries, and the list of all seven.

The published scores come from a judge model; with `judge` set, so do these. Without one the scores are word-overlap
proxies, carry `_proxy` in their names and are not comparable with published ones.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lcjax.eval.budget import Draft, Truncation
from lcjax.eval.metrics import ngram
from lcjax.eval.metrics.citation import overlap_entails
from lcjax.eval.metrics.judge import Judge, ask_scores
from lcjax.eval.metrics.text import exact_match, normalised_substring
from lcjax.eval.task import Example
from lcjax.eval.tasks import helmet as categories
from lcjax.eval.tasks import needles
from lcjax.eval.tasks.base import GeneratedTask
from lcjax.eval.tasks.loaded import LoadedTask, Row
from lcjax.eval.tasks.rows import RowError, read_rows

_ASK = "Read the text, then answer the question briefly.\n\n{document}\n\nQuestion: "


@dataclass(frozen=True, kw_only=True)
class LongQa(LoadedTask):
    """Questions over a document, which is cut at its end as published. Rows: document, question, answers.

    Score: the judge's fluency x correctness / 3, or ROUGE-L F1.
    """

    truncation: Truncation = "head"
    judge: Judge | None = None
    kind: ClassVar[str] = "helmet_longqa"

    def rows(self) -> Iterator[Row]:
        """One row a question. RowError for one with options, which has another score."""
        for number, row in enumerate(read_rows(self.source, ("document", "question", "answers"))):
            if row.get("options"):
                raise RowError(f"{self.source}, row {number + 1} has `options`: give it as helmet.longqa_choice")
            draft = Draft("", tuple(row["answers"]), 100, metadata={"question": row["question"]})
            yield Row(f"{self.name}-{number}", row["document"], _ASK + row["question"], draft)

    def score(self, example: Example, text: str) -> Mapping[str, float]:
        """One number."""
        if self.judge is None:
            return {"rougeL_proxy": ngram.rouge(text, example.references)}
        if not text.strip():
            return {"judged": 0.0}
        right = " | ".join(example.references)
        asked = (
            f"Question: {example.metadata['question']}\nRight answers: {right}\nAnswer: {text}\n\n"
            'Reply with JSON: "fluency" is 1 for readable text, else 0; "correctness" is 0 (wrong), 1 (partly right), '
            "2 (right but incomplete or with errors) or 3 (right)."
        )
        marks = ask_scores(self.judge, asked, ("fluency", "correctness"), low=0, high=3)
        return {"judged": min(marks.get("fluency", 0), 1) * marks.get("correctness", 0) / 3}

    def ideal(self, example: Example) -> str:
        """The first reference."""
        return example.references[0]


@dataclass(frozen=True, kw_only=True)
class LongChoice(LoadedTask):
    """Questions over a document with `options`, of which the first of `answers` is the right one. Score: the choice."""

    truncation: Truncation = "head"
    kind: ClassVar[str] = "helmet_longqa_choice"

    def rows(self) -> Iterator[Row]:
        """One row a question. RowError where the answer is none of the options."""
        for number, row in enumerate(read_rows(self.source, ("document", "question", "answers", "options"))):
            options, answer = row["options"], row["answers"][0]
            if answer not in options:
                raise RowError(f"{self.source}, row {number + 1}: the answer {answer!r} is none of its options")
            letters = "ABCDEFGH"[: len(options)]
            right = letters[options.index(answer)]
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
            ask = f"{row['question']}\n{listed}\nReply with the letter of the right answer."
            draft = Draft("", (right, f"{right}. {answer}"), 10)
            yield Row(f"{self.name}-{number}", row["document"], _ASK + ask, draft)

    def score(self, example: Example, text: str) -> float:
        """Whether the answer begins with the right letter, is it, or holds "A. option" in full."""
        letter = re.match(r"\W*([A-H])\b", text)
        hit = letter is not None and letter.group(1) == example.references[0]
        return max(
            float(hit), exact_match(text, example.references), normalised_substring(text, example.references[1:])
        )

    def ideal(self, example: Example) -> str:
        """The letter."""
        return example.references[0]


@dataclass(frozen=True, kw_only=True)
class Summary(LoadedTask):
    """Summaries. Rows: document, summary, key_points. Score: F of key points, F = 2PR / (P + R); ROUGE-L beside it.

    Recall is the share of key points that the summary holds, precision the share of its sentences that the reference
    supports.
    """

    truncation: Truncation = "head"
    new_tokens: int = 400
    judge: Judge | None = None
    kind: ClassVar[str] = "helmet_summ"

    def rows(self) -> Iterator[Row]:
        """One row a document."""
        template = "Read the text, then summarise it in a few paragraphs.\n\n{document}\n\nSummary:"
        for number, row in enumerate(read_rows(self.source, ("document", "summary", "key_points"))):
            draft = Draft("", (row["summary"],), self.new_tokens, metadata={"key_points": row["key_points"]})
            yield Row(f"{self.name}-{number}", row["document"], template, draft)

    def score(self, example: Example, text: str) -> Mapping[str, float]:
        """F of key points first."""
        reference, points = example.references[0], example.metadata["key_points"]
        rouge = ngram.rouge(text, example.references)
        if not text.strip():
            return {"judged" if self.judge else "key_points_proxy": 0.0, "rougeL": 0.0}
        if self.judge is None:
            claims = [claim for claim in re.split(r"(?<=[.!?])\s+", text.strip()) if claim]
            recall = sum(overlap_entails(text, point) for point in points) / len(points)
            precision = sum(overlap_entails(reference, claim) for claim in claims) / len(claims)
            return {"key_points_proxy": _f(precision, recall), "rougeL": rouge}
        listed = "\n".join(f"{i}. {point}" for i, point in enumerate(points, 1))
        asked = (
            f"Reference summary: {reference}\nIts key points:\n{listed}\n\nSummary to judge: {text}\n\nReply with JSON "
            'of integers: "fluency" (1 readable, else 0), "recalled" (how many key points it holds), "sentences" '
            '(how many it has) and "supported" (how many of them the reference supports).'
        )
        fields = ("fluency", "recalled", "sentences", "supported")
        marks = ask_scores(self.judge, asked, fields, low=0, high=10_000)
        precision = min(1.0, marks.get("supported", 0) / max(marks.get("sentences", 0), 1))
        recall = min(1.0, marks.get("recalled", 0) / len(points))
        return {"judged": min(marks.get("fluency", 0), 1) * _f(precision, recall), "rougeL": rouge}


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def helmet(
    *,
    rag: str = "",
    rerank: str = "",
    cite: str = "",
    longqa: str = "",
    longqa_choice: str = "",
    summ: str = "",
    num_examples: int = 100,
    judge: Judge | None = None,
) -> list[GeneratedTask | LoadedTask]:
    """The seven categories. Recall and many-shot learning are made offline; the others where their file is given.

    A suite's mean over them is HELMET's: of the categories' means, each of which is that of its tasks.
    """
    count: dict[str, Any] = {"num_examples": num_examples}
    tasks: list[GeneratedTask | LoadedTask] = [kind(category="recall", **count) for kind in _RECALL]
    tasks.append(categories.ManyShot(category="icl", **count))
    tasks += [categories.Rag(source=rag, category="rag", **count)] if rag else []
    tasks += [categories.Rerank(source=rerank, category="rerank", **count)] if rerank else []
    tasks += [categories.Cite(source=cite, category="cite", **count)] if cite else []
    part: dict[str, Any] = {"category": "longqa", "limit": num_examples}
    tasks += [LongQa(source=longqa, judge=judge, **part)] if longqa else []
    tasks += [LongChoice(source=longqa_choice, **part)] if longqa_choice else []
    return tasks + ([Summary(source=summ, judge=judge, category="summ", limit=num_examples)] if summ else [])


_RECALL = (categories.JsonKv, needles.NiahMultikey2, needles.NiahMultikey3, needles.NiahMultivalue)
