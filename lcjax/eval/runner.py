"""Runs suites: every task at every length through the decode engine, example by example on disk, and nothing cut.

What was answered before is not asked again: an example is known by the hash of the model, the engine's settings that
change answers, its prompt ids and its number of new tokens. What cannot run (a budget under the question, a context
under the budget, a data set that is missing, a judge that gives no answer) is named in the summary; the rest goes on.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lcjax.eval.budget import BudgetError, prompt_ids, require_fit, require_whole
from lcjax.eval.measure import Table
from lcjax.eval.metrics.judge import JudgeError
from lcjax.eval.outcome import Cell, Outcome
from lcjax.eval.report import write_report
from lcjax.eval.results import commit, describe_device
from lcjax.eval.shared_prefix import Answers, SharedPrefixGenerator, answer_batch
from lcjax.eval.task import Example, Task
from lcjax.serve.engine import Engine
from lcjax.serve.source import Loaded


class Asked(NamedTuple):
    """An example with the ids that the model gets and the key that its answer is stored under."""

    example: Example
    ids: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Suite:
    """A measure that runs `tasks` (tasks, or lists of them) at each of `lengths`, in tokens of the model.

    Writes {name}.jsonl (one line an example), {name}_summary.json and {name}.html. `seed` fixes the examples.
    """

    tasks: Any
    lengths: tuple[int, ...] = (4096,)
    name: str = "suite"
    seed: int = 0
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"{self.name}.lengths is {self.lengths}; give at least one positive number of tokens")
        names = [task.name for task in flatten(self.tasks)]
        if not names:
            raise ValueError(f"{self.name}.tasks is empty; give at least one task, such as @ruler()")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{self.name}.tasks holds {twice[0]!r} twice; results would be mixed")

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """The tables of the run; see `Outcome.tables`."""
        return dict(self.outcome(model, output).tables())

    def outcome(self, model: Loaded, output: Path, answers: Answers | None = None) -> Outcome:
        """Run all cells that are not on disk yet; the report is written anew after each length.

        `answers` takes the place of an engine with the model's weights, such as answers that were recorded elsewhere.
        """
        runner = Runner(model, output / f"{self.name}.jsonl", self.engine, answers)
        outcome = Outcome(self.name, model.source, self._setting(model))
        for length in self.lengths:
            for task in flatten(self.tasks):
                try:
                    outcome.cells.append(cell := runner.cell(task, length, self.seed))
                    print(cell, flush=True)
                except (ValueError, OSError, JudgeError) as reason:
                    outcome.missing.append((task.name, length, str(reason)))
                    print(f"{task.name} at {length}: missing: {reason}", flush=True)
            (output / f"{self.name}_summary.json").write_text(json.dumps(outcome.summary(), indent=2) + "\n")
            write_report(output, outcome)
        return outcome

    def _setting(self, model: Loaded) -> str:
        """What a reader needs to judge the figures, in one line."""
        engine, code = self.engine, commit()
        cache = engine.cache.dtype or model.spec.dtype
        cache = f"{engine.cache.kind} {cache} cache" + (" with selected pages" if engine.cache.selection else "")
        made = f"{describe_device()}, lcjax {f'at commit {code[:10]}' if code else 'without a commit'}"
        return f"{made}; {model.spec.name} in {model.spec.dtype}, {cache}, batches of {engine.batch}; seed {self.seed}"


def flatten(tasks: Any) -> Iterator[Task]:
    """Tasks of nested lists and tuples, in order."""
    for task in tasks if isinstance(tasks, list | tuple) else (tasks,):
        if isinstance(task, list | tuple):
            yield from flatten(task)
        else:
            yield task


class Runner:
    """Asks, scores and remembers the examples of one model in one JSON-lines file."""

    def __init__(self, model: Loaded, path: Path, engine: Engine, answers: Answers | None = None):
        self._model, self._path = model, path
        self._batch = engine.batch
        self._capacity = engine.capacity or model.spec.max_length
        self._engine = replace(engine, capacity=self._capacity)
        self._known = read_examples(path)
        self._generator = answers
        about = [model.source, repr(model.spec), model.tokenizer.fingerprint, repr(engine.cache)]
        self._config = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def cell(self, task: Task, length: int, seed: int) -> Cell:
        """Every example of a task at a length, the unanswered ones answered in batches."""
        if length > self._capacity:
            raise BudgetError(
                f"the model's context is {self._capacity} tokens, under the budget of {length}; "
                "choose shorter lengths, or raise Engine.capacity for a method that extends the context"
            )
        asked = [self._ask(example, length) for example in task.examples(self._model.tokenizer, length, seed)]
        if not asked:
            raise BudgetError(f"{task.name} has no example within {length} tokens")
        began = time.perf_counter()
        for batch in batches([one for one in asked if one.key not in self._known], self._batch):
            answers, size = self._answer(batch)
            rows: list[dict[str, Any]] = []
            try:
                for one, text in zip(batch, answers, strict=True):
                    rows.append({**self._row(task, length, one, text), "cache_bytes": size})
            finally:  # what a judge has scored before it failed is not asked again
                self._write(rows)
        seconds = time.perf_counter() - began
        rows = [self._known[one.key] for one in asked]
        dropped = max(one.example.metadata.get("dropped", 0) for one in asked)
        return Cell(task.name, length, rows, seconds, dropped, task.category)

    def _ask(self, example: Example, length: int) -> Asked:
        ids = tuple(prompt_ids(self._model.tokenizer, example.prompt))
        require_fit(example.id, len(ids), example.max_new_tokens, length)
        key = hashlib.sha256(json.dumps([self._config, *ids, example.max_new_tokens]).encode()).hexdigest()[:24]
        return Asked(example, ids, key)

    def _answer(self, batch: list[Asked]) -> tuple[list[str], int]:
        """Texts of a batch and bytes of cache a row. Checks that nothing cut the prompts on their way in."""
        for one in batch:
            require_whole(self._model.tokenizer, one.example.prompt, one.ids, one.example.id)
        generator = self._generator = self._generator or self._make()
        shared = getattr(generator, "shared_tokens", 0)
        answers = answer_batch(generator, [one.ids for one in batch], [one.example.max_new_tokens for one in batch])
        read = generator.report.prompt_tokens + getattr(generator, "shared_tokens", 0) - shared
        whole = sum(len(one.ids) for one in batch)
        if read != whole:
            raise BudgetError(
                f"{batch[0].example.id}: the engine read {read} of {whole} prompt tokens; something cut them"
            )
        return [answer.text for answer in answers], generator.report.cache_bytes // len(batch)

    def _make(self) -> Answers:
        model = self._model
        return SharedPrefixGenerator(model.graphdef, model.params, model.spec, model.tokenizer, self._engine)

    def _row(self, task: Task, length: int, one: Asked, text: str) -> dict[str, Any]:
        score = task.score(one.example, text)
        scores = dict(score) if isinstance(score, Mapping) else {"score": score}
        where = {name: one.example.metadata[name] for name in PLACES if name in one.example.metadata}
        return {
            "key": one.key,
            "task": task.name,
            "length": length,
            "id": one.example.id,
            "prompt_sha256": hashlib.sha256(json.dumps(one.ids).encode()).hexdigest(),
            "prompt_tokens": len(one.ids),
            "max_new_tokens": one.example.max_new_tokens,
            "references": list(one.example.references),
            "output": text,
            "scores": {name: float(value) for name, value in scores.items()},
            "where": where,
        }

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._known |= {row["key"]: row for row in rows}


PLACES = ("depth", "needles", "threads", "thread_length", "clustered", "direction", "steps", "truncation", "chance")
"""Metadata that plots need."""


def read_examples(path: Path) -> dict[str, dict[str, Any]]:
    """Finished examples by key. A last line that a killed run left half written is cut off the file."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines), encoding="utf-8")
    rows = [json.loads(line) for line in lines]
    return {row["key"]: row for row in rows}


def batches(asked: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    """Batches of at most `size`: examples of one prefix group stay together, the others go by length."""
    groups: dict[str, list[Asked]] = {}
    for one in asked:
        groups.setdefault(str(one.example.metadata.get("prefix_group") or ""), []).append(one)
    groups[""] = sorted(groups.get("", []), key=lambda one: len(one.ids))
    for group in groups.values():
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]
