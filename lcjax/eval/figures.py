"""Figures of suites: score by length, by depth and by number of needles, and several runs in one picture."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lcjax.eval.contour import effective_lengths
from lcjax.eval.outcome import Cell, Outcome

DEPTH_BINS = 5
WIDEST = 11.6  # inches of all panels in a row
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


class Panels(NamedTuple):
    """A figure and the panels of it that are used."""

    figure: Figure
    axes: list[Any]
    rows: int


def panels(count: int, ticks: int, height: float) -> Panels:
    """A figure with `count` panels of `height` inches, wide enough for `ticks` labels, that share the y axis."""
    width = max(2.9 if count > 1 else 5.0, 0.42 * ticks + 0.8)
    columns = min(max(1, int(WIDEST / width)), count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).ravel())
    for axis in axes[count:]:
        axis.set_visible(False)
    return Panels(figure, axes[:count], rows)


def score_figure(outcome: Outcome) -> Figure:
    """A panel a task: score against length with its interval, and the mean of all tasks in grey behind it."""
    with rc_context(STYLE):
        names, lengths = outcome.tasks, outcome.lengths
        figure, axes, _ = panels(len(names), len(lengths), 1.9)
        means = {n: 100 * found.mean for n, found in outcome.means().items()}
        for axis, name in zip(axes, names, strict=True):
            cells = [cell for n in lengths if (cell := outcome.find(name, n))]
            if len(names) > 1 and len(means) > 1:
                axis.plot(list(means), list(means.values()), color="#b9bec6", linewidth=1.2, label=outcome.mean_name)
            if chance := cells[0].places[0].get("chance"):
                axis.axhline(100 * chance, color="#8a8f98", linestyle=":", linewidth=1, label="chance")
            draw_scores(axis, cells, COLOURS[0])
            axis.set_title(name)
            length_axis(axis, lengths)
        label_scores(figure, axes)
        return figure


def label_scores(figure: Figure, axes: Sequence[Any]) -> None:
    """Names of the axes, once a figure, and one legend of all panels."""
    axes[0].set_ylim(-4, 104)
    axes[0].set_yticks((0, 25, 50, 75, 100))
    figure.supxlabel("context, tokens", fontsize=9)
    figure.supylabel("score, %", fontsize=9)
    found = (axis.get_legend_handles_labels() for axis in axes)
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper left", ncols=len(handles))


def draw_scores(axis: Any, cells: Sequence[Cell], colour: str, label: str | None = None) -> None:
    """Means with their intervals as a band, or as bars where there is one length only."""
    lengths, found = [cell.length for cell in cells], 100 * np.array([cell.interval[:3] for cell in cells])
    means, low, high = found.T
    if len(cells) == 1:
        axis.errorbar(lengths, means, yerr=bars(means, low, high), fmt="o", capsize=3, color=colour, label=label)
        return
    axis.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(lengths, means, marker="o", markersize=4, color=colour, label=label)


def bars(means: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths of error bars, [2, N]: rounding never makes one negative."""
    return np.maximum(np.stack([means - low, high - means]), 0)


def length_axis(axis: Any, lengths: Sequence[int]) -> None:
    """Context lengths as a logarithmic axis with a tick at each that has room for its label, the longest first."""
    axis.set_xscale("log", base=2)
    shown = [lengths[-1]]
    for n in reversed(lengths):
        if np.log2(shown[-1] / n) > 0.1 * np.log2(1.44 * lengths[-1] / lengths[0]):
            shown.append(n)
    axis.set_xticks(shown, [short(n) for n in shown])
    axis.minorticks_off()
    axis.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)


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
        figure, axes, rows = panels(len(names), len(outcome.lengths), 2.0)
        image = None
        for axis, name in zip(axes, names, strict=True):
            cells = [cell for n in outcome.lengths if (cell := outcome.find(name, n))]
            grid = 100 * np.stack([by_depth(cell) for cell in cells], axis=1)
            image = axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
            for (row, column), value in np.ndenumerate(grid):
                text = "" if np.isnan(value) else f"{value:.0f}"
                colour = "white" if value < 12 or value > 88 else "#1b1e23"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
            axis.set_facecolor("#eceef1")
            axis.set_xticks(range(len(cells)), [short(cell.length) for cell in cells])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(name)
        fifths = [f"{100 * i // DEPTH_BINS} - {100 * (i + 1) // DEPTH_BINS} %" for i in range(DEPTH_BINS)]
        axes[0].set_yticks(range(DEPTH_BINS), fifths)
        figure.supxlabel("context, tokens", fontsize=9)
        figure.supylabel("depth", fontsize=9)
        if image is not None:
            figure.colorbar(image, ax=axes, label="score, %", shrink=0.9 / rows, anchor=(0, 1), aspect=12)
        return figure


def by_depth(cell: Cell) -> np.ndarray:
    """Mean score in each fifth of the depth, NaN where no example lies: [DEPTH_BINS]."""
    bins = [min(int(place["depth"] * DEPTH_BINS), DEPTH_BINS - 1) for place in cell.places]
    groups = [[score for score, b in zip(cell.headline, bins, strict=True) if b == i] for i in range(DEPTH_BINS)]
    return np.array([np.mean(group) if group else np.nan for group in groups])


def contour_figures(cells: Iterable[Cell]) -> list[tuple[str, Figure]]:
    """Effective-context contours of families of tasks that differ in the number of needles, threads or hops."""
    families: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = {}
    for cell in cells:
        for axis in ("needles", "threads", "thread_length"):
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
    grid = 100 * np.array([[scores[count][length] for length in lengths] for count in counts])
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axis = figure.subplots()
        filled = axis.contourf(np.log2(lengths), counts, grid, levels=np.linspace(0, 100, 11), cmap="RdYlGn")
        effective = effective_lengths(scores, THRESHOLD)
        seen = [(np.log2(length), count) for count, length in effective.items() if length > 0]
        if seen:
            style: dict[str, Any] = {"color": "#1b1e23", "marker": "o", "linewidth": 2, "clip_on": False}
            axis.plot(*zip(*seen, strict=True), **style, label=f"effective context ({THRESHOLD:.0%})")
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        axis.set_xticks(np.log2(lengths), [short(n) for n in lengths])
        axis.set_yticks(counts)
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(label)
        figure.colorbar(filled, ax=axis, label="score, %")
        return figure


def comparison_figure(outcomes: Mapping[str, Outcome]) -> Figure:
    """A panel a task with a line for each run."""
    with rc_context(STYLE):
        names = list(dict.fromkeys(name for outcome in outcomes.values() for name in outcome.tasks))
        lengths = sorted({n for outcome in outcomes.values() for n in outcome.lengths})
        figure, axes, _ = panels(len(names), len(lengths), 1.9)
        for axis, name in zip(axes, names, strict=True):
            for colour, (run, outcome) in zip(itertools.cycle(COLOURS), outcomes.items(), strict=False):
                cells = [cell for n in lengths if (cell := outcome.find(name, n))]
                if cells:
                    draw_scores(axis, cells, colour, run)
            axis.set_title(name)
            length_axis(axis, lengths)
        label_scores(figure, axes)
        return figure


def memory_figure(outcomes: Mapping[str, Outcome]) -> Figure | None:
    """The mean with its interval against the cache of one request; a line a run. None where no cache is known."""
    curves = {}
    for name, outcome in outcomes.items():
        sizes = {n: max(cell.cache_bytes for cell in outcome.cells if cell.length == n) for n in outcome.lengths}
        points = [(n, sizes[n] / 2**20, found) for n, found in outcome.means().items() if sizes[n]]
        curves |= {name: points} if points else {}
    if not curves:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 3.6), layout="constrained")
        axis = figure.subplots()
        for colour, (name, points) in zip(itertools.cycle(COLOURS), curves.items(), strict=False):
            sizes = [size for _, size, _ in points]
            means, low, high = 100 * np.array([found[:3] for *_, found in points]).T
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "color": colour, "label": name}
            axis.errorbar(sizes, means, yerr=bars(means, low, high), **style)
            for (length, size, _), mean in zip(points, means, strict=True):
                place: dict[str, Any] = {"textcoords": "offset points", "xytext": (5, 5)}
                axis.annotate(short(length), (size, mean), **place, fontsize=7, color=colour)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(-4, 104)
        axis.set_xlabel("cache of one request, MiB")
        axis.set_ylabel(f"{next(iter(outcomes.values())).mean_name}, %")
        axis.legend()
        return figure
