"""One suite, several models or engines, one table of differences."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from lcjax.eval.metrics.statistics import Interval
from lcjax.eval.outcome import Outcome, Table, compare
from lcjax.eval.report import write_comparison
from lcjax.eval.runner import Suite, flatten
from lcjax.serve.engine import Engine
from lcjax.serve.source import Loaded, Pretrained


@dataclass(frozen=True)
class Variant:
    """What differs from the first run: the model, the engine, or both (None: as there)."""

    name: str
    model: Pretrained | None = None
    engine: Engine | None = None

    def __post_init__(self):
        if self.model is None and self.engine is None:
            raise ValueError(f"Variant {self.name!r} changes nothing; give it a model or an engine")


@dataclass(frozen=True)
class Compare:
    """Runs `suite` with the model of the evaluation (named `base`) and with each of `others`.

    Each run has its own folder; one whose model cannot be read is missing from the comparison. A tokenizer of its own
    makes other prompts: then the differences are not paired by the same text, only by the same question.
    """

    suite: Suite
    others: tuple[Variant, ...]
    base: str = "base"

    def __post_init__(self):
        names = [self.base, *(variant.name for variant in self.others)]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"compare needs two or more runs with different names, got {', '.join(names)}")

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """Tables named run/task; {suite}_comparison.txt and .html with the differences."""
        outcomes = {self.base: self._one(model, self.suite, output / self.base)}
        for variant in self.others:
            suite = self.suite if variant.engine is None else replace(self.suite, engine=variant.engine)
            try:
                loaded = model if variant.model is None else variant.model.load()
            except (ValueError, OSError) as reason:
                print(f"{variant.name}: missing: {reason}", flush=True)
                outcomes[variant.name] = self._nothing(variant, str(reason))
            else:
                outcomes[variant.name] = self._one(loaded, suite, output / variant.name)
        text = comparison(outcomes)
        (output / f"{self.suite.name}_comparison.txt").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
        write_comparison(output, outcomes)
        return {f"{name}/{task}": table for name, out in outcomes.items() for task, table in out.tables().items()}

    def _nothing(self, variant: Variant, reason: str) -> Outcome:
        """What a run comes to whose model cannot be read."""
        cells = itertools.product(self.suite.lengths, flatten(self.suite.tasks))
        missing = [(task.name, length, reason) for length, task in cells]
        return Outcome(self.suite.name, variant.model.source if variant.model else "", missing=missing)

    @staticmethod
    def _one(model: Loaded, suite: Suite, folder: Path) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        return suite.outcome(model, folder)


def comparison(outcomes: dict[str, Outcome]) -> str:
    """Scores of the first run and differences of the others, in %, with 95 % intervals; * where they exclude 0."""
    rows = [["task", "tokens", *outcomes]]
    for line in compare(outcomes):
        rows.append([line.task, f"{line.length:,}", _score(line.base), *map(_change, line.changes)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    )


def _score(found: Interval | None) -> str:
    return "missing" if found is None else f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _change(found: Interval | None) -> str:
    if found is None:
        return "missing"
    mark = "*" if found.low > 0 or found.high < 0 else " "
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]{mark}"
