"""What a run of a suite found: scores by task and length, and what is missing."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lcjax.eval.metrics.statistics import Interval, bootstrap_interval, mean_interval, paired_difference

type Table = dict[str, float]

MEAN, BY_CATEGORY = "mean of tasks", "mean of categories"


@dataclass(frozen=True)
class Cell:
    """One task at one length: a row for each example, as the JSON lines hold it.

    A row has `scores` (by name, the headline first), `where` (such as the depth of the needle) and `cache_bytes` of one
    request. `seconds` were spent on it in this run; `dropped` documents were over the budget. `category`: see `Task`.
    """

    task: str
    length: int
    rows: list[dict[str, Any]]
    seconds: float = 0.0
    dropped: int = 0
    category: str = ""

    @property
    def scores(self) -> dict[str, list[float]]:
        """{metric: a score for each example}, the headline first."""
        return {name: [float(row["scores"][name]) for row in self.rows] for name in self.rows[0]["scores"]}

    @property
    def ids(self) -> list[str]:
        """Names of the examples."""
        return [row["id"] for row in self.rows]

    @property
    def headline(self) -> list[float]:
        """Scores of the first metric."""
        return next(iter(self.scores.values()))

    @property
    def places(self) -> list[dict[str, Any]]:
        """Where each example's needle was, and the like."""
        return [row["where"] for row in self.rows]

    @property
    def cut(self) -> int:
        """Examples whose document a named policy cut."""
        return sum("truncation" in place for place in self.places)

    @property
    def cache_bytes(self) -> int:
        """Most bytes of keys, values and states of one request; 0 where the answers came without that figure."""
        return max(row["cache_bytes"] for row in self.rows)

    @functools.cached_property
    def interval(self) -> Interval:
        """Mean of the headline with its 95 % bootstrap interval."""
        return bootstrap_interval(self.headline)

    def __str__(self) -> str:
        mean, low, high, count = self.interval
        dropped = f", {self.dropped} over the budget left out" if self.dropped else ""
        score = f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{self.task} at {self.length:,}: {score} of {count} examples, {self.seconds:.1f} s{dropped}"


@dataclass
class Outcome:
    """All cells of a run of a suite with a model, and what is missing from it, as (task, length, reason).

    `setting` says in words what the run was made with: device, commit, engine, seed.
    """

    suite: str
    model: str = ""
    setting: str = ""
    cells: list[Cell] = field(default_factory=list)
    missing: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that have a cell, in the order of the run."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def lengths(self) -> list[int]:
        """Lengths that have a cell, ascending."""
        return sorted({cell.length for cell in self.cells})

    def find(self, task: str, length: int) -> Cell | None:
        """The cell of a task at a length, None where it is missing."""
        return next((cell for cell in self.cells if (cell.task, cell.length) == (task, length)), None)

    @property
    def mean_name(self) -> str:
        """What `means` are means of."""
        return BY_CATEGORY if any(cell.category for cell in self.cells) else MEAN

    def means(self) -> dict[int, Interval]:
        """{length: mean of the headlines of the categories, or else of the tasks}, where no task is missing."""
        return {n: _mean([cell for cell in self.cells if cell.length == n]) for n in self._whole}

    def categories(self) -> dict[str, dict[int, Interval]]:
        """{category: {length: mean of its tasks' headlines}}, where no task is missing."""
        cells = [cell for cell in self.cells if cell.category and cell.length in self._whole]
        found: dict[str, dict[int, list[Cell]]] = {}
        for cell in cells:
            found.setdefault(cell.category, {}).setdefault(cell.length, []).append(cell)
        return {name: {n: _mean(mine) for n, mine in at.items()} for name, at in found.items()}

    @property
    def _whole(self) -> list[int]:
        """Lengths at which every task has a cell."""
        gaps = {length for _, length, _ in self.missing}
        return [n for n in self.lengths if n not in gaps]

    def tables(self) -> dict[str, Table]:
        """{task: {length: mean}}; further metrics as task.metric.

        The mean of several tasks is {suite}_mean, that of a category {suite}_mean.{category}.
        """
        tables: dict[str, Table] = {}
        for cell in self.cells:
            for place, (metric, scores) in enumerate(cell.scores.items()):
                name = f"{cell.task}.{metric}" if place else cell.task
                tables.setdefault(name, {})[str(cell.length)] = sum(scores) / len(scores)
        means = self.means()
        if len(self.tasks) > 1 and means:
            tables[f"{self.suite}_mean"] = {str(n): found.mean for n, found in means.items()}
        for name, at in self.categories().items():
            tables[f"{self.suite}_mean.{name}"] = {str(n): found.mean for n, found in at.items()}
        return tables

    def summary(self) -> dict[str, Any]:
        """JSON-able: intervals, seconds, documents dropped and cut by task and length, and what is missing."""
        cells: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            facts = {**cell.interval._asdict(), "seconds": round(cell.seconds, 3), "dropped": cell.dropped}
            facts |= {"cut": cell.cut}
            cells.setdefault(cell.task, {})[str(cell.length)] = facts
        missing = [{"task": task, "length": length, "reason": reason} for task, length, reason in self.missing]
        about = {"suite": self.suite, "model": self.model, "setting": self.setting}
        record = lambda at: {str(n): found._asdict() for n, found in at.items()}
        categories = {name: record(at) for name, at in self.categories().items()}
        means = {"means": record(self.means()), "categories": categories}
        return {**about, "cells": cells, **means, "missing": missing}


class Compared(NamedTuple):
    """One task at one length in several runs: what the first scores, and what each other run scores more.

    None: missing, or asked other examples than the first run.
    """

    task: str
    length: int
    base: Interval | None
    changes: list[Interval | None]


def compare(outcomes: Mapping[str, Outcome]) -> list[Compared]:
    """For each length every task that some run has, and then, where there are several, the mean of all of them."""
    first, *others = outcomes.values()
    rows = []
    for length in sorted({n for outcome in outcomes.values() for n in outcome.lengths}):
        tasks = list(dict.fromkeys(task for outcome in outcomes.values() for task in outcome.tasks))
        there = [task for task in tasks if any(outcome.find(task, length) for outcome in outcomes.values())]
        for task in there:
            base = first.find(task, length)
            changes = [_difference([task], length, first, other) for other in others]
            rows.append(Compared(task, length, base.interval if base else None, changes))
        if len(there) > 1:
            changes = [_difference(there, length, first, other) for other in others]
            rows.append(Compared(first.mean_name, length, first.means().get(length), changes))
    return rows


def _difference(tasks: list[str], length: int, first: Outcome, other: Outcome) -> Interval | None:
    """What the other run scores more over the same examples of all `tasks`."""
    pairs, cells = [], []
    for task in tasks:
        left, right = first.find(task, length), other.find(task, length)
        if left is None or right is None or left.ids != right.ids:
            return None
        pairs.append((left.headline, right.headline))
        cells.append(left)
    return paired_difference(pairs, _weights(cells))


def _mean(cells: list[Cell]) -> Interval:
    return mean_interval([cell.headline for cell in cells], _weights(cells))


def _weights(cells: list[Cell]) -> list[float]:
    """Of each cell in a mean: categories weigh the same, and so do the tasks of one."""
    names = [(cell.category, "" if cell.category else cell.task) for cell in cells]
    return [1 / names.count(name) for name in names]
