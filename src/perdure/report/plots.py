"""The plots of a report and of a comparison: data in, SVG and captions out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..evaluation.compare import interval
from ..evaluation.metrics import check_matrix, forgetting_per_experience, row_averages
from . import svg, words

Report = Mapping[str, Any]
MOST_CELLS = 50
MOST_CHARS = 120
"""Of a label or a name of an experience; the data at the end of the page holds it whole."""
_SITE = re.compile(r"^(?:(?P<tower>[^.]+)\.)?(?P<layer>\d+)\.(?P<role>[A-Za-z_]+)$")
_ROUTER = (
    ("new_share", "Share of selected slots won by new atoms", "share"),
    ("off_rate", "Share of tokens with no atom open", "share"),
    ("effective_atoms", "Effective number of atoms per token", "size"),
)


def names_of(report: Report) -> list[str]:
    """Names of the experiences, `1`, `2` … where the report has none."""
    given = (report["details"].get("stream") or {}).get("experiences") or []
    wide = max([len(report["matrix"]), *(len(row) for row in report["matrix"])], default=0)
    return [svg.shorten(given[j], MOST_CHARS) if j < len(given) else f"{j + 1}" for j in range(wide)]


def score_axis(values: Sequence[float], metric: str, label: str) -> svg.Axis:
    """An axis: what is shown in per cent from 0 to 100 % unless all lie on one side of 50 %, and then from or to just
    beyond them; perplexities from their own range.
    """

    def show(v: float) -> str:
        return words.minus(f"{100 * v:.4g}") if words.percent(metric) else words.minus(f"{v:,.6g}")

    if words.percent(metric):
        low = min(values, default=0.0)
        floor = math.floor((low - 0.02) * 10) / 10 if low > 0.5 else 0.0
        high = max(values, default=1.0)
        roof = max(0.1, math.ceil((high + 0.02) * 10) / 10) if high < 0.5 else max(1.0, high)
        return svg.Axis(min(floor, math.floor(low * 10) / 10), roof, f"{label} (%)", show)
    low, high = min(values, default=1.0), max(values, default=2.0)
    return svg.Axis(low, high, label, show)


def experience_axis(count: int) -> svg.Axis:
    low, high = (0.5, 1.5) if count <= 1 else (1.0, float(count))
    ticks = svg.integer_ticks(1, max(count, 1))
    return svg.Axis(low, high, "experiences learnt", lambda v: f"{v:.0f}", ticks=ticks)


# ---- the matrix
def _binned(rows: list[list[float | None]]) -> tuple[list[list[float | None]], int]:
    """Means over blocks of k x k cells so that at most MOST_CELLS remain on a side."""
    k = math.ceil(max(len(rows), len(rows[0]) if rows else 0) / MOST_CELLS)
    if k <= 1:
        return rows, 1
    result = []
    for i in range(0, len(rows), k):
        line: list[float | None] = []
        for j in range(0, len(rows[0]), k):
            block = [c for row in rows[i : i + k] for c in row[j : j + k] if c is not None]
            line.append(math.fsum(block) / len(block) if block else None)
        result.append(line)
    return result, k


def shade_for(values: Sequence[float], metric: str, higher_is_better: bool) -> Callable[[float], float]:
    """Value -> depth of colour, deep for good: shares on 0 to 1, perplexity by its logarithm over the given range."""
    if words.percent(metric) and higher_is_better:
        return lambda v: v
    logs = [math.log(max(v, 1e-12)) for v in values]
    low, high = min(logs, default=0.0), max(logs, default=1.0)
    span = high - low or 1.0
    return lambda v: 1 - (math.log(max(v, 1e-12)) - low) / span


def matrix_plot(report: Report, shade: Callable[[float], float] | None = None) -> dict[str, str]:
    """The heat map of R with its caption."""
    return matrix_heatmap(
        check_matrix(report["matrix"]), names_of(report), report["metric"], report["higher_is_better"], shade
    )


def matrix_heatmap(
    rows: list[list[float | None]],
    names: Sequence[str],
    metric: str,
    higher_is_better: bool,
    shade: Callable[[float], float] | None = None,
    compact: bool = False,
) -> dict[str, str]:
    """The heat map of a matrix with its caption; `compact` for one of several side by side."""
    if not rows:
        return {"svg": "", "caption": "Nothing has been measured yet."}
    averages = row_averages(rows)
    cells, k = _binned(rows)
    numbers = len(cells[0]) <= 20

    def show(v: float) -> str:
        return words.score(v, metric, 0 if compact or len(cells[0]) > 12 else 1)

    shade = shade or shade_for([c for row in cells for c in row if c is not None], metric, higher_is_better)
    if k > 1:
        starts = range(1, len(rows) + 1, k)
        row_names = [f"after {s}–{min(s + k - 1, len(rows))}" for s in starts]
        columns = [f"{s}" for s in range(1, len(rows[0]) + 1, k)]
        extra = None
    else:
        row_names = [f"{i + 1} {names[i]}" if names[i] != f"{i + 1}" else f"after {i + 1}" for i in range(len(rows))]
        columns = list(names) if numbers and not compact else [f"{j + 1}" for j in range(len(names))]
        extra = averages
    title = "score on each experience (columns) after learning each experience (rows)"
    plot = svg.heatmap(cells, row_names, columns, show, shade, title, diagonal=k == 1, extra=extra, compact=compact)
    unit = metric.capitalize() + (" in per cent" if words.percent(metric) else "")
    caption = f"{unit}. Row: after learning this experience. Column: test rows of this experience. Deep is better. "
    caption += "Outlined: just learnt; below it one sees what was kept. Empty: not measured." if k == 1 else ""
    if k > 1:
        caption += (
            f"Each cell is the mean of {k} × {k} experiences; the numbers are in the data at the end of the page."
        )
    elif not numbers:
        caption += " Point at a cell for its number."
    return {"svg": plot, "caption": caption}


def mean_matrix(reports: Sequence[Report]) -> list[list[float | None]]:
    """Cell by cell mean over seeds, None where a seed lacks the cell."""
    all_rows = [check_matrix(r["matrix"]) for r in reports]
    tall = min(len(rows) for rows in all_rows)
    wide = min((len(rows[0]) if rows else 0) for rows in all_rows)
    return [[interval([rows[i][j] for rows in all_rows])["mean"] for j in range(wide)] for i in range(tall)]


# ---- curves of a run
def curve_plot(report: Report) -> str:
    """Average score after each experience, over the single experiences' own curves."""
    rows, names, metric = check_matrix(report["matrix"]), names_of(report), report["metric"]
    series = []
    for j in range(len(rows)):
        points = [(i + 1.0, v) for i in range(j, len(rows)) if (v := rows[i][j]) is not None]
        if points:
            series.append(svg.Series(f"experience {j + 1}: {names[j]}", points, style=None, marks=len(rows) <= 15))
    mean = [(i + 1.0, v) for i, v in enumerate(row_averages(rows)) if v is not None]
    series.append(svg.Series("average over the experiences learnt", mean, style=0, width=2.8))
    values = [y for s in series for _, y in s.points]
    if not values:
        return ""
    return svg.lines(series, experience_axis(len(rows)), score_axis(values, metric, metric), "scores over experiences")


def forgetting_plot(report: Report) -> str:
    values = forgetting_per_experience(check_matrix(report["matrix"]), report["higher_is_better"])
    if not any(v is not None for v in values):
        return ""
    names = names_of(report)
    shown = [f"{j + 1} {names[j]}" if names[j] != f"{j + 1}" else f"experience {j + 1}" for j in range(len(values))]
    return svg.bars(shown, values, lambda v: words.score(v, report["metric"]), "forgetting of each experience")


def stored_plot(report: Report) -> str:
    """Bytes kept beside the base after each experience."""
    kept = report["curves"].get("stored_bytes") or ()
    if len(kept) < 2:
        return ""
    first = len(report["matrix"]) - len(kept) + 1  # a run that an older version began has no figures from then
    line = svg.Series("stored", [(float(first + n), float(each)) for n, each in enumerate(kept)], marks=len(kept) <= 25)
    unit, size = next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6)) if max(kept) >= size), ("kB", 1e3))
    y = svg.Axis(0.0, float(max(kept)) or 1.0, f"{unit} stored", lambda v: f"{v / size:g}")
    return svg.lines([line], experience_axis(len(report["matrix"])), y, "bytes stored over experiences")


def directions_plot(report: Report) -> str:
    """Share of the input directions that are protected or left free, after each experience."""
    found = report["curves"].get("plasticity") or {}
    words_of = {"protected_directions": "protected", "free_directions": "left free"}
    series = []
    for name in (name for name in words_of if name in found):
        first = len(report["matrix"]) - len(found[name]) + 1
        points = [(float(first + n), float(v)) for n, v in enumerate(found[name]) if v is not None]
        if len(points) > 1:
            series.append(svg.Series(words_of[name], points, marks=len(points) <= 25))
    if not series:
        return ""
    what = f" {series[0].name}" if len(series) == 1 else ""  # one series has no legend
    y = svg.Axis(0.0, 1.0, f"share of input directions{what}", lambda v: f"{v:g}")
    return svg.lines(series, experience_axis(len(report["matrix"])), y, "directions of inputs over experiences")


def loss_plot(report: Report, most: int = 240) -> str:
    """Training loss over steps, averaged in bins; hairlines where an experience begins."""
    points = [(float(s), int(e), float(v)) for s, e, v in report["curves"].get("loss", ())]
    if len(points) < 2:
        return ""
    rules, seen = [], {points[0][1]}
    for step, experience, _ in points:
        if experience not in seen:
            seen.add(experience)
            rules.append((step, f"experience {experience + 1} begins"))
    size = math.ceil(len(points) / most)
    bins = [points[n : n + size] for n in range(0, len(points), size)]
    curve = [(math.fsum(p[0] for p in b) / len(b), math.fsum(p[2] for p in b) / len(b)) for b in bins]
    top = max(v for _, v in curve)
    x = svg.Axis(0, points[-1][0], "optimizer steps", lambda v: f"{v:,.0f}")
    y = svg.Axis(min(0.0, *(v for _, v in curve)), top, "training loss", lambda v: words.minus(f"{v:.4g}"))
    line = svg.Series("training loss", curve, marks=False, width=1.6)
    return svg.lines([line], x, y, "training loss over steps", rules if len(rules) <= 60 else ())


def probe_plot(report: Report) -> str:
    """Scores between the boundaries: the average over the experiences met, over the single experiences' own curves."""
    found, metric, names = report["curves"].get("probe") or {}, report["metric"], names_of(report)
    if len(found.get("average") or ()) < 2:
        return ""
    series = []
    for j, points in found["scores"].items():
        name = f"experience {int(j) + 1}: {names[int(j)]}"
        series.append(svg.Series(name, [tuple(point) for point in points], style=None, marks=False))
    mean = [tuple(point) for point in found["average"]]
    series.append(svg.Series("average over the experiences met", mean, style=0, width=2.0, marks=False))
    rules = [(float(end), f"experience {n + 2} begins") for n, end in enumerate(found["ends"][:-1])]
    x = svg.Axis(0, mean[-1][0], "optimizer steps", lambda v: f"{v:,.0f}")
    y = score_axis([v for s in series for _, v in s.points], metric, metric)
    return svg.lines(series, x, y, "scores over optimizer steps", rules if len(rules) <= 60 else ())


def router_plots(report: Report) -> list[dict[str, str]]:
    """One heat map, layers by roles, for each known figure of the router; nothing where sites have other names."""
    sites = {site: _SITE.match(site) for site in report["router"]}
    found = [m for m in sites.values() if m]
    if not found or len(found) < len(sites):
        return []
    layers = sorted({(m["tower"] or "", int(m["layer"])) for m in found})
    roles = list(dict.fromkeys(m["role"] for m in found))
    plots = []
    for key, title, kind in _ROUTER:
        table: dict[tuple[str, int], dict[str, float]] = {}
        for site, m in sites.items():
            value = report["router"][site].get(key)
            if m and value is not None:
                table.setdefault((m["tower"] or "", int(m["layer"])), {})[m["role"]] = value
        values = [v for row in table.values() for v in row.values()]
        if not values:
            continue
        top = 1.0 if kind == "share" else max(values) or 1.0
        cells = [[table.get(layer, {}).get(role) for role in roles] for layer in layers]
        rows = [f"{tower} layer {layer + 1}".strip() for tower, layer in layers]
        plot = svg.heatmap(
            cells,
            rows,
            [role.replace("_", " ") for role in roles],
            (lambda v: f"{100 * v:.0f}%") if kind == "share" else (lambda v: f"{v:.1f}"),
            lambda v, top=top: v / top,
            title,
            numbers=True,
        )
        plots.append({"svg": plot, "title": title})
    return plots


def router_history_plot(report: Report) -> str:
    """The router's shares after each experience, means over all sites: whether new atoms are starved later on."""
    history = report["details"].get("router_history") or []
    series = []
    for style, (key, name) in enumerate(
        (("new_share", "slots won by new atoms"), ("off_rate", "tokens with none open"))
    ):
        points = [(i + 1.0, facts[key]) for i, facts in enumerate(history) if facts.get(key) is not None]
        if points:
            series.append(svg.Series(name, points, style=style))
    if len(history) < 2 or not series:
        return ""
    y = svg.Axis(0.0, 1.0, "share (%)", lambda v: f"{100 * v:.0f}")
    return svg.lines(series, experience_axis(len(history)), y, "router over experiences")


# ---- a comparison
def arm_curves(arms: Mapping[str, Sequence[Report]], metric: str) -> str:
    """Average score over experiences for each arm; the band is the 95 % interval over seeds."""
    series, values, longest = [], [], 1
    for style, (arm, reports) in enumerate(arms.items()):
        curves = [row_averages(r["matrix"]) for r in reports]
        longest = max(longest, *(len(c) for c in curves))
        points, band = [], []
        for i in range(min(len(c) for c in curves)):
            entry = interval([c[i] for c in curves])
            mean, low, high = entry["mean"], entry["low"], entry["high"]
            if mean is None:
                continue
            points.append((i + 1.0, mean))
            if low is not None and high is not None:
                edge = (max(low, 0.0), min(high, 1.0)) if words.percent(metric) else (max(low, 0.0), high)
                band.append((i + 1.0, *edge))
        values += [v for _, v in points] + [v for _, a, b in band for v in (a, b)]
        series.append(svg.Series(arm, points, band, style))
    if not values:
        return ""
    return svg.lines(
        series, experience_axis(longest), score_axis(values, metric, f"average {metric}"), "average over experiences"
    )


def _bar(entry: Mapping[str, Any], low: float = -math.inf, high: float = math.inf) -> tuple[float, float] | None:
    if entry["low"] is None or entry["high"] is None:
        return None
    return max(entry["low"], low), min(entry["high"], high)


def arm_plane(comparison: Mapping[str, Any], block: str, name: str) -> str:
    """Average score against another figure of each arm, with 95 % intervals; hollow: upper bound or control."""
    metric, points = comparison["metric"], []
    for style, row in enumerate(comparison["rows"]):
        across, up = row[block].get(name), row["metrics"].get("average_accuracy")
        if not across or not up or across["mean"] is None or up["mean"] is None:
            continue
        xs = _bar(across) if block == "metrics" else None
        ys = _bar(up, 0.0, 1.0) if words.percent(metric) else _bar(up, 0.0)
        hollow = row["status"] in ("upper bound", "control")
        points.append(svg.Point(row["arm"], across["mean"], up["mean"], style, hollow, xs, ys))
    if not points:
        return ""
    ups = [v for p in points for v in (p.y, *(p.ys or ()))]
    y = score_axis(ups, metric, f"average {metric}")
    title = f"average {metric} against {words.label(name, metric)}"
    return svg.plane(points, _cost_axis(points, name) if block == "cost" else _score_x(points, metric, name), y, title)


def _score_x(points: Sequence[svg.Point], metric: str, name: str) -> svg.Axis:
    values = [v for p in points for v in (p.x, *(p.xs or ()))]
    unit = " (points)" if words.percent(metric) else ""
    scale = 100 if words.percent(metric) else 1
    return svg.Axis(
        min(0.0, *values),
        max(0.05 if words.percent(metric) else 0.5, *values),
        words.label(name, metric).lower() + unit,
        lambda v: words.minus(f"{scale * v:.4g}"),
    )


def _cost_axis(points: Sequence[svg.Point], name: str) -> svg.Axis:
    values = [p.x for p in points]
    label = {
        "seconds": "training time", "stored_bytes": "bytes stored beside the base model",
        "inference_flops_per_row": "FLOPs of one row",
    }.get(name, name)  # fmt: skip
    log = min(values) > 0 and max(values) / min(values) > 20

    def show(v: float) -> str:
        return f"{v:,.4g} s" if name == "seconds" else words.figure(name, v)

    return svg.Axis(min(values) if log else 0.0, max(*values, 1.0), label, show, log=log)
