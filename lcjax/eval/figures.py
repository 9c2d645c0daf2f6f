"""Figures of suites: score by length, by depth and by number of needles, and several runs in one picture."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lcjax.eval.contour import effective_lengths
from lcjax.eval.metrics.statistics import bootstrap_interval
from lcjax.eval.outcome import Cell, Outcome

DEPTH_BINS = 5
THRESHOLD = 0.75
COLOURS = ("#2f6fb3", "#d9662b", "#2a9270", "#9b4d9e", "#b8992f", "#c23b4e", "#4f5d6b", "#56a8c7")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def panels(count: int, columns: int, size: tuple[float, float], **share: Any) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels of `size` inches in at most `columns` columns; panels too many are hidden."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **share).ravel())
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def score_figure(outcome: Outcome) -> Figure:
    """A panel a task: score against length with its interval, and the mean of all tasks in grey behind it."""
    with rc_context(STYLE):
        names, lengths = outcome.tasks, outcome.lengths
        figure, axes = panels(len(names), 4, (2.9, 2.1))
        means = outcome.means()
        for axis, name in zip(axes, names, strict=True):
            cells = [cell for n in lengths if (cell := outcome.find(name, n))]
            if len(names) > 1 and len(means) > 1:
                axis.plot(list(means), list(means.values()), color="#b9bec6", linewidth=1.2, label="mean of tasks")
            draw_scores(axis, cells, COLOURS[0])
            axis.set_title(name)
            length_axis(axis, lengths)
            axis.set_ylim(-0.04, 1.04)
        for axis in axes[:: min(4, len(axes))]:
            axis.set_ylabel("score")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left")
        return figure


def draw_scores(axis: Any, cells: Sequence[Cell], colour: str, label: str | None = None) -> None:
    """Means with their intervals as a band, or as bars where there is one length only."""
    lengths, found = [cell.length for cell in cells], [cell.interval for cell in cells]
    means = np.array([interval.mean for interval in found])
    low, high = (np.array([getattr(interval, name) for interval in found]) for name in ("low", "high"))
    if len(cells) == 1:
        bars = np.maximum(np.stack([means - low, high - means]), 0)
        axis.errorbar(lengths, means, yerr=bars, fmt="o", capsize=3, color=colour, label=label)
        return
    axis.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(lengths, means, marker="o", markersize=4, color=colour, label=label)


def length_axis(axis: Any, lengths: Sequence[int]) -> None:
    """Context lengths as a logarithmic axis with a tick at each."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [short(n) for n in lengths])
    axis.minorticks_off()
    axis.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
    axis.set_xlabel("context, tokens")


def short(tokens: int) -> str:
    """1024 -> '1K', 1500 -> '1,500', 2**20 -> '1M'."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def depth_figure(outcome: Outcome) -> Figure | None:
    """Heat maps, length by depth of the needle, of the tasks that say where it is; None where no task does."""
    names = [
        name
        for name in outcome.tasks
        if all("depth" in place for cell in outcome.cells if cell.task == name for place in cell.places)
    ]
    if not names:
        return None
    with rc_context(STYLE | {"axes.grid": False}):
        figure, axes = panels(len(names), 4, (2.9, 2.3))
        image = None
        for axis, name in zip(axes, names, strict=True):
            cells = [cell for n in outcome.lengths if (cell := outcome.find(name, n))]
            grid = np.stack([by_depth(cell) for cell in cells], axis=1)
            image = axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
            for (row, column), value in np.ndenumerate(grid):
                text = "" if np.isnan(value) else f"{100 * value:.0f}"
                colour = "white" if value < 0.12 or value > 0.88 else "#1b1e23"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
            axis.set_xticks(range(len(cells)), [short(cell.length) for cell in cells])
            fifths = [f"{100 * i // DEPTH_BINS}-{100 * (i + 1) // DEPTH_BINS}%" for i in range(DEPTH_BINS)]
            axis.set_yticks(range(DEPTH_BINS), fifths)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(name)
            axis.set_xlabel("context, tokens")
        for axis in axes[:: min(4, len(axes))]:
            axis.set_ylabel("depth")
        if image is not None:
            figure.colorbar(image, ax=axes, label="score", shrink=0.8, aspect=30)
        return figure


def by_depth(cell: Cell) -> np.ndarray:
    """Mean score in each fifth of the depth, NaN where no example lies: [DEPTH_BINS]."""
    bins = [min(int(place["depth"] * DEPTH_BINS), DEPTH_BINS - 1) for place in cell.places]
    groups = [[score for score, b in zip(cell.headline, bins, strict=True) if b == i] for i in range(DEPTH_BINS)]
    return np.array([np.mean(group) if group else np.nan for group in groups])


def contour_figures(cells: Iterable[Cell]) -> list[tuple[str, Figure]]:
    """Effective-context contours of families of tasks that differ in the number of needles, or of hops of a thread."""
    families: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = {}
    for cell in cells:
        for axis in ("needles", "thread_length"):
            counts = {place.get(axis) for place in cell.places}
            if len(counts) == 1 and (count := counts.pop()) is not None:
                label = re.sub(r"_\d+(x\d+)?", "", cell.task)
                families.setdefault((label, axis), {}).setdefault(int(count), {}).setdefault(cell.length, [])
                families[label, axis][int(count)][cell.length] += cell.headline
    figures = []
    for (label, axis), scores in families.items():
        means = {n: {length: float(np.mean(v)) for length, v in curve.items()} for n, curve in scores.items()}
        if len(means) > 1 and all(len(curve) > 1 for curve in means.values()):
            words = axis.replace("_", " ")
            figures.append((f"Effective context of {label} by {words}", contour_figure(means, words)))
    return figures


def contour_figure(scores: Mapping[int, Mapping[int, float]], label: str) -> Figure:
    """Score over length x count as filled contours; the line is the effective context at THRESHOLD."""
    counts = sorted(scores)
    lengths = sorted(set.intersection(*(set(curve) for curve in scores.values())))
    grid = np.array([[scores[count][length] for length in lengths] for count in counts])
    with rc_context(STYLE | {"axes.grid": False}):
        figure, (axis,) = panels(1, 1, (6.5, 3.4))
        filled = axis.contourf(np.log2(lengths), counts, grid, levels=np.linspace(0, 1, 11), cmap="RdYlGn")
        effective = effective_lengths(scores, THRESHOLD)
        seen = [(np.log2(length), count) for count, length in effective.items() if length > 0]
        if seen:
            style: dict[str, Any] = {"color": "#1b1e23", "marker": "o", "linewidth": 2}
            axis.plot(
                *zip(*seen, strict=True), **style, label=f"effective context (score {THRESHOLD:.0%})", clip_on=False
            )
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        axis.set_xticks(np.log2(lengths), [short(n) for n in lengths])
        axis.set_yticks(counts)
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(label)
        figure.colorbar(filled, ax=axis, label="score")
        return figure


def comparison_figure(outcomes: Mapping[str, Outcome]) -> Figure:
    """A panel a task with a line for each run."""
    with rc_context(STYLE):
        names = list(dict.fromkeys(name for outcome in outcomes.values() for name in outcome.tasks))
        lengths = sorted({n for outcome in outcomes.values() for n in outcome.lengths})
        figure, axes = panels(len(names), 4, (2.9, 2.1))
        for axis, name in zip(axes, names, strict=True):
            for colour, (run, outcome) in zip(_colours(len(outcomes)), outcomes.items(), strict=True):
                cells = [cell for n in lengths if (cell := outcome.find(name, n))]
                if cells:
                    draw_scores(axis, cells, colour, run)
            axis.set_title(name)
            length_axis(axis, lengths)
            axis.set_ylim(-0.04, 1.04)
        for axis in axes[:: min(4, len(axes))]:
            axis.set_ylabel("score")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(outcomes))
        return figure


def memory_figure(outcomes: Mapping[str, Outcome]) -> Figure:
    """Mean score of a run at a length, with its interval, against the cache of one request; a line a run."""
    with rc_context(STYLE):
        figure, (axis,) = panels(1, 1, (6.5, 3.6))
        for colour, (name, outcome) in zip(_colours(len(outcomes)), outcomes.items(), strict=True):
            points = []
            for length in outcome.lengths:
                cells = [cell for cell in outcome.cells if cell.length == length]
                found = bootstrap_interval([score for cell in cells for score in cell.headline])
                points.append((max(cell.cache_bytes for cell in cells) / 2**20, found, length))
            sizes, means = [size for size, _, _ in points], [found.mean for _, found, _ in points]
            error = np.array([[f.mean - f.low for _, f, _ in points], [f.high - f.mean for _, f, _ in points]])
            bars = np.maximum(error, 0)
            axis.errorbar(sizes, means, yerr=bars, marker="o", markersize=4, capsize=3, color=colour, label=name)
            for size, found, length in points:
                place: dict[str, Any] = {"textcoords": "offset points", "xytext": (5, 5)}
                axis.annotate(short(length), (size, found.mean), **place, fontsize=7, color=colour)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(-0.04, 1.04)
        axis.set_xlabel("cache of one request, MiB")
        axis.set_ylabel("mean score of all examples")
        axis.legend()
        return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
