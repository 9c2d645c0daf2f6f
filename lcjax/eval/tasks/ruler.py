"""RULER's other five tasks (Hsieh et al., 2024, arXiv 2404.06654), in our wording, and the list of all 13.

`qa_1` and `qa_2` ask about made-up people and firms, so that they run offline and no model knows the answers; with
`source` they read SQuAD's or HotpotQA's JSON instead.
"""

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import ClassVar

from lcjax.eval.budget import Draft, Fitter
from lcjax.eval.tasks import needles
from lcjax.eval.tasks.base import GeneratedTask
from lcjax.eval.words import FILLER, NOUNS, digits, distinct, endless_words, letters, names

_ZETA_2 = math.pi**2 / 6


@dataclass(frozen=True, kw_only=True)
class VariableTracking(GeneratedTask):
    """Name all variables that got the same value through a chain of assignments. A unit is a line of noise."""

    hops: int = 4
    kind: ClassVar[str] = "vt"

    @property
    def least(self) -> int:
        """As many places as assignments."""
        return self.hops + 1

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """A solved example with three-letter names, then the chain with five-letter names."""
        example, value, solved = self._chain(rng, self.hops + 1, 3, 12345)
        number = rng.randrange(10000, 99999)
        context, value, variables = self._chain(rng, units, 5, number)
        ask = "Which variables hold the value {}? Follow the assignments and list them all."
        body = (
            f"{example}\n{ask.format(12345)} Answer: {', '.join(solved)}\n\n"
            f"Assignments of variables are hidden in the next text too.\n\n{context}\n\n{ask.format(value)}"
        )
        prefix = f"Answer: the {len(variables)} variables that hold {value} are"
        return Draft(body, tuple(variables), 30, prefix, metadata={"hops": self.hops})

    def _chain(self, rng: Random, lines: int, width: int, value: int) -> tuple[str, int, list[str]]:
        """Noise lines with the assignments at ascending places; the value and the variables."""
        draw = distinct(letters(rng, width).upper() for _ in iter(int, 1))
        variables = list(itertools.islice(draw, self.hops + 1))
        sources = [str(value), *(f"VAR {name}" for name in variables)]
        text: list[str] = [" ".join(FILLER)] * lines
        places = sorted(rng.sample(range(lines), len(variables)))
        for j, (place, variable, source) in enumerate(zip(places, variables, sources, strict=False)):
            text.insert(place + j, f"VAR {variable} = {source}.")
        return "\n".join(text), value, variables


@dataclass(frozen=True, kw_only=True)
class CommonWords(GeneratedTask):
    """The ten words that occur most often in a numbered list. A unit is an uncommon word.

    Common words occur `often` times and the others `rarely`: RULER's 30 and 3, or 6 and 1 under 4,096 tokens and where
    the long form does not fit.
    """

    often: int = 30
    rarely: int = 3
    kind: ClassVar[str] = "cwe"

    @property
    def least(self) -> int:
        """As many uncommon words as common ones."""
        return 10

    def sized(self, fitter: Fitter) -> GeneratedTask:
        """The short form for short budgets."""
        draft, tokens = fitter.measure(self.draft(Random("size"), 2 * self.least, 0))
        if fitter.budget >= 4096 and tokens + draft.max_new_tokens <= fitter.budget:
            return self
        return replace(self, often=6, rarely=1)

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """A solved short list, then the long one."""
        small = self.often < 10
        often, rarely = self.often, self.rarely
        words = distinct(itertools.chain(rng.sample(NOUNS, len(NOUNS)), endless_words(rng)))
        solved = list(itertools.islice(words, 20 if small else 40))
        example = self._numbered(rng, solved[:10], solved[10:], 3 if small else 10, 1 if small else 3)
        common = list(itertools.islice(words, 10))
        listed = self._numbered(rng, common, list(itertools.islice(words, units)), often, rarely)
        ask = "Which ten words occur most often in the list?"
        body = f"{example}\n{ask} Answer: {', '.join(solved[:10])}\n\nHere is another list.\n\n{listed}\n\n{ask}"
        return Draft(body, tuple(common), 120, "Answer: the ten most frequent words are", metadata={"often": often})

    @staticmethod
    def _numbered(rng: Random, common: list[str], others: list[str], often: int, rarely: int) -> str:
        words = common * often + others * rarely
        rng.shuffle(words)
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclass(frozen=True, kw_only=True)
class FrequentWords(GeneratedTask):
    """The three most frequent code words of a Zipf-like text, dots ignored. A unit is a word of the text."""

    alpha: float = 2.0
    kind: ClassVar[str] = "fwe"
    step: ClassVar[int] = 256

    @property
    def least(self) -> int:
        """Enough words that ranks 2 to 5 have different counts."""
        return 80

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """Rank k occurs floor(units k^-alpha / zeta(alpha)) times; rank 1 is written as dots."""
        zeta = _ZETA_2 if self.alpha == 2.0 else sum(k**-self.alpha for k in range(1, 100_000))
        counts = rank_counts(units, self.alpha, zeta)
        words = list(itertools.islice(distinct(letters(rng, 6) for _ in iter(int, 1)), len(counts)))
        words[0] = "..."
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        body = (
            f"This coded text repeats some words. Ignore the dots.\n\n{' '.join(text)}\n\n"
            "Which three coded words occur most often in the text above?"
        )
        return Draft(
            body, tuple(words[1:4]), 50, "Answer: the three most frequent words are", metadata={"words": units}
        )


def rank_counts(words: int, alpha: float = 2.0, zeta: float = _ZETA_2) -> list[int]:
    """Occurrences of rank 1, 2, ... of a Zipf law in a text of `words` words; ranks with none are left out."""
    counts = (int(words * k**-alpha / zeta) for k in itertools.count(1))
    return list(itertools.takewhile(lambda count: count > 0, counts))


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its aliases of the answer and the paragraphs that hold it."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DocumentQuestion(GeneratedTask):
    """Answer a question from numbered paragraphs; a unit is a distracting paragraph. Score: an alias is in the answer.

    `source` is a SQuAD 1.1/2.0 or HotpotQA JSON file; empty: made-up people, with one hop or two.
    """

    source: str = ""
    metric: ClassVar[str] = "any_substring"
    hops: ClassVar[int] = 1

    @property
    def least(self) -> int:
        """No distractor is needed."""
        return 0

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The gold paragraphs among `units` others, shuffled."""
        if self.source:
            questions, pool = read_questions(self.source)
            question = questions[rng.randrange(len(questions))]
            others = [text for text in pool if text not in question.gold]
            others = [others[i % len(others)] for i in range(units)]
        else:
            question, others = self._made_up(rng, units)
        documents = [*question.gold, *others]
        rng.shuffle(documents)
        shown = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        ask = "Answer the question from the documents with the answer alone, without any other words."
        body = f"{ask}\n\n{shown}\n\n{ask}\n\nQuestion: {question.text}"
        depths = [documents.index(text) / max(len(documents) - 1, 1) for text in question.gold]
        return Draft(body, question.answers, 32, "Answer:", question.answers[0], {"depth": depths[0], "depths": depths})

    def _made_up(self, rng: Random, units: int) -> tuple[Question, list[str]]:
        used: set[str] = set()
        people, places = names(rng, used), (word.title() for word in endless_words(rng, 3, used))
        entries = [
            _entry(rng, next(people), next(places), next(places), self.hops) for _ in range(units // self.hops + 1)
        ]
        ask, answer, gold = entries[0]
        others = [text for _, _, texts in entries[1:] for text in texts]
        if len(others) < units:
            others += _entry(rng, next(people), next(places), next(places), 1)[2]
        return Question(text=ask, answers=(answer,), gold=gold), others[:units]


def _entry(rng: Random, person: str, place: str, firm: str, hops: int) -> tuple[str, str, tuple[str, ...]]:
    """Question, answer and paragraphs about one made-up person."""
    year, trade = digits(rng, 4), rng.choice(("glass", "clocks", "paper", "ropes", "lamps", "tiles", "salt", "boats"))
    if hops == 1:
        text = f"{person} learned to make {trade} early. Born in the town of {place}, {person} opened a shop in {year}."
        return f"In which town was {person} born?", place, (text,)
    first = f"{person} sold {trade} for many years and then founded the firm {firm} in {year}."
    second = f"The firm {firm} is known for {trade}. Its head office stands in the town of {place}."
    return f"In which town is the head office of the firm that {person} founded?", place, (first, second)


def read_questions(source: str) -> tuple[list[Question], list[str]]:
    """Questions and the pool of paragraphs of a SQuAD or HotpotQA JSON file; ValueError for another schema."""
    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    questions, pool = [], []
    if isinstance(rows, dict) and "data" in rows:
        for paragraph in (paragraph for article in rows["data"] for paragraph in article["paragraphs"]):
            pool.append(paragraph["context"])
            for item in paragraph["qas"]:
                if item["answers"]:
                    aliases = tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))
                    questions.append(Question(text=item["question"], answers=aliases, gold=(paragraph["context"],)))
    elif isinstance(rows, list) and rows and "supporting_facts" in rows[0]:
        for row in rows:
            texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
            pool += texts.values()
            gold = tuple(texts[title] for title in dict.fromkeys(title for title, _ in row["supporting_facts"]))
            questions.append(Question(text=row["question"], answers=(row["answer"],), gold=gold))
    else:
        raise ValueError(f"{source}: neither SQuAD's nor HotpotQA's JSON schema")
    return questions, list(dict.fromkeys(pool))


@dataclass(frozen=True, kw_only=True)
class Qa1(DocumentQuestion):
    """One-hop questions (SQuAD's place in RULER)."""

    kind: ClassVar[str] = "qa_1"


@dataclass(frozen=True, kw_only=True)
class Qa2(DocumentQuestion):
    """Two-hop questions (HotpotQA's place in RULER)."""

    kind: ClassVar[str] = "qa_2"
    hops: ClassVar[int] = 2


def ruler(*, num_examples: int = 50, chat: bool | None = None, haystack: str = "python") -> list[GeneratedTask]:
    """RULER's 13 tasks."""
    kinds = (
        *(needles.NiahSingle1, needles.NiahSingle2, needles.NiahSingle3),
        *(needles.NiahMultikey1, needles.NiahMultikey2, needles.NiahMultikey3),
        *(needles.NiahMultivalue, needles.NiahMultiquery),
        *(VariableTracking, CommonWords, FrequentWords, Qa1, Qa2),
    )
    return [kind(num_examples=num_examples, chat=chat, haystack=haystack) for kind in kinds]
