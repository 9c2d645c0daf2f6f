"""The curve of a loss or a score by position, as a PNG file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

DPI = 150


def by_position(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    path: Path,
    trained: int | None = None,
) -> None:
    """Perplexity against position: {name: (edges of the windows, their values)}; a line marks the trained context."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (edges, values) in curves.items():
        steps = axes.stairs(values, edges, baseline=None, linewidth=1.5, label=name)
        axes.plot((edges[1:] + edges[:-1]) / 2, values, "o", markersize=4, color=steps.get_edgecolor())
    drawn = np.concatenate([values for _, values in curves.values()])
    if drawn.max() > 5 * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.15 * drawn.max())
    furthest = max(int(edges[-1]) for edges, _ in curves.values())
    if trained is not None and trained <= furthest:
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1, label=f"trained context {trained:,}")
    tick = 2 ** max(furthest // 8 - 1, 1).bit_length()  # a power of two, at most nine ticks
    axes.set_xticks(range(0, furthest + 1, tick), [f"{n:,}" for n in range(0, furthest + 1, tick)])
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=DPI)
