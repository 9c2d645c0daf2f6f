"""HELMET's categories (Yen et al., ICLR 2025, arXiv 2410.02694) whose prompts are filled with pairs, passages or shots:
recall, retrieval-augmented generation, re-ranking, citation and many-shot learning. Documents: `helmet_documents`.

Prompts are plain completions with demonstrations (chat only for citations), and a score is the better one of the raw
output and its part after the answer prefix, as published. Recall and many-shot learning run offline; the others read
JSON lines.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from lcjax.eval.budget import Draft
from lcjax.eval.metrics import metric
from lcjax.eval.metrics.citation import citation_scores
from lcjax.eval.metrics.ranking import ndcg, parse_ranking
from lcjax.eval.metrics.text import any_substring
from lcjax.eval.task import Example
from lcjax.eval.tasks.base import GeneratedTask
from lcjax.eval.tasks.rows import Row, RowError, read_rows
from lcjax.eval.words import endless_words, uuid

_DEPTHS = 6


@functools.lru_cache(maxsize=8)
def _rows(source: str, fields: tuple[str, ...]) -> list[Row]:
    return read_rows(source, fields)


def parsed(text: str, prefix: str) -> str:
    """What follows the answer prefix in an output, up to the end of its line; the output where there is no prefix."""
    _, found, rest = text.partition(prefix)
    return rest.strip().split("\n")[0] if found else text


@dataclass(frozen=True, kw_only=True)
class HelmetTask(GeneratedTask):
    """Base: plain completion, best of raw and parsed output."""

    chat: bool | None = False
    prefix: ClassVar[str] = "Answer:"
    metric: ClassVar[str] = "normalised_substring"

    def score(self, example: Example, text: str) -> float | Mapping[str, float]:
        """The better score of the whole output and of its part after the prefix."""
        scorer = metric(self.metric)
        return max(scorer(text, example.references), scorer(parsed(text, self.prefix), example.references))


@dataclass(frozen=True, kw_only=True)
class JsonKv(HelmetTask):
    """Recall: the value of a UUID key in a JSON object, after two demonstrations. A unit is a pair."""

    kind: ClassVar[str] = "helmet_json_kv"

    @property
    def least(self) -> int:
        """The demonstrations and the query."""
        return 3

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The pair asked for steps over six depths."""
        pairs = [(uuid(rng), uuid(rng)) for _ in range(units)]
        chosen = min(int(index % _DEPTHS / (_DEPTHS - 1) * (units - 1)), units - 1)
        others = [i for i in range(units) if i != chosen]
        shown = "".join(f"Key: {pairs[i][0]}\nAnswer: {pairs[i][1]}\n" for i in rng.sample(others, 2))
        context = json.dumps(dict(pairs))
        body = f"Find the value of a key in this JSON object.\n\n{context}\n\n{shown}Key: {pairs[chosen][0]}"
        return Draft(body, (pairs[chosen][1],), 48, self.prefix, metadata={"depth": chosen / max(units - 1, 1)})


@dataclass(frozen=True, kw_only=True)
class SourcedTask(HelmetTask):
    """Base of tasks whose units are passages of a row: {"title", "text"} objects in the field `pool`."""

    source: str
    step: ClassVar[int] = 2
    fields: ClassVar[tuple[str, ...]] = ()
    pool: ClassVar[str] = "negatives"

    @property
    def table(self) -> list[Row]:
        """All rows."""
        return _rows(self.source, self.fields)

    @property
    def least(self) -> int:
        """No passage of the pool is needed."""
        return 0

    @property
    def most(self) -> int:
        """No more than the shortest row has: passages are never repeated."""
        return min(len(row[self.pool]) for row in self.table)


def passages(rows: list[Mapping[str, Any]]) -> list[str]:
    """Texts with their titles."""
    return [f"{row['title']}: {row['text']}" if row.get("title") else row["text"] for row in rows]


@dataclass(frozen=True, kw_only=True)
class Rag(SourcedTask):
    """Questions over retrieved passages. Rows: question, answers, positives, negatives.

    The gold passage steps over six depths; two other rows are shown as demonstrations.
    """

    kind: ClassVar[str] = "helmet_rag"
    fields: ClassVar[tuple[str, ...]] = ("question", "answers", "positives", "negatives")

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """Row index % rows at depth index % 6."""
        row = self.table[index % len(self.table)]
        texts = passages(row["negatives"][:units])
        place = round(index % _DEPTHS / (_DEPTHS - 1) * units)
        texts[place:place] = passages(row["positives"])
        shown = "\n\n".join(f"Passage {i}: {text}" for i, text in enumerate(texts, 1))
        others = [other for other in self.table if other is not row]
        solved = rng.sample(others, min(2, len(others)))
        examples = "".join(f"Question: {other['question']}\nAnswer: {other['answers'][0]}\n\n" for other in solved)
        ask = f"{examples}Question: {row['question']}"
        body = f"Answer the last question from the passages, in a few words.\n\n{shown}\n\n{ask}"
        facts = {"depth": place / max(units, 1)}
        return Draft(body, tuple(row["answers"]), 20, self.prefix, answer=row["answers"][0], metadata=facts)


@dataclass(frozen=True, kw_only=True)
class Rerank(SourcedTask):
    """Rank passages by how well they answer a query. Rows: query, passages of {id, text, grade}. Score: NDCG@10."""

    kind: ClassVar[str] = "helmet_rerank"
    fields: ClassVar[tuple[str, ...]] = ("query", "passages")
    pool: ClassVar[str] = "passages"
    prefix: ClassVar[str] = "Ranking:"

    @property
    def least(self) -> int:
        """Two passages at least."""
        return 2

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """The best passages are always in; the order is shuffled."""
        row = self.table[index % len(self.table)]
        ranked = sorted(row["passages"], key=lambda passage: -int(passage["grade"]))
        chosen = ranked[:units]
        rng.shuffle(chosen)
        grades = {str(passage["id"]): int(passage["grade"]) for passage in chosen}
        if not any(grades.values()):
            raise RowError(f"{self.source}: the query {row['query']!r} has no passage with a grade above 0")
        shown = "\n\n".join(f"[ID: {passage['id']}] {passage['text']}" for passage in chosen)
        ideal = " > ".join(sorted(grades, key=lambda name: -grades[name])[:10])
        body = (
            "Rank the passages from the one that answers the query best to the worst. Write the ids of the best ten, "
            f"such as: id3 > id1 > id2\n\n{shown}\n\nQuery: {row['query']}"
        )
        return Draft(body, (ideal,), 200, self.prefix, metadata={"grades": grades})

    def score(self, example: Example, text: str) -> float:
        """NDCG@10 of the ids in the output; an id that is left out counts as not found."""
        grades = example.metadata["grades"]
        return max(ndcg(parse_ranking(piece, grades), grades) for piece in (text, parsed(text, self.prefix)))


@dataclass(frozen=True, kw_only=True)
class Cite(SourcedTask):
    """Long answers with citations. Rows: question, answers (a list of alias lists), positives, negatives.

    Scores: share of answers that occur, citation recall and precision by a word-overlap proxy (see `metrics.citation`).
    """

    chat: bool | None = None
    kind: ClassVar[str] = "helmet_cite"
    fields: ClassVar[tuple[str, ...]] = ("question", "answers", "positives", "negatives")

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """All passages in a shuffled order, numbered from 1."""
        row = self.table[index % len(self.table)]
        texts = passages([*row["positives"], *row["negatives"][:units]])
        order = rng.sample(range(len(texts)), len(texts))
        shown = "\n\n".join(f"Document [{i}] {texts[j]}" for i, j in enumerate(order, 1))
        gold = [order.index(j) + 1 for j in range(len(row["positives"]))]
        said = [f"{passage['text'].rstrip('.')} [{i}]." for passage, i in zip(row["positives"], gold, strict=True)]
        body = (
            "Answer the question from the documents alone. Cite the documents that say so after every sentence, "
            f"as in [2] or [1][4].\n\n{shown}\n\nQuestion: {row['question']}"
        )
        facts = {"aliases": row["answers"], "passages": [texts[j] for j in order]}
        answers = tuple(aliases[0] for aliases in row["answers"])
        return Draft(body, answers, 300, self.prefix, answer=" ".join(said), metadata=facts)

    def score(self, example: Example, text: str) -> Mapping[str, float]:
        """`answers` first, then the two citation scores."""
        aliases = example.metadata["aliases"]
        found = sum(any_substring(text, names) for names in aliases) / len(aliases)
        return {"answers": found, **citation_scores(text, example.metadata["passages"])}


@dataclass(frozen=True, kw_only=True)
class ManyShot(HelmetTask):
    """Many-shot classification with labels as numbers. A unit is a shot; chance level is 1 / classes.

    `source`: JSON lines of {text, label}; empty: `classes` made-up topics, each with its own words, so that the label
    can only be learned from the shots. Shots come in balanced rounds (one of each class, shuffled); the numbers of the
    labels are drawn anew for every item.
    """

    source: str = ""
    classes: int = 8
    kind: ClassVar[str] = "helmet_icl"
    metric: ClassVar[str] = "first_integer_match"
    prefix: ClassVar[str] = "label:"

    @property
    def least(self) -> int:
        """One round."""
        return len(self._groups()) if self.source else self.classes

    def draft(self, rng: Random, units: int, index: int) -> Draft:
        """`units` shots, then one more text of a class drawn uniformly."""
        draw, labels = self._drawer(rng)
        numbers = rng.sample(range(len(labels)), len(labels))
        names = dict(zip(labels, map(str, numbers), strict=True))
        target = rng.choice(labels)
        query = next(draw[target])
        shots: list[str] = []
        while len(shots) < units:
            shots += [f"{next(draw[label])}\nlabel: {names[label]}" for label in rng.sample(labels, len(labels))]
        shown = "\n".join(shots[:units])
        body = f"Learn from the examples which number labels a text, then label the last one.\n\n{shown}\n{query}"
        facts = {"labels": names, "classes": len(labels), "chance": 1 / len(labels)}
        return Draft(body, (names[target],), 20, self.prefix, metadata=facts)

    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for row in _rows(self.source, ("text", "label")):
            groups.setdefault(str(row["label"]), []).append(row["text"])
        return groups

    def _drawer(self, rng: Random) -> tuple[dict[str, Iterator[str]], list[str]]:
        if self.source:
            groups = self._groups()
            return {label: _endless(rng, texts) for label, texts in groups.items()}, sorted(groups)
        words = endless_words(rng)
        topics = [[next(words) for _ in range(6)] for _ in range(self.classes)]
        common = [next(words) for _ in range(24)]
        labels = [f"{i:03d}" for i in range(self.classes)]
        return {label: _topic_texts(rng, topic, common) for label, topic in zip(labels, topics, strict=True)}, labels


def _endless(rng: Random, texts: list[str]) -> Iterator[str]:
    """The texts shuffled, then again."""
    while True:
        yield from rng.sample(texts, len(texts))


def _topic_texts(rng: Random, topic: list[str], common: list[str]) -> Iterator[str]:
    """Lines of three of the topic's words among three common ones."""
    while True:
        words = [*rng.sample(topic, 3), *rng.sample(common, 3)]
        rng.shuffle(words)
        yield " ".join(words)
