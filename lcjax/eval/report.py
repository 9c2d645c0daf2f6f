"""One HTML page for a run or a comparison: tables with intervals, figures inside, sample answers, no network."""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lcjax.eval.contour import effective_length, longest_passing
from lcjax.eval.figures import (
    THRESHOLD,
    comparison_figure,
    contour_figures,
    depth_figure,
    memory_figure,
    score_figure,
    short,
)
from lcjax.eval.metrics.statistics import Interval, paired_difference
from lcjax.eval.outcome import Cell, Outcome

DPI = 130
_SAMPLES = 2  # wrong answers shown a task
_LONGEST = 240  # characters of an answer shown
_STYLE = (
    ":root{--ink:#1b1e23;--soft:#5f6670;--line:#e4e6ea}"
    "body{font:15px/1.55 system-ui,sans-serif;margin:2.5rem auto;max-width:76rem;padding:0 1.5rem;color:var(--ink)}"
    "h1{margin:0 0 .2rem;font-size:1.9rem}h2{margin:2.6rem 0 .6rem;font-size:1.2rem}p{margin:.3rem 0}"
    ".lead,small,.note{color:var(--soft)}.note{font-size:.85rem;max-width:60rem}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "th{font-weight:600;color:var(--soft);border-bottom:2px solid var(--line)}"
    "th,td{padding:.32rem .8rem;text-align:right;white-space:nowrap}td{border-bottom:1px solid var(--line)}"
    "th:first-child,td:first-child{text-align:left}tr.sum td{font-weight:600;border-top:2px solid var(--line)}"
    "td small{font-size:.78em}.up{color:#14713f}.down{color:#b3261e}"
    ".bad{background:#fdf3f2;border-left:4px solid #b3261e;padding:.6rem 1rem .6rem 2rem}"
    "img{max-width:100%}details{margin:.4rem 0;border:1px solid var(--line);border-radius:6px;padding:.4rem .9rem}"
    "summary{cursor:pointer}dt{color:var(--soft);font-size:.85rem}dd{margin:0 0 .5rem;white-space:pre-wrap}"
)


def write_report(output: Path, outcome: Outcome) -> None:
    """{suite}.html, and its figures once more as {suite}_{name}.png, into the folder `output`."""
    figures = run_figures(outcome)
    for name, (_, figure) in figures.items():
        figure.savefig(output / f"{outcome.suite}_{name}.png", dpi=DPI)
    parts = [f"<h1>{_text(outcome.suite)}</h1><p class='lead'>{_lead(outcome)}</p>"]
    if outcome.cells:
        parts.append(score_table(outcome))
    parts += [_section(title, figure) for title, figure in figures.values()]
    parts += [wrong_answers(outcome), missing_list(outcome.missing)]
    _write(output / f"{outcome.suite}.html", outcome.suite, parts)


def write_comparison(output: Path, outcomes: Mapping[str, Outcome]) -> None:
    """{suite}_comparison.html with the differences to the first run, a line a run, and quality against memory."""
    suite = next(iter(outcomes.values())).suite
    lead = ", ".join(f"<b>{_text(name)}</b> ({_text(outcome.model)})" for name, outcome in outcomes.items())
    parts = [f"<h1>{_text(suite)}, compared</h1><p class='lead'>{lead}</p>", difference_table(outcomes)]
    if all(outcome.cells for outcome in outcomes.values()):
        titles = {"scores": "Score by length", "memory": "Quality against memory"}
        for name, figure in (("scores", comparison_figure(outcomes)), ("memory", memory_figure(outcomes))):
            figure.savefig(output / f"{suite}_comparison_{name}.png", dpi=DPI)
            parts.append(_section(titles[name], figure))
    parts.append(
        missing_list(
            (f"{name}: {task}", length, reason)
            for name, outcome in outcomes.items()
            for task, length, reason in outcome.missing
        )
    )
    _write(output / f"{suite}_comparison.html", f"{suite}, compared", parts)


def run_figures(outcome: Outcome) -> dict[str, tuple[str, Figure]]:
    """{name: (title, figure)} of what the run has to show."""
    figures: dict[str, tuple[str, Figure]] = {}
    if outcome.cells:
        figures["scores"] = ("Score by length", score_figure(outcome))
    if (depths := depth_figure(outcome)) is not None:
        figures["depths"] = ("Score by length and depth", depths)
    for number, (title, figure) in enumerate(contour_figures(outcome.cells), 1):
        figures[f"contour_{number}"] = (title, figure)
    return figures


def score_table(outcome: Outcome) -> str:
    """Mean and 95 % interval for each task and length, and each task's effective context."""
    effective = effective_context(outcome)
    heads = [short(n) for n in outcome.lengths]
    rows = [_row(["task", *heads, "effective", "examples", "seconds"], "th")]
    for task in outcome.tasks:
        cells = [outcome.find(task, n) for n in outcome.lengths]
        there = [cell for cell in cells if cell]
        counts = "/".join(map(str, sorted({len(cell.rows) for cell in there})))
        if dropped := max(cell.dropped for cell in there):
            counts += f" <small>({dropped} left out)</small>"
        passed = f"{effective[task][0]:,.0f}" if effective[task][0] else "&ndash;"
        last = [passed, counts, f"{sum(cell.seconds for cell in there):.1f}"]
        rows.append(f"<tr><td>{_text(task)}</td>{''.join(map(_score_cell, cells))}{_cells(last)}</tr>")
    if len(outcome.tasks) > 1:
        means = outcome.means()
        shown = [f"{100 * means[n]:.1f}" if n in means else "&ndash;" for n in outcome.lengths]
        total = f"{sum(cell.seconds for cell in outcome.cells):.1f}"
        rows.append(f"<tr class='sum'>{_cells(['mean of tasks', *shown, '', '', total])}</tr>")
    note = (
        "Mean x 100 with its 95 % bootstrap interval (Wilson where all examples agree). Effective: tokens up to which "
        f"the score stays at {THRESHOLD:.0%} or more, interpolated in the logarithm of the length. Seconds: of this "
        "run; answers from disk take none."
    )
    return f"<table>{''.join(rows)}</table><p class='note'>{note}</p>"


def difference_table(outcomes: Mapping[str, Outcome]) -> str:
    """Scores of the first run and differences of the others; those whose interval excludes 0 are coloured."""
    (base, first), *others = outcomes.items()
    rows = [_row(["task", "context", _text(base), *(_text(name) for name, _ in others)], "th")]
    for cell in first.cells:
        shown = [_text(cell.task), short(cell.length)]
        changes = [difference(cell, outcome) for _, outcome in others]
        rows.append(f"<tr>{_cells(shown)}{_score_cell(cell)}{''.join(map(_change_cell, changes))}</tr>")
    note = (
        "Scores x 100; differences to the first run over the same examples with their 95 % bootstrap interval, in "
        "colour where it excludes 0."
    )
    return f"<table>{''.join(rows)}</table><p class='note'>{note}</p>"


def difference(cell: Cell, other: Outcome) -> Interval | None:
    """What the other run scores more on the same examples, None where it has not the same ones."""
    found = other.find(cell.task, cell.length)
    if found is None or [row["id"] for row in found.rows] != [row["id"] for row in cell.rows]:
        return None
    return paired_difference(cell.headline, found.headline)


def wrong_answers(outcome: Outcome) -> str:
    """For each task some answers that did not get the full score, at the shortest length that has any."""
    parts = []
    for task in outcome.tasks:
        cells = [cell for n in outcome.lengths if (cell := outcome.find(task, n))]
        wrong = [(cell, row) for cell in cells for row, s in zip(cell.rows, cell.headline, strict=True) if s < 1]
        shown = "".join(_answer(cell, row) for cell, row in wrong[:_SAMPLES])
        if shown:
            total = sum(len(cell.rows) for cell in cells)
            parts.append(
                f"<details><summary>{_text(task)}: {len(wrong)} of {total}</summary><dl>{shown}</dl></details>"
            )
    return f"<h2>Answers below the full score</h2>{''.join(parts)}" if parts else ""


def missing_list(missing: Iterable[tuple[str, int, str]]) -> str:
    """What did not run, and why."""
    rows = [f"<li>{_text(task)} at {short(length)}: {_text(reason)}</li>" for task, length, reason in missing]
    return f"<h2>Missing</h2><ul class='bad'>{''.join(rows)}</ul>" if rows else ""


def effective_context(outcome: Outcome, threshold: float = THRESHOLD) -> dict[str, tuple[float, int]]:
    """For each task: the interpolated effective length at the threshold, and the longest length that passes it."""
    curves = {
        task: {cell.length: cell.interval.mean for cell in outcome.cells if cell.task == task} for task in outcome.tasks
    }
    return {task: (effective_length(c, threshold), longest_passing(c, threshold)) for task, c in curves.items()}


def _lead(outcome: Outcome) -> str:
    examples = sum(len(cell.rows) for cell in outcome.cells)
    counts = f"{len(outcome.tasks)} tasks, {examples:,} examples, {', '.join(map(short, outcome.lengths))} tokens"
    return f"{_text(outcome.model)}: {counts}" if outcome.model else counts


def _answer(cell: Cell, row: Mapping[str, Any]) -> str:
    """What was wanted and what was answered, as items of a description list."""
    wanted, said = _clipped(", ".join(row["references"])), _clipped(row["output"]) or "<i>nothing</i>"
    head = f"{_text(row['id'])} at {short(cell.length)}, wanted"
    return f"<dt>{head}</dt><dd>{wanted}</dd><dt>answered</dt><dd>{said}</dd>"


def _score_cell(cell: Cell | None) -> str:
    """A mean with its interval on a colour from red (0) over yellow to green (1)."""
    if cell is None:
        return "<td>&ndash;</td>"
    mean, low, high, _ = cell.interval
    colour = f"hsl({110 * mean:.0f} 65% 90%)"
    return f"<td style='background:{colour}'>{100 * mean:.1f} <small>[{100 * low:.0f}, {100 * high:.0f}]</small></td>"


def _change_cell(change: Interval | None) -> str:
    if change is None:
        return "<td>missing</td>"
    kind = "up" if change.low > 0 else "down" if change.high < 0 else ""
    bounds = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    return f"<td class='{kind}'>{100 * change.mean:+.1f} <small>{bounds}</small></td>"


def _row(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _clipped(text: str) -> str:
    text = text.strip()
    return _text(text if len(text) <= _LONGEST else text[:_LONGEST] + " ...")


def _section(title: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<h2>{_text(title)}</h2><img alt='{_text(title)}' src='data:image/png;base64,{data}'>"


def _write(path: Path, title: str, parts: list[str]) -> None:
    """Write the page whole or not at all."""
    head = f"<meta charset='utf-8'><title>{_text(title)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    draft = path.with_suffix(".part")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
