"""One HTML page for a run or a comparison: tables with intervals, figures inside, sample answers, no network."""

import base64
import html
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lcjax.eval.contour import effective_length, longest_passing, weighted_score
from lcjax.eval.figures import (
    THRESHOLD,
    comparison_figure,
    contour_figures,
    depth_figure,
    memory_figure,
    score_figure,
    short,
)
from lcjax.eval.metrics.statistics import Interval, bootstrap_interval
from lcjax.eval.outcome import BY_CATEGORY, MEAN, Cell, Outcome, compare

DPI = 130
_SAMPLES = 2  # wrong answers shown a task
_LONGEST = 240  # characters of an answer shown
_BAND = "Bands (bars): 95 % bootstrap intervals over the examples."
_DEPTHS = (
    "Mean score in % by the fifth of the context in which the text that is asked for lies (0 %: the start). Grey: no "
    "example there. Tasks with wanted texts at several depths are left out."
)
_CONTOUR = (
    f"Colour: mean score, interpolated between the measured points. Line: where it falls under {THRESHOLD:.0%}; counts "
    "that are under it at the shortest length have no point."
)
_MEMORY = "One point a length; bars: 95 % bootstrap intervals. Cache: keys, values and states of one request."
_STYLE = (
    ":root{--ink:#1b1e23;--soft:#5f6670;--line:#e4e6ea}"
    "body{font:15px/1.55 system-ui,sans-serif;margin:2.5rem auto;max-width:76rem;padding:0 1.5rem;color:var(--ink)}"
    "h1{margin:0 0 .2rem;font-size:1.9rem}h2{margin:2.6rem 0 .6rem;font-size:1.2rem}p{margin:.3rem 0}"
    ".lead,small,.note{color:var(--soft)}.note{font-size:.85rem;max-width:60rem}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}"
    "th{font-weight:600;color:var(--soft);border-bottom:2px solid var(--line);vertical-align:bottom}"
    "th,td{padding:.32rem .8rem;text-align:right}td{border-bottom:1px solid var(--line);white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}tr.sum td{font-weight:600;border-top:2px solid var(--line)}"
    "td small{font-size:.78em}.up{color:#14713f}.down{color:#b3261e}"
    ".bad{background:#fdf3f2;border-left:4px solid #b3261e;padding:.6rem 1rem .6rem 2rem}"
    "img{max-width:100%;height:auto}"
    "details{margin:.4rem 0;border:1px solid var(--line);border-radius:6px;padding:.4rem .9rem}"
    "summary{cursor:pointer}dt{color:var(--soft);font-size:.85rem}"
    "dd{margin:0 0 .5rem;white-space:pre-wrap;overflow-wrap:anywhere}"
)


class Picture(NamedTuple):
    """A figure with its heading and what a reader must know of it."""

    title: str
    figure: Figure
    caption: str


def write_report(output: Path, outcome: Outcome) -> None:
    """{suite}.html, and its figures once more as {suite}_{name}.png, into the folder `output`."""
    pictures = run_pictures(outcome)
    parts = [f"<h1>{_text(outcome.suite)}</h1><p class='lead'>{_lead(outcome)}</p>"]
    if outcome.setting:
        parts.append(f"<p class='note'>{_text(outcome.setting)}</p>")
    if outcome.cells:
        parts.append(score_table(outcome))
    parts += [missing_list(outcome.missing), further_metrics(outcome)]
    parts += [_section(picture, output / f"{outcome.suite}_{name}.png") for name, picture in pictures.items()]
    parts.append(wrong_answers(outcome))
    _write(output / f"{outcome.suite}.html", outcome.suite, parts)


def write_comparison(output: Path, outcomes: Mapping[str, Outcome]) -> None:
    """{suite}_comparison.html with the differences to the first run, a line a run, and quality against memory."""
    suite = next(iter(outcomes.values())).suite
    lead = "".join(
        f"<p class='lead'><b>{_text(name)}</b>: {_lead(outcome)}</p><p class='note'>{_text(outcome.setting)}</p>"
        for name, outcome in outcomes.items()
    )
    missing = [
        (f"{name}: {task}", length, reason)
        for name, outcome in outcomes.items()
        for task, length, reason in outcome.missing
    ]
    parts = [f"<h1>{_text(suite)}, compared</h1>{lead}", difference_table(outcomes), missing_list(missing)]
    pictures = {}
    if any(outcome.cells for outcome in outcomes.values()):
        pictures["scores"] = Picture("Score by length", comparison_figure(outcomes), _BAND)
        if (memory := memory_figure(outcomes)) is not None:
            pictures["memory"] = Picture("Quality against memory", memory, _MEMORY)
    parts += [_section(picture, output / f"{suite}_comparison_{name}.png") for name, picture in pictures.items()]
    _write(output / f"{suite}_comparison.html", f"{suite}, compared", parts)


def run_pictures(outcome: Outcome) -> dict[str, Picture]:
    """{name: picture} of what the run has to show."""
    pictures: dict[str, Picture] = {}
    if outcome.cells:
        pictures["scores"] = Picture("Score by length", score_figure(outcome), _BAND)
    if (depths := depth_figure(outcome)) is not None:
        pictures["depths"] = Picture("Score by length and depth", depths, _DEPTHS)
    for number, (title, figure) in enumerate(contour_figures(outcome.cells), 1):
        pictures[f"contour_{number}"] = Picture(title, figure, _CONTOUR)
    return pictures


def score_table(outcome: Outcome) -> str:
    """Mean and 95 % interval for each task and length, and each task's effective context."""
    effective = effective_context(outcome)
    heads = [f"{short(n)} tokens" for n in outcome.lengths]
    rows = [_row(["task", *heads, "effective context", "examples", "seconds"], "th")]
    for task in outcome.tasks:
        cells = [outcome.find(task, n) for n in outcome.lengths]
        there = [cell for cell in cells if cell]
        scores = [_score_cell(cell.interval if cell else None) for cell in cells]
        last = [_tokens(effective[task][0]), _counts(there), f"{sum(cell.seconds for cell in there):.1f}"]
        rows.append(f"<tr><td>{_text(task)}</td>{''.join(scores)}{_cells(last)}</tr>")
    rows += [*_category_rows(outcome), _mean_row(outcome)]
    note = (
        "Mean score in % with its 95 % bootstrap interval (Wilson where all examples agree). Effective context: tokens "
        f"up to which the score stays at {THRESHOLD:.0%} or more, interpolated in the logarithm of the length; a dash "
        "where the shortest length is under it. Examples: at each length. Seconds: of this run; answers from disk take "
        f"none.{_weighted(outcome)}"
    )
    return f"<table>{''.join(rows)}</table><p class='note'>{note}</p>"


def _category_rows(outcome: Outcome) -> list[str]:
    """The mean of each category that has several tasks."""
    sizes = Counter(category for _, category in {(cell.task, cell.category) for cell in outcome.cells})
    rows = []
    for name, means in outcome.categories().items():
        if sizes[name] > 1:
            scores = "".join(_score_cell(means.get(n)) for n in outcome.lengths)
            effective = effective_length({n: found.mean for n, found in means.items()}, THRESHOLD)
            rows.append(
                f"<tr><td>{_text(name)}, {sizes[name]} tasks</td>{scores}{_cells([_tokens(effective), '', ''])}</tr>"
            )
    return rows


def _mean_row(outcome: Outcome) -> str:
    """The mean of several tasks at each length."""
    if len(outcome.tasks) == 1:
        return ""
    means = outcome.means()
    scores = "".join(_score_cell(means.get(n)) for n in outcome.lengths)
    effective = effective_length({n: found.mean for n, found in means.items()}, THRESHOLD)
    last = [_tokens(effective), "", f"{sum(cell.seconds for cell in outcome.cells):.1f}"]
    return f"<tr class='sum'><td>{outcome.mean_name}</td>{scores}{_cells(last)}</tr>"


def _weighted(outcome: Outcome) -> str:
    """RULER's two means over lengths."""
    curve = {n: found.mean for n, found in outcome.means().items()}
    if len(curve) < 2:
        return ""
    rising, falling = (f"{100 * weighted_score(curve, increasing=more):.1f}" for more in (True, False))
    return f" Mean over the lengths, weighted 1, 2, 3, ... from the shortest: {rising}; from the longest: {falling}."


def further_metrics(outcome: Outcome) -> str:
    """Mean and interval of every metric beside the headline."""
    rows = []
    for task in outcome.tasks:
        cells = {n: cell.scores for n in outcome.lengths if (cell := outcome.find(task, n))}
        for metric in list(next(iter(cells.values())))[1:]:
            found = [bootstrap_interval(cells[n][metric]) if n in cells else None for n in outcome.lengths]
            rows.append(f"<tr><td>{_text(task)}, {_text(metric)}</td>{''.join(map(_score_cell, found))}</tr>")
    if not rows:
        return ""
    head = _row(["task and metric", *(f"{short(n)} tokens" for n in outcome.lengths)], "th")
    return f"<h2>Further metrics</h2><table>{head}{''.join(rows)}</table>"


def difference_table(outcomes: Mapping[str, Outcome]) -> str:
    """Scores of the first run and differences of the others; those whose interval excludes 0 are coloured."""
    rows = [_row(["task", "context", *map(_text, outcomes)], "th")]
    for line in compare(outcomes):
        shown = _cells([_text(line.task), f"{short(line.length)} tokens"])
        kind = " class='sum'" if line.task in (MEAN, BY_CATEGORY) else ""
        rows.append(f"<tr{kind}>{shown}{_score_cell(line.base)}{''.join(map(_change_cell, line.changes))}</tr>")
    note = (
        "Scores in %; differences to the first run over the same examples with their 95 % bootstrap interval, in "
        "colour where it excludes 0. The interval has no width where all examples differ alike."
    )
    return f"<table>{''.join(rows)}</table><p class='note'>{note}</p>"


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
    tasks = "1 task" if len(outcome.tasks) == 1 else f"{len(outcome.tasks)} tasks"
    counts = f"{tasks}, {examples:,} examples of {', '.join(map(short, outcome.lengths)) or '0'} tokens"
    counts += f", {len(outcome.missing)} missing" if outcome.missing else ""
    return f"{_text(outcome.model)}: {counts}" if outcome.model else counts


def _counts(cells: list[Cell]) -> str:
    """Examples at a length, and how many documents were left out or cut."""
    text = "/".join(map(str, sorted({len(cell.rows) for cell in cells})))
    dropped, cut = max(cell.dropped for cell in cells), max(cell.cut for cell in cells)
    more = [f"{count} {word}" for count, word in ((dropped, "left out"), (cut, "cut")) if count]
    return f"{text} <small>({', '.join(more)})</small>" if more else text


def _answer(cell: Cell, row: Mapping[str, Any]) -> str:
    """What was wanted and what was answered, as items of a description list."""
    wanted, said = _clipped(", ".join(row["references"])), _clipped(row["output"]) or "<i>nothing</i>"
    head = f"{_text(row['id'])} at {short(cell.length)}, wanted"
    return f"<dt>{head}</dt><dd>{wanted}</dd><dt>answered</dt><dd>{said}</dd>"


def _score_cell(found: Interval | None) -> str:
    """A mean with its interval on a colour from red (0) over yellow to green (1)."""
    if found is None:
        return "<td>&ndash;</td>"
    colour = f"hsl({110 * found.mean:.0f} 65% 90%)"
    bounds = f"[{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return f"<td style='background:{colour}'>{100 * found.mean:.1f} <small>{bounds}</small></td>"


def _change_cell(change: Interval | None) -> str:
    if change is None:
        return "<td>missing</td>"
    kind = "up" if change.low > 0 else "down" if change.high < 0 else ""
    bounds = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    return f"<td class='{kind}'>{100 * change.mean:+.1f} <small>{bounds}</small></td>"


def _tokens(length: float) -> str:
    return f"{length:,.0f}" if length else "&ndash;"


def _row(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _clipped(text: str) -> str:
    text = text.strip()
    return _text(text if len(text) <= _LONGEST else text[:_LONGEST] + " ...")


def _section(picture: Picture, path: Path) -> str:
    """The picture as a part of the page, and by itself at `path`."""
    picture.figure.savefig(path, dpi=DPI)
    data = base64.b64encode(path.read_bytes()).decode()
    title, width = _text(picture.title), round(96 * picture.figure.get_figwidth())
    image = f"<img alt='{title}' width='{width}' src='data:image/png;base64,{data}'>"
    return f"<h2>{title}</h2>{image}<p class='note'>{_text(picture.caption)}</p>"


def _write(path: Path, title: str, parts: list[str]) -> None:
    """Write the page whole or not at all."""
    head = f"<meta charset='utf-8'><title>{_text(title)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    draft = path.with_suffix(".part")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
