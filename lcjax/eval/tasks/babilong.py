"""BABILong (Kuratov et al., 2024, arXiv 2406.10149): a small story's facts scattered through book text, QA1 to QA5.

The worlds are generated (`lcjax.eval.tasks.worlds`), the haystack is any text. A unit is a sentence of the haystack.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from lcjax.eval.budget import Draft
from lcjax.eval.haystack import insert_at
from lcjax.eval.task import Example
from lcjax.eval.tasks.base import GeneratedTask, haystack_facts
from lcjax.eval.tasks.worlds import WORLDS

_SHORTEST = 6
_HELP = {
    "qa1": "The last place that a person went to is where the person is.",
    "qa2": "A thing is where its holder is, or where it was put down last.",
    "qa3": "A thing moves with its holder: follow it from place to place.",
    "qa4": "Directions are as on a map: what lies north of a place has it in its south.",
    "qa5": "Things are handed from one person to another.",
}


@dataclass(frozen=True, kw_only=True)
class BabiLong(GeneratedTask):
    """One of the five questions. Score: the answer names exactly the right label, labels of the question aside."""

    question: str = "qa1"
    worked_examples: int = 2
    step: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.question not in WORLDS:
            raise ValueError(f"babilong.question is {self.question!r}; choose one of {', '.join(WORLDS)}")

    @property
    def name(self) -> str:
        """babilong_qa1, ..."""
        return f"babilong_{self.question}"

    @property
    def least(self) -> int:
        """The story alone is a valid example (0k)."""
        return 0

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """Facts keep their order; each goes before a sentence that is drawn uniformly, with replacement."""
        solved = [WORLDS[self.question](rng) for _ in range(self.worked_examples)]
        story = WORLDS[self.question](rng)
        haystack = self.text()
        sentences = haystack.take(units, haystack.random_start(rng), _SHORTEST)
        places = sorted(rng.choices(range(units + 1), k=len(story.facts)))
        context = " ".join(insert_at(sentences, list(story.facts), places))
        shown = "\n".join(
            f"Example facts: {' '.join(s.facts)} Question: {s.question} Answer: {s.answer}." for s in solved
        )
        body = (
            f"Facts about people and things are scattered through a text that has nothing to do with them. "
            f"{_HELP[self.question]} Answer from these facts with one word.\n{shown}\n\n"
            f"<text>\n{context}\n</text>\n\nQuestion: {story.question}"
        )
        facts = haystack_facts(
            haystack,
            question=story.question,
            labels=list(story.labels),
            facts=list(story.facts),
            support=list(story.support),
            depth=places[story.support[-1]] / max(units, 1),
        )
        return Draft(body, (story.answer,), 16, "Answer:", metadata=facts)

    def score(self, example: Example, text: str) -> float:
        """1 when the labels found up to the first full stop, less those of the question, are the right one alone."""
        return label_score(text, example.references[0], example.metadata["labels"], example.metadata["question"])


def label_score(text: str, answer: str, labels: list[str], question: str) -> float:
    """BABILong's metric: the set of labels in the first sentence, without the question's, must be {answer}."""
    said = text.strip().lower().split(".")[0].split("<text>")[0].split("question:")[0]
    found = {label for label in labels if label.lower() in said and label.lower() not in question.lower()}
    return float(found == {answer})


def babilong(*, num_examples: int = 100, chat: bool | None = None, haystack: str = "python") -> list[GeneratedTask]:
    """QA1 to QA5."""
    return [BabiLong(question=q, num_examples=num_examples, chat=chat, haystack=haystack) for q in WORLDS]
