"""L-Eval (An et al., 2023, arXiv 2307.11088): exams with exact metrics, and open questions with ROUGE or F1.

`source` is a folder with the published JSON lines (`LEval-data/**.jsonl`: instructions, outputs, input, evaluation).
Instructions of one document share its prefix. The metrics follow the published ones with two repairs, both under flags:
an empty choice scores 0 (published: 0.25), and a missing choice is wrong (published: "A").
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lcjax.eval.budget import Draft, Truncation
from lcjax.eval.metrics import ngram, text
from lcjax.eval.task import Example
from lcjax.eval.tasks.loaded import LoadedTask, Row
from lcjax.eval.tasks.rows import RowError, members, read_rows

CLOSED = ("tpo", "gsm100", "quality", "coursera", "topic_retrieval_longchat", "sci_fi", "codeU")
OPEN_F1 = ("multidoc_qa", "scientific_qa", "financial_qa", "natural_question", "legal_contract_qa", "narrative_qa")
OPEN_ROUGE = (
    *("news_summ", "gov_report_summ", "patent_summ", "tv_show_summ", "paper_assistant", "meeting_summ", "review_summ"),
)
_CHOICE = ("tpo", "quality", "coursera")
_FIELDS = ("instructions", "outputs", "input")
_LETTERS = r"(?<![A-Za-z'])(?!A\s+(?!(?:is|and|or|because)\b)[a-z])[A-D]{1,4}(?![A-Za-z'])"
_CHOICES = re.compile(rf"{_LETTERS}(?:[\s,;&/()]*(?:and|or)?[\s(]*{_LETTERS})*")
_ANSWER = re.compile(r"(?:answer|result)\s*(?:is|:)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class LEval(LoadedTask):
    """One of L-Eval's sub-tasks by its file name, such as "quality".

    `length_instruction` asks open tasks for as many words as the reference has (L-Eval's LIE), so that n-gram scores
    compare answers of one length. `default_choice` "A" and `empty_choice_share` 0.25 restore the published rules.
    """

    task: str
    length_instruction: bool = True
    default_choice: str = ""
    empty_choice_share: float = 0.0

    def __post_init__(self) -> None:
        if self.task not in (*CLOSED, *OPEN_F1, *OPEN_ROUGE):
            known = ", ".join((*CLOSED, *OPEN_F1, *OPEN_ROUGE))
            raise ValueError(f"L-Eval has no sub-task {self.task!r}; known: {known}")

    @property
    def name(self) -> str:
        """leval_quality, ..."""
        return f"leval_{self.task}"

    def rows(self) -> Iterator[Row]:
        """One row an instruction; the document comes first, so that its instructions share a prefix."""
        for number, row in enumerate(read_rows(self.source, _FIELDS, f"{self.task}.jsonl")):
            if len(row["instructions"]) != len(row["outputs"]):
                raise RowError(
                    f"{self.task}.jsonl, row {number + 1}: {len(row['instructions'])} instructions "
                    f"but {len(row['outputs'])} outputs"
                )
            for k, (ask, answer) in enumerate(zip(row["instructions"], row["outputs"], strict=True)):
                label = f"{self.name}-{number}-{k}"
                draft = Draft(
                    "", (answer,), self._new_tokens(), metadata={"length": len(text.normalise(answer).split())}
                )
                yield Row(label, row["input"], self._template(ask, answer), draft, group=f"{self.name}-{number}")

    def _new_tokens(self) -> int:
        return 32 if self.task in (*_CHOICE, "topic_retrieval_longchat", "sci_fi") else 512

    def _template(self, ask: str, answer: str) -> str:
        """The prompt around the document. Braces of data sets are left alone: only `{document}` is replaced, once."""
        if self.task == "gsm100":
            return "{document}\n\n" + ask
        ask = ask.strip()
        if self.task in _CHOICE:
            more = "Choose from A, B, C and D"
            more += "; several may be right." if self.task == "coursera" else "."
            ask += f"\n{more} Reply with the letters alone."
        elif self.task == "sci_fi":
            ask = ask.replace("Answer this question based on the world described in the document.", "").strip()
            ask += (
                "\nReply in the form `True [fact: False]`: first whether it is true in the world of the document, "
                "then whether it is true in the real world."
            )
        elif self.task not in CLOSED and self.length_instruction:
            ask += f"\nAnswer in about {len(answer.split())} words."
        return f"Read this document, then answer.\n\n<document>\n{{document}}\n</document>\n\n{ask}"

    def score(self, example: Example, text: str) -> float | Mapping[str, float]:
        """The sub-task's published metric in [0, 1]."""
        reference = example.references[0]
        if self.task in OPEN_ROUGE:
            return ngram.rouge_all(text, example.references)
        if self.task in OPEN_F1:
            return _f1(text, reference)
        if self.task in _CHOICE:
            return choice_score(
                parse_choice(text, self.default_choice), parse_choice(reference), self.empty_choice_share
            )
        if self.task == "gsm100":
            return number_score(text, reference)
        if self.task == "sci_fi":
            return judgement_score(text, reference)
        return contained_score(code_answer(text, reference) if self.task == "codeU" else text, reference)


def _f1(text_: str, reference: str) -> float:
    return text.token_f1(text_, (reference,))


def parse_choice(answer: str, default: str = "") -> str:
    """The letters A to D of the first group of choices in an answer; the article "A" before a word is none."""
    found = _CHOICES.search(answer)
    return re.sub("[^A-D]", "", found.group()) if found else default


def choice_score(chosen: str, right: str, empty: float = 0.0) -> float:
    """1 for exactly the right letters in order; 0.25 where every chosen letter is right but not all of it; else 0."""
    if chosen == right:
        return 1.0
    if not chosen:
        return empty
    return 0.25 if set(chosen) <= set(right) else 0.0


def number_score(answer: str, reference: str) -> float:
    """1 when the number after the last phrase that brings in the answer, else the last number, equals the reference."""
    parts = _ANSWER.split(answer)
    after = text.numbers(parts[-1]) if len(parts) > 1 else []
    every = text.numbers(answer)
    said = after[:1] or every[-1:]
    return float(bool(said) and said[0] == text.numbers(reference)[0])


def judgement_score(answer: str, reference: str) -> float:
    """Mean of two judgements, in the document's world and in the real one. A missing one is wrong."""
    said, right = (re.findall(r"(?i)\b(true|false)\b", value) for value in (answer, reference))
    pairs = zip([word.lower() for word in said[:2]], [word.lower() for word in right[:2]], strict=False)
    return sum(a == b for a, b in pairs) / 2


def contained_score(answer: str, reference: str) -> float:
    """1 when the reference, without case and blanks, is part of the answer (numbers compare as numbers)."""
    found, wanted = ("".join(value.lower().split()) for value in (answer, reference))
    if not wanted:
        return 0.0
    numbers = text.numbers(reference)
    if numbers and re.fullmatch(r"\s*-?[\d.,]+\s*", reference):
        return float(numbers[0] in text.numbers(answer))
    return float(wanted.rstrip(".") in found)


def code_answer(answer: str, reference: str) -> str:
    """What follows "final output", else the last len(reference) + 3 words."""
    parts = re.split(r"(?i)final output", answer)
    return parts[-1] if len(parts) > 1 else " ".join(answer.split()[-(len(reference.split()) + 3) :])


def leval(
    source: str, *, split: str = "closed", limit: int | None = None, truncation: Truncation = "drop"
) -> list[LEval]:
    """The sub-tasks of a split ("closed", "open" or "all") whose files are in `source`."""
    splits = {"closed": CLOSED, "open": (*OPEN_F1, *OPEN_ROUGE), "all": (*CLOSED, *OPEN_F1, *OPEN_ROUGE)}
    if split not in splits:
        raise ValueError(f"L-Eval has no split {split!r}; choose 'closed', 'open' or 'all'")
    there = members(source)
    found = [name for name in splits[split] if f"{name}.jsonl" in there]
    if not found:
        raise FileNotFoundError(f"{source!r} holds none of L-Eval's files, such as {splits[split][0]}.jsonl")
    return [LEval(source=source, task=name, limit=limit, truncation=truncation) for name in found]
