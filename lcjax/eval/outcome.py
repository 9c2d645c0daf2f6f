"""What a run of a suite found: scores by task and length, and what is missing."""

from dataclasses import dataclass, field
from typing import Any

from lcjax.eval.metrics.statistics import Interval, bootstrap_interval

type Table = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One task at one length: a score for each example (headline and others by name) and where its needle was."""

    task: str
    length: int
    scores: dict[str, list[float]]
    items: list[dict[str, Any]]
    cache_bytes: int = 0  # of one request

    @property
    def headline(self) -> list[float]:
        """Scores of the first metric."""
        return next(iter(self.scores.values()))

    @property
    def interval(self) -> Interval:
        """Mean of the headline with its 95 % bootstrap interval."""
        return bootstrap_interval(self.headline)


@dataclass
class Outcome:
    """All cells of a run and what is missing from it, as (task, length, reason)."""

    suite: str
    cells: list[Cell] = field(default_factory=list)
    missing: list[tuple[str, int, str]] = field(default_factory=list)

    def tables(self) -> dict[str, Table]:
        """{task: {length: mean}}; further metrics as task.metric; the mean of the tasks where none is missing."""
        tables: dict[str, Table] = {}
        for cell in self.cells:
            for place, (metric, scores) in enumerate(cell.scores.items()):
                name = f"{cell.task}.{metric}" if place else cell.task
                tables.setdefault(name, {})[str(cell.length)] = sum(scores) / len(scores)
        gaps = {length for _, length, _ in self.missing}
        names = {cell.task for cell in self.cells}
        whole = [n for n in sorted({cell.length for cell in self.cells}) if n not in gaps]
        if len(names) > 1 and whole:
            tables[f"{self.suite}_mean"] = {
                str(n): sum(tables[name][str(n)] for name in sorted(names)) / len(names) for n in whole
            }
        return tables

    def summary(self) -> dict[str, Any]:
        """JSON-able: intervals by task and length, and what is missing."""
        cells: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            cells.setdefault(cell.task, {})[str(cell.length)] = cell.interval._asdict()
        missing = [{"task": task, "length": length, "reason": reason} for task, length, reason in self.missing]
        return {"suite": self.suite, "cells": cells, "missing": missing}
