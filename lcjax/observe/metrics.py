"""Metrics of a run: a JSON line per report, the same to TensorBoard, and a picture of the loss at the end."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """`metrics.jsonl` in a run's folder. A run resumed at step N keeps the lines up to N and goes on from there."""

    def __init__(self, folder: Path, *, resumed_at: int = 0, tensorboard: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._tensorboard = _open_tensorboard(folder / "tensorboard", resumed_at) if tensorboard else None
        kept = [line for line in read_metrics(self.path) if line["step"] <= resumed_at] if self.path.exists() else []
        draft = self.path.with_suffix(".part")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        draft.rename(self.path)
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 (open for the run; closed in close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one report. A value that is not finite is written as null: JSON has no NaN."""
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _open_tensorboard(folder: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1, write_to_disk=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def plot_loss(path: Path, picture: Path) -> None:
    """Draw loss over steps from a metrics file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in read_metrics(path) if line.get("loss") is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=picture.parent.name)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
