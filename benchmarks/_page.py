"""One page of the speed files of a folder: plots of the ratios, then every row."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perdure.report import svg
from perdure.report.build import write_text

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#16202a}
table{border-collapse:collapse;font-size:13px}
td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #e3e8ec}th{font-weight:600}
figure{display:inline-block;width:30rem;max-width:100%;margin:0 1rem 1rem 0}figcaption{font-size:13px}
.wide{overflow-x:auto}.swatch{width:28px;height:14px;vertical-align:middle}small{color:#53616e}"""
FIGURES = ("median", "low", "high", "a_ms", "b_ms", "roofline_share", "flops_ratio", "relative_difference", "recall")
Rows = list[dict[str, Any]]


def render(folder: Path) -> Path:
    """Writes `index.html` of the JSON files in `folder`, which names what each of them was measured on."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    parts = [f"<h1>Speed</h1><p>{html.escape(INTRODUCTION)}</p>"]
    for data in files:
        parts.append(f"<h2>{html.escape(data['name'])}</h2>")
        parts.append(f"<p><small>{html.escape(_facts(data))}</small></p>")
        if data["name"] in PLOTS:
            parts.append(PLOTS[data["name"]](data["rows"]))
        parts.append(f'<div class="wide">{_table(data["rows"])}</div>')
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Speed</title><style>{STYLE}</style>'
    path = folder / "index.html"
    write_text(path, page + "\n".join(parts) + "\n</html>\n")
    return path


INTRODUCTION = (
    "Ratios of time, ours over the other's, measured in turn in one process: below 1, ours is faster. Interval: 95 % "
    "bootstrap of the median. Roofline share: time that a large matrix product or a copy takes on this machine for the "
    "same FLOPs or bytes, over the time taken."
)


def _facts(data: dict[str, Any]) -> str:
    facts = {**data["machine"], **data["settings"]}
    return "; ".join([*(f"{name} {value}" for name, value in facts.items()), *data["notes"]])


def _table(rows: Rows) -> str:
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if not _nested(rows, name)]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    cells = ["".join(f"<td>{_cell(name, row.get(name))}</td>" for name in names) for row in rows]
    body = "".join(f"<tr>{each}</tr>" for each in cells)
    return f"<table><tr>{head}</tr>{body}</table>"


def _nested(rows: Rows, name: str) -> bool:
    return any(isinstance(row.get(name), (dict, list)) for row in rows)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.3g}" if name in FIGURES else html.escape(str(value))


def _chart(rows: Rows, by: str, line: Callable[[dict[str, Any]], str], label: str, title: str) -> str:
    """Median ratios over `by`, a line for each value of `line`; both axes logarithmic."""
    found: dict[str, list[dict[str, Any]]] = {}
    rows = [row for row in rows if by in row and row["low"] > 0]
    if not rows:
        return ""
    for row in rows:
        found.setdefault(line(row), []).append(row)
    series = []
    for style, (name, own) in enumerate(found.items()):
        own = sorted(own, key=lambda row: row[by])
        points = [(row[by], row["median"]) for row in own]
        series.append(svg.Series(name, points, [(row[by], row["low"], row["high"]) for row in own], style))
    ratios = [bound for row in rows for bound in (row["low"], row["high"])]
    sizes = sorted({float(row[by]) for row in rows})
    ticks = sizes if len(sizes) > 1 else []
    x = svg.Axis(sizes[0], sizes[-1], label, lambda v: f"{v:g}", log=True, ticks=ticks)
    y = svg.Axis(min(*ratios, 0.9), max(*ratios, 1.1), "ratio of time", lambda v: f"{v:g}", log=True)
    keys = "  ".join(f"{svg.swatch(style)} {html.escape(one.name)}" for style, one in enumerate(series))
    chart = svg.lines(series, x, y, title)
    return f"<figure>{chart}<figcaption>{html.escape(title)}<br>{keys}</figcaption></figure>"


def _atoms(rows: Rows) -> str:
    parts = []
    for width in sorted({row["d"] for row in rows}):
        own = [row for row in rows if row["d"] == width and not row["against"].startswith("path")]
        title = f"The read of N atoms, d = {width}, over other ways"
        parts.append(_chart(own, "atoms", lambda row: f"{row['search']}, over {row['against']}", "atoms", title))
    return "".join(parts)


def _steps(by: str, title: str) -> Callable[[Rows], str]:
    def plots(rows: Rows) -> str:
        def line(row: dict[str, Any]) -> str:
            return ", ".join(str(row[name]) for name in ("host", "what", "search") if name in row)

        return _chart(rows, by, line, by, title)

    return plots


PLOTS: dict[str, Callable[[Rows], str]] = {
    "atoms": _atoms,
    "step": _steps("experiences", "A whole step with MoRAM over PEFT's LoRA"),
    "experts": _steps("tasks", "A whole step with SETA-style experts over PEFT's LoRA"),
}
