"""Giraffe's three tasks (Pal et al., 2023, arXiv 2308.10882): LongChat-Lines, altered numeric QA and free-form QA.

The two QA tasks are made for Wikipedia pages. Offline they ask about an article on a made-up town, hidden at the start,
the end or anywhere in filler text; `source` gives JSON lines of {document, question, answer} instead.
"""

import functools
import re
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from lcjax.eval.budget import Draft
from lcjax.eval.haystack import insert_at, split_sentences
from lcjax.eval.tasks.base import GeneratedTask, haystack_facts
from lcjax.eval.tasks.rows import read_rows
from lcjax.eval.words import compound, digits, distinct, endless_words

type Place = Literal["start", "anywhere", "end"]
PLACES: tuple[Place, ...] = ("start", "anywhere", "end")


@dataclass(frozen=True, kw_only=True)
class Lines(GeneratedTask):
    """Many lines "name: number", one is asked for. A unit is a line; score: the answer's first integer is right."""

    kind: ClassVar[str] = "longchat_lines"
    metric: ClassVar[str] = "first_integer_match"

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The line asked for is drawn uniformly."""
        keys = distinct(f"{compound(rng)}-{rng.randrange(1000)}" for _ in iter(int, 1))
        lines = [(next(keys), digits(rng, 5)) for _ in range(units)]
        chosen = rng.randrange(units)
        key, number = lines[chosen]
        shown = "\n".join(f"line {name}: the stored number is {value}" for name, value in lines)
        body = (
            f"Each line below stores a number. Remember them.\n\n{shown}\n\n"
            f"Which number is stored in line {key}? Reply with the number alone."
        )
        return Draft(body, (number,), 35, "The stored number is", metadata={"depth": chosen / units})


def alter_numbers(document: str, answer: str, rng: Random) -> tuple[str, str]:
    """The document with every whole occurrence of the numeric answer replaced, and the new number.

    A year (1000 to 2100) moves by 1 to 10 either way; any other number becomes a random one of as many digits. Raises
    ValueError when the answer is no whole number or does not occur.
    """
    if not answer.isdigit():
        raise ValueError(f"altered numeric QA needs a whole number as the answer, got {answer!r}")
    old = int(answer)
    fresh = answer
    while fresh == answer or (len(answer) > 1 and re.search(rf"(?<!\d){fresh}(?!\d)", document)):
        if 1000 <= old <= 2100:
            fresh = str(old + rng.choice((-1, 1)) * rng.randint(1, 10))
        else:
            fresh = digits(rng, len(answer)) if len(answer) > 1 else str(rng.randrange(10))
    changed, count = re.subn(rf"(?<!\d){answer}(?!\d)", fresh, document)
    if not count:
        raise ValueError(f"the answer {answer!r} does not occur in its document")
    return changed, fresh


@dataclass(frozen=True, kw_only=True)
class Article:
    """A document, a question and its answer, which occurs in the document."""

    document: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class PlacedQuestion(GeneratedTask):
    """A question about an article in filler text, asked before or after it.

    Examples step through question after/before (even/odd index) and the answer's place start/anywhere/end (index mod 6
    in {0,1}, {2,3}, {4,5}); start and end are the first and last tenth. Score: the answer is part of the output.
    """

    source: str = ""
    metric: ClassVar[str] = "any_substring"
    step: ClassVar[int] = 8
    numeric: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """The article alone."""
        return 0

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The article's sentences stay together, at the place of this index."""
        article = self._article(rng, index)
        if self.numeric:
            document, answer = alter_numbers(article.document, article.answer, rng)
            article = Article(document=document, question=article.question, answer=answer)
        where = PLACES[index % 6 // 2]
        low, high = {"start": (0.0, 0.1), "anywhere": (0.1, 0.9), "end": (0.9, 1.0)}[where]
        place = int(units * rng.uniform(low, high))
        haystack = self.text()
        filler = haystack.take(units, haystack.random_start(rng))
        context = " ".join(insert_at(filler, [" ".join(split_sentences(article.document))], [place]))
        ask = f"Question: {article.question} Answer in a few words, from the text alone."
        body = f"{ask}\n\nText:\n{context}" if index % 2 else f"Text:\n{context}\n\n{ask}"
        facts = haystack_facts(haystack, depth=place / max(units, 1), place=where, question_first=bool(index % 2))
        return Draft(body, (article.answer,), 50, "Answer:", metadata=facts)

    def _article(self, rng: Random, index: int) -> Article:
        if not self.source:
            return made_up_article(rng, self.numeric)
        rows = _articles(self.source)
        rows = [row for row in rows if row.answer.isdigit()] if self.numeric else rows
        if not rows:
            raise ValueError(f"{self.source} holds no question with a whole number as its answer")
        return rows[index // 6 % len(rows)]


@functools.lru_cache(maxsize=4)
def _articles(source: str) -> list[Article]:
    rows = read_rows(source, ("document", "question", "answer"))
    return [Article(document=r["document"], question=r["question"], answer=str(r["answer"])) for r in rows]


@dataclass(frozen=True, kw_only=True)
class AlteredNumericQa(PlacedQuestion):
    """The answer is a number that was changed in the document: knowing the world does not help."""

    kind: ClassVar[str] = "altered_numeric_qa"
    numeric: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class FreeFormQa(PlacedQuestion):
    """The answer is a name or a word."""

    kind: ClassVar[str] = "free_form_qa"


def made_up_article(rng: Random, numeric: bool) -> Article:
    """A short article on a made-up town with a question about one of its facts."""
    words = (word.title() for word in endless_words(rng, 2))
    town, river, founder, trade = next(words), next(words), next(words), rng.choice(("glass", "salt", "rope", "paper"))
    year, people, bridges = str(rng.randint(1100, 1900)), digits(rng, 5), digits(rng, 2)
    document = (
        f"{town} is a town on the river {river}. It was founded in {year} by the miller {founder}. "
        f"Its market has sold {trade} since {year}. The last count found {people} people in {town}. "
        f"There are {bridges} bridges over the {river} in the town, and {people} is more than ever before."
    )
    asks = (
        ((f"In which year was {town} founded?", year), (f"How many people were counted in {town}?", people))
        if numeric
        else ((f"Who founded the town of {town}?", founder), (f"On which river does {town} lie?", river))
    )
    question, answer = rng.choice(asks)
    return Article(document=document, question=question, answer=answer)


def giraffe(*, num_examples: int = 60, chat: bool | None = None, haystack: str = "python") -> list[GeneratedTask]:
    """The three tasks."""
    kinds = (Lines, AlteredNumericQa, FreeFormQa)
    return [kind(num_examples=num_examples, chat=chat, haystack=haystack) for kind in kinds]
