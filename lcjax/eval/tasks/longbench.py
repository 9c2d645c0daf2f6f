"""LongBench v1 (Bai et al., 2023, arXiv 2308.14508): 21 data sets, their metrics and answer budgets, our prompts.

`source` is a folder or zip with `<data set>.jsonl` (fields input, context, answers, all_classes, _id), for example
"hf:THUDM/LongBench/data.zip". Chinese answers are scored by characters where the published scorer uses words of a
Chinese segmenter: those scores are not comparable with published ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lcjax.eval.budget import Draft, Truncation
from lcjax.eval.metrics import METRICS
from lcjax.eval.metrics.text import classification, first_line, subsequence_ratio
from lcjax.eval.task import Example
from lcjax.eval.tasks.loaded import LoadedTask, Row
from lcjax.eval.tasks.rows import read_rows

_FIELDS = ("input", "context", "answers")


class DataSet(NamedTuple):
    """Metric, new tokens and kind of one data set."""

    metric: str
    new_tokens: int
    kind: str


DATA_SETS = {
    "narrativeqa": DataSet("token_f1", 128, "qa"),
    "qasper": DataSet("token_f1", 128, "qa"),
    "multifieldqa_en": DataSet("token_f1", 64, "qa"),
    "multifieldqa_zh": DataSet("character_f1", 64, "qa"),
    "hotpotqa": DataSet("token_f1", 32, "qa"),
    "2wikimqa": DataSet("token_f1", 32, "qa"),
    "musique": DataSet("token_f1", 32, "qa"),
    "dureader": DataSet("rougeL_chars", 128, "qa"),
    "gov_report": DataSet("rougeL", 512, "summary"),
    "qmsum": DataSet("rougeL", 512, "query_summary"),
    "multi_news": DataSet("rougeL", 512, "summary"),
    "vcsum": DataSet("rougeL_chars", 512, "summary"),
    "trec": DataSet("classification", 64, "shots"),
    "triviaqa": DataSet("token_f1", 32, "shots"),
    "samsum": DataSet("rougeL", 128, "shots"),
    "lsht": DataSet("classification", 64, "shots"),
    "passage_count": DataSet("number_share", 32, "count"),
    "passage_retrieval_en": DataSet("number_share", 32, "retrieval"),
    "passage_retrieval_zh": DataSet("number_share", 32, "retrieval"),
    "lcc": DataSet("edit_similarity", 64, "code"),
    "repobench-p": DataSet("edit_similarity", 64, "code"),
}
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
_TEMPLATES = {
    "qa": "Read the text, then answer the question in a few words and nothing else.\n\nText:\n{document}\n\n"
    "Question: {input}\nAnswer:",
    "summary": "Read the text, then summarise it.\n\nText:\n{document}\n\nSummary:",
    "query_summary": "Read the record of a meeting, then answer in one or more sentences.\n\nRecord:\n{document}\n\n"
    "Task: {input}\nAnswer:",
    "shots": "Continue in the manner of these examples.\n\n{document}\n{input}",
    "count": "Some of these paragraphs are repeated. Count how many different ones there are.\n\n{document}\n\n"
    "Reply with the number alone. Number of different paragraphs:",
    "retrieval": "Below are numbered paragraphs and one summary. Which paragraph is summarised?\n\n{document}\n\n"
    "Summary: {input}\n\nReply with the paragraph's name, such as Paragraph 3. Name:",
    "code": "Complete the code with its next line.\n{document}{input}Next line of code:\n",
}


@dataclass(frozen=True, kw_only=True)
class LongBench(LoadedTask):
    """One data set. The published protocol truncates in the middle: name `truncation="middle"` to do so."""

    data_set: str

    def __post_init__(self) -> None:
        if self.data_set not in DATA_SETS:
            raise ValueError(f"LongBench has no data set {self.data_set!r}; known: {', '.join(DATA_SETS)}")

    @property
    def name(self) -> str:
        """longbench_qasper, ..."""
        return f"longbench_{self.data_set}"

    def template(self) -> bool | None:
        """Few-shot and code sets are plain completions, also for chat models."""
        return False if DATA_SETS[self.data_set].kind in ("shots", "code") else self.chat

    def rows(self) -> Iterator[Row]:
        """One row a question."""
        metric, new_tokens, kind = DATA_SETS[self.data_set]
        for number, row in enumerate(read_rows(self.source, _FIELDS, f"{self.data_set}.jsonl")):
            answers = tuple(row["answers"])
            facts = {"metric": metric, "classes": row.get("all_classes"), "length": row.get("length")}
            draft = Draft("", answers, new_tokens, answer=answers[0], metadata=facts)
            before, after = _TEMPLATES[kind].split("{document}")
            around = before + "{document}" + after.replace("{input}", row["input"])
            yield Row(str(row.get("_id", f"{self.name}-{number}")), row["context"], around, draft)

    def score(self, example: Example, text: str) -> float:
        """The data set's metric in [0, 1]."""
        answer = first_line(text) if self.data_set in _FIRST_LINE else text
        return longbench_score(DATA_SETS[self.data_set].metric, answer, example)


def longbench_score(metric: str, answer: str, example: Example) -> float:
    """Score by a metric of LongBench; `rougeL_chars` puts blanks between characters first."""
    if metric == "classification":
        return classification(answer, example.references, example.metadata["classes"])
    if metric == "rougeL_chars":
        return _character_rouge(answer, example.references)
    return METRICS[metric](answer, example.references)


def _character_rouge(answer: str, references: tuple[str, ...]) -> float:
    """ROUGE-L over characters; rouge-score keeps only ASCII words, so its own tokens would be empty here."""
    found = [c for c in answer if not c.isspace()]
    return max((subsequence_ratio("".join(found), "".join(reference.split())) for reference in references), default=0.0)


def longbench(
    source: str, *, names: tuple[str, ...] = (), truncation: Truncation = "middle", limit: int | None = None
) -> list[LongBench]:
    """The named data sets, or all 21."""
    return [LongBench(source=source, data_set=n, truncation=truncation, limit=limit) for n in names or tuple(DATA_SETS)]
