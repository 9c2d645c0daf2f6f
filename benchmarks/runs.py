"""Training runs inside a comparison: the configurations that `train.py` takes, run to their end."""

from collections.abc import Sequence
from pathlib import Path

from lcjax import settings
from lcjax.train import loop
from lcjax.train.preempt import Preemption


def train(files: Sequence[str], bindings: Sequence[str], folder: Path) -> Path:
    """The output folder of the last stage. Goes on with a run that is there already."""
    job, config = settings.load("train", files, bindings)
    last = folder
    with Preemption() as stop:
        for stage, last in job.runs(folder):
            if loop.train(loop.prepare(stage, last, config), stop):
                raise SystemExit(f"the run in {last} was interrupted; run the command again to go on")
    return last


def paths(books: Sequence[Path]) -> str:
    """The binding that trains on these text files."""
    return f"TextFiles.paths = {tuple(map(str, books))!r}"
