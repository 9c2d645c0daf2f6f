"""The job behind `evaluate.py`: one model, several measures, one results.json."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcjax.eval.results import describe_run, peak_device_bytes, write_results
from lcjax.serve.source import Pretrained


@dataclass(frozen=True)
class Evaluate:
    """`tasks` are measures such as @perplexity() and @passkey()."""

    model: Pretrained
    tasks: tuple[Any, ...]

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("evaluate.tasks is empty; give at least one, such as (@perplexity(),)")

    def run(self, output: Path, config: str) -> dict[str, dict[str, float]]:
        """Run every measure; results.json is complete after each."""
        for task in self.tasks:
            if check := getattr(task, "check", None):
                check()
        output.mkdir(parents=True, exist_ok=True)
        run = describe_run(config)
        model = self.model.load()
        tables: dict[str, dict[str, float]] = {}
        seconds: list[float] = []
        for task in self.tasks:
            began = time.perf_counter()
            found = task.run(model, output)
            seconds.append(round(time.perf_counter() - began, 3))
            if twice := tables.keys() & found.keys():
                raise ValueError(f"evaluate.tasks gives {sorted(twice)[0]!r} twice; give one of the two another name")
            tables |= {name: dict(table) for name, table in found.items()}
            write_results(output, tables, run | {"seconds": seconds, "peak_device_bytes": peak_device_bytes()})
        return tables
