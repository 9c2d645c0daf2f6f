"""One model under several position laws: perplexity of the same targets and retrieval, each in one table and figure."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lcjax.eval.metrics.statistics import paired_difference
from lcjax.eval.outcome import Outcome, Table
from lcjax.eval.perplexity import Perplexity, perplexity, stretches
from lcjax.eval.plots import by_position
from lcjax.eval.report import write_report
from lcjax.eval.runner import Suite
from lcjax.methods.base import Method, adapt_pretrained
from lcjax.models.decoder import abstract
from lcjax.positions.laws import Rope
from lcjax.positions.remap import Remap
from lcjax.serve.source import Loaded

SLIDING = "sliding context"


@dataclass(frozen=True)
class Law:
    """A frequency law, perhaps with a remap, in place of the model's own. `rope` None: the model's.

    method: what changes the positions beyond that, such as a plan of DPE.
    """

    name: str
    rope: Rope | None = None
    remap: Remap | None = None
    method: Method | None = None

    def apply(self, model: Loaded, max_length: int | None = None) -> Loaded:
        """The model under this law, with the same weights; `max_length` tokens are to fit its context."""
        own = [law for law, _ in model.spec.laws]
        if not own:
            raise ValueError(f"compare_laws: {model.source} has no rotary positions")
        methods = () if self.method is None else (self.method,)
        spec = model.spec.with_positions(self.rope or own[0], self.remap, max_length)
        spec = adapt_pretrained(methods, spec, model.params)
        return model._replace(graphdef=abstract(spec)[0], spec=spec)


@dataclass(frozen=True)
class CompareLaws:
    """Every law on every text of `perplexities`, beside a sliding context of the trained length, and on `suite`.

    The targets of a text are the same for all laws. Ratios are to the sliding context. A perplexity that is asked for
    several lengths is reported for each; its `context` and `targets` stay unset.
    """

    laws: tuple[Law, ...]
    perplexities: tuple[Perplexity, ...] = ()
    suite: Suite | None = None
    name: str = "laws"

    def __post_init__(self):
        names = [law.name for law in self.laws]
        if not names or len(set(names)) < len(names) or SLIDING in names:
            raise ValueError(f"compare_laws.laws need different names, other than {SLIDING!r}; got {', '.join(names)}")
        if not self.perplexities and self.suite is None:
            raise ValueError("compare_laws has nothing to measure; give perplexities, a suite or both")
        for one in self.perplexities:
            if one.context is not None or one.targets is not None:
                raise ValueError(f"compare_laws: perplexity {one.name!r} sets context or targets; leave both unset")

    def check(self) -> None:
        """Refuse a missing text before the model is loaded."""
        for one in self.perplexities:
            one.check()

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{text/law: {length: perplexity}, text/law/ratio: ..., task/law: {length: score}}.

        Also text/law/ratio_low and ratio_high, the ratio's 95 % bootstrap interval over stretches of BLOCK tokens;
        text/law/by_position: {end of a window: perplexity}; text/law/seconds of the longest length, with compilation.
        """
        tables: dict[str, Table] = {}
        places: dict[str, Table] = {}
        for one in self.perplexities:
            found, windows = self._perplexity(one, model, output)
            tables |= found
            places |= windows
        if self.suite is not None:
            tables |= self._scores(self.suite, model, output)
        text = table_of(tables)
        (output / f"{self.name}.txt").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
        return tables | places

    def _perplexity(self, one: Perplexity, model: Loaded, output: Path) -> tuple[dict[str, Table], dict[str, Table]]:
        """Tables by length, and those by position."""
        tokens = one.tokens(model)
        runs = {SLIDING: (replace(one, context=model.spec.max_length), model)}
        runs |= {law.name: (one, law.apply(model)) for law in self.laws}
        losses: dict[str, np.ndarray] = {}
        found: dict[str, Table] = {}
        for name, (measure, changed) in runs.items():
            began = time.perf_counter()
            nll = losses[name] = measure.losses(changed, tokens)
            seconds = time.perf_counter() - began
            found[f"{one.name}/{name}"] = {str(n): perplexity(nll[:n]) for n in one.lengths}
            if name != SLIDING:
                found |= ratios(f"{one.name}/{name}", nll, losses[SLIDING], one.lengths)
            found[f"{one.name}/{name}/seconds"] = {str(max(one.lengths)): seconds}
            print(f"{one.name}, {name}: {perplexity(nll):.2f}, {seconds:.1f} s", flush=True)
        windows = {name: one.windows(nll) for name, nll in losses.items()}
        self._draw(one, model, windows, output)
        places = {
            f"{one.name}/{name}/by_position": {str(end): value for end, value in mine.items()}
            for name, mine in windows.items()
        }
        return found, places

    def _draw(self, one: Perplexity, model: Loaded, windows: dict[str, dict[int, float]], output: Path) -> None:
        """All laws in one figure."""
        curves = {name: (np.array([0, *mine]), np.array([*mine.values()])) for name, mine in windows.items() if mine}
        if curves:
            path = output / f"{self.name}_{one.name}.png"
            by_position(curves, title=one.title, path=path, trained=model.spec.max_length)

    def _scores(self, suite: Suite, model: Loaded, output: Path) -> dict[str, Table]:
        """The suite under every law, and one report in which each law's heat map stands beside the others."""
        together = Outcome(self.name, model.source)
        for law in self.laws:
            folder = output / law.name.replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
            found = suite.outcome(law.apply(model, max(suite.lengths)), folder)
            together.setting = found.setting
            named = lambda task, law=law: f"{task}/{law.name}"
            together.cells += [replace(cell, task=named(cell.task), category="") for cell in found.cells]
            together.missing += [(named(task), length, reason) for task, length, reason in found.missing]
        write_report(output, together)
        return {name: table for name, table in together.tables().items() if name != f"{self.name}_mean"}


def ratios(name: str, nll: np.ndarray, base: np.ndarray, lengths: tuple[int, ...]) -> dict[str, Table]:
    """Perplexity over that of `base` on the same first targets, {name/ratio: ..., name/ratio_low: ...}, by length."""
    found: dict[str, Table] = {f"{name}/ratio": {str(n): perplexity(nll[:n] - base[:n]) for n in lengths}}
    for n in lengths:
        if mine := stretches(nll[:n]):
            theirs = stretches(base[:n])
            _, low, high, _ = paired_difference([(theirs, mine)])
            found.setdefault(f"{name}/ratio_low", {})[str(n)] = math.exp(low)
            found.setdefault(f"{name}/ratio_high", {})[str(n)] = math.exp(high)
    return found


def table_of(tables: dict[str, Table]) -> str:
    """The tables as aligned lines, a column for each length."""
    lengths = sorted({int(n) for table in tables.values() for n in table})
    rows = [["", *(f"{n:,}" for n in lengths)]]
    rows += [[name, *(f"{t[str(n)]:.3f}" if str(n) in t else "" for n in lengths)] for name, t in tables.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = lambda row: (
        text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join("  ".join(cells(row)) for row in rows)
