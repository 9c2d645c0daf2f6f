"""One HTML page for a run: tables with intervals, plots inside, no network."""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lcjax.eval.contour import effective_length, effective_lengths, longest_passing
from lcjax.eval.metrics.statistics import Interval, bootstrap_interval
from lcjax.eval.outcome import Cell, Outcome

DPI = 110
DEPTH_BINS = 5
THRESHOLD = 0.75
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b1b1b}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}small{color:#666}img{max-width:100%}h2{margin-top:2.2rem}"
    ".bad{color:#a40000}"
)


def write_report(path: Path, outcome: Outcome) -> None:
    """Write the page of a run; it replaces an older one at once."""
    draft = path.with_suffix(".part")
    draft.write_text(report_page(outcome), encoding="utf-8")
    draft.replace(path)


def report_page(outcome: Outcome) -> str:
    """The page as text."""
    parts = [f"<h1>{html.escape(outcome.suite)}</h1>"]
    if outcome.cells:
        parts.append(score_table(outcome))
        parts.append(_section("Score by length", score_plot(outcome)))
        depths = depth_plot(outcome.cells)
        if depths is not None:
            parts.append(_section("Score by length and depth", depths))
        for title, figure in contour_plots(outcome.cells):
            parts.append(_section(title, figure))
    if outcome.missing:
        rows = [f"{html.escape(task)} at {length}: {html.escape(reason)}" for task, length, reason in outcome.missing]
        parts.append("<h2>Missing</h2><ul class='bad'>" + "".join(f"<li>{row}</li>" for row in rows) + "</ul>")
    return _page(outcome.suite, parts)


def score_table(outcome: Outcome) -> str:
    """Mean and 95 % interval for each task and length, and each task's effective context."""
    lengths = sorted({cell.length for cell in outcome.cells})
    found = {(cell.task, cell.length): cell for cell in outcome.cells}
    tasks = list(dict.fromkeys(cell.task for cell in outcome.cells))
    rows = [
        "<tr><th>task</th>" + "".join(f"<th>{n:,}</th>" for n in lengths) + "<th>effective</th><th>examples</th></tr>"
    ]
    effective = effective_context(outcome)
    for task in tasks:
        cells = [found.get((task, n)) for n in lengths]
        counts = {len(cell.headline) for cell in cells if cell}
        shown = "".join(f"<td>{_shown(cell.interval) if cell else '&ndash;'}</td>" for cell in cells)
        more = f"<td>{effective[task][0]:,.0f}</td><td>{'/'.join(map(str, sorted(counts)))}</td>"
        rows.append(f"<tr><td>{html.escape(task)}</td>{shown}{more}</tr>")
    if len(tasks) > 1:
        means = "".join(f"<td>{_mean_row([found.get((t, n)) for t in tasks])}</td>" for n in lengths)
        rows.append(f"<tr><td><b>mean of tasks</b></td>{means}<td></td><td></td></tr>")
    note = (
        "<small>Mean x 100 with its 95 % bootstrap interval (Wilson where all examples agree). Effective: tokens up to "
        f"which the score stays at {THRESHOLD:.0%} or more, interpolated in the logarithm of the length.</small>"
    )
    return f"<table>{''.join(rows)}</table>{note}"


def _shown(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} <small>[{100 * interval.low:.1f}, {100 * interval.high:.1f}]</small>"


def _mean_row(cells: Sequence[Cell | None]) -> str:
    """Mean over tasks where none is missing."""
    there = [cell for cell in cells if cell]
    if len(there) < len(cells):
        return "&ndash;"
    return f"{100 * float(np.mean([cell.interval.mean for cell in there])):.1f}"


def score_plot(outcome: Outcome) -> Figure:
    """Score against length, a line a task with its interval as a band; many tasks are spread over panels of six."""
    tasks = list(dict.fromkeys(cell.task for cell in outcome.cells))
    panels = [tasks[i : i + 6] for i in range(0, len(tasks), 6)]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.6 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)).ravel()
    for axis, names in zip(axes, panels, strict=False):
        for name in names:
            cells = sorted((cell for cell in outcome.cells if cell.task == name), key=lambda cell: cell.length)
            lengths, intervals = [cell.length for cell in cells], [cell.interval for cell in cells]
            (line,) = axis.plot(lengths, [i.mean for i in intervals], marker="o", markersize=4, label=name)
            bounds = [i.low for i in intervals], [i.high for i in intervals]
            axis.fill_between(lengths, *bounds, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.legend(fontsize=7, loc="lower left")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    lengths = sorted({cell.length for cell in outcome.cells})
    for axis in axes[: len(panels)]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.minorticks_off()
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("context, tokens")
        axis.set_ylabel("score")
    return figure


def depth_plot(cells: Iterable[Cell]) -> Figure | None:
    """Heat maps, length by depth of the needle, of every task that says where it hides something."""
    by_task: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        if all("depth" in item for item in cell.items):
            by_task.setdefault(cell.task, {})[cell.length] = cell
    if not by_task:
        return None
    columns = min(3, len(by_task))
    rows = -(-len(by_task) // columns)
    figure = Figure(figsize=(4.3 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    image = None
    for axis, (task, found) in zip(axes, by_task.items(), strict=False):
        lengths = sorted(found)
        grid = np.stack([_by_depth(found[n]) for n in lengths], axis=1)
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "black" if value > 0.6 else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_title(task, fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        labels = [f"{20 * i}-{20 * (i + 1)}%" for i in range(DEPTH_BINS)]
        axis.set_yticks(range(DEPTH_BINS), labels, fontsize=8)
        axis.set_xlabel("context, tokens", fontsize=8)
        axis.set_ylabel("depth", fontsize=8)
    for axis in axes[len(by_task) :]:
        axis.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="score", shrink=0.8)
    return figure


def _by_depth(cell: Cell) -> np.ndarray:
    """Mean score in each fifth of the depth, NaN where no example lies: [DEPTH_BINS]."""
    bins = [min(int(item["depth"] * DEPTH_BINS), DEPTH_BINS - 1) for item in cell.items]
    groups = [[score for score, b in zip(cell.headline, bins, strict=True) if b == i] for i in range(DEPTH_BINS)]
    return np.array([np.mean(group) if group else np.nan for group in groups])


def contour_plots(cells: Iterable[Cell]) -> list[tuple[str, Figure]]:
    """Effective-context contours of families of tasks that differ in the number of needles, or of hops of a thread."""
    families: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = {}
    for cell in cells:
        for axis in ("needles", "thread_length"):
            counts = {item.get(axis) for item in cell.items}
            if len(counts) == 1 and (count := counts.pop()) is not None:
                label = re.sub(r"_\d+(x\d+)?", "", cell.task)
                families.setdefault((label, axis), {}).setdefault(int(count), {}).setdefault(cell.length, [])
                families[label, axis][int(count)][cell.length] += cell.headline
    plots = []
    for (label, axis), scores in families.items():
        means = {n: {length: float(np.mean(v)) for length, v in curve.items()} for n, curve in scores.items()}
        if len(means) > 1 and all(len(curve) > 1 for curve in means.values()):
            plots.append((f"Effective context of {label} by {axis}", contour_plot(means, axis.replace("_", " "))))
    return plots


def contour_plot(scores: Mapping[int, Mapping[int, float]], label: str) -> Figure:
    """Score over length x count as filled contours; the line is the effective context at THRESHOLD."""
    counts = sorted(scores)
    lengths = sorted(set.intersection(*(set(curve) for curve in scores.values())))
    grid = np.array([[scores[count][length] for length in lengths] for count in counts])
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.add_subplot()
    filled = axis.contourf(np.log2(lengths), counts, grid, levels=np.linspace(0, 1, 11), cmap="viridis")
    effective = effective_lengths(scores, THRESHOLD)
    seen = [(np.log2(length), count) for count, length in effective.items() if length > 0]
    if seen:
        axis.plot(*zip(*seen, strict=True), color="white", marker="o", linewidth=2, label=f"score = {THRESHOLD:.0%}")
        axis.legend(loc="upper right", facecolor="0.3", labelcolor="white")
    axis.set_xticks(np.log2(lengths), [f"{n:,}" for n in lengths])
    axis.set_yticks(counts)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel(label)
    figure.colorbar(filled, ax=axis, label="score")
    return figure


def write_comparison(path: Path, outcomes: Mapping[str, Outcome], table: str) -> None:
    """A page with the table of differences, and quality against cache memory at each length."""
    parts = [f"<h1>Comparison</h1><pre>{html.escape(table)}</pre>"]
    if all(outcome.cells for outcome in outcomes.values()):
        parts.append(_section("Quality against memory", memory_plot(outcomes)))
    path.write_text(_page("Comparison", parts), encoding="utf-8")


def memory_plot(outcomes: Mapping[str, Outcome]) -> Figure:
    """Mean score of a run at a length, with its interval, against the cache of one request; a line a run."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.add_subplot()
    for name, outcome in outcomes.items():
        points = []
        for length in sorted({cell.length for cell in outcome.cells}):
            cells = [cell for cell in outcome.cells if cell.length == length]
            found = bootstrap_interval([score for cell in cells for score in cell.headline])
            points.append((max(cell.cache_bytes for cell in cells) / 2**20, found, length))
        means = [found.mean for _, found, _ in points]
        error = [[f.mean - f.low for _, f, _ in points], [f.high - f.mean for _, f, _ in points]]
        axis.errorbar([size for size, _, _ in points], means, yerr=error, marker="o", capsize=3, label=name)
        for size, found, length in points:
            axis.annotate(f"{length:,}", (size, found.mean), textcoords="offset points", xytext=(5, 5), fontsize=7)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("cache of one request, MiB")
    axis.set_ylabel("mean score of all examples")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def effective_context(outcome: Outcome, threshold: float = THRESHOLD) -> dict[str, tuple[float, int]]:
    """For each task: the interpolated effective length at the threshold, and the longest length that passes it."""
    curves: dict[str, dict[int, float]] = {}
    for cell in outcome.cells:
        curves.setdefault(cell.task, {})[cell.length] = cell.interval.mean
    return {task: (effective_length(c, threshold), longest_passing(c, threshold)) for task, c in curves.items()}


def _section(title: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"


def _page(title: str, parts: list[str]) -> str:
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
