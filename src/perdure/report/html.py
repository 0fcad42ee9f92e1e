"""The page of plots: one self-contained HTML file, no network, no script. The same report gives the same bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..evaluation.compare import CLAIM_SEEDS
from . import plots, svg, words
from .build import validate_comparison, validate_report, write_text

Report = Mapping[str, Any]
_HERE = Path(__file__).parent
_CARDS = ("average_accuracy", "forgetting", "learning_accuracy", "worst_experience", "anytime_accuracy")
MOST_CLASSES, MOST_LOST = 400, 10


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def tidy(value: Any) -> Any:
        return svg.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(_HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=tidy,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        svg=Markup, label=words.label, number=words.number, plain=words.text, data=lambda d: Markup(embedded(d))
    )
    environment.globals.update(
        figure=words.figure,
        interval=words.interval,
        signed=words.signed,
        score=words.score,
        unit=words.unit,
        percent=words.percent,
        hints=words.HINTS,
    )
    return environment


def embedded(data: Any) -> str:
    """JSON that may stand inside a `<script>` element: no character that could end it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page(template: str, **values: Any) -> str:
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(style=style, **values) + "\n"


# ---- one run
def render_run(report: Report, path: str | Path | None = None) -> str:
    """The page of one run; written to `path` where given.

    Raises:
        BadInput: the report does not validate.
        CannotWrite: the page cannot be written.
    """
    report = validate_report(report)
    metric, details = report["metric"], report["details"]
    page = _page(
        "run.html",
        report=report,
        metric=metric,
        cards=[name for name in _CARDS if report["metrics"].get(name) is not None],
        matrix=plots.matrix_plot(report),
        wide=max((len(row) for row in report["matrix"]), default=0) > 6,
        curve=plots.curve_plot(report),
        forgetting=plots.forgetting_plot(report),
        stored=plots.stored_plot(report),
        directions=plots.directions_plot(report),
        lost_classes=_lost_classes(report),
        loss=plots.loss_plot(report),
        probe=plots.probe_plot(report),
        router=plots.router_plots(report),
        router_columns=list(dict.fromkeys(key for stats in report["router"].values() for key in stats)),
        methods=details.get("method") or [],
        head=_settings(details.get("head") or {}, report["head"]),
        history=plots.router_history_plot(report),
        swatches=[svg.swatch(0), svg.swatch(1)],
        model=details.get("model") or {},
        stream={k: v for k, v in (details.get("stream") or {}).items() if k not in ("experiences", "classes")},
        experiences=_experiences(report),
    )
    if path is not None:
        write_text(path, page)
    return page


def _lost_classes(report: Report) -> list[dict[str, Any]]:
    """The classes that lost most, each with its best earlier and its last accuracy."""
    rows = [row for row in report.get("per_class") or () if row["forgetting"] is not None]
    worst = sorted(rows, key=lambda row: (-row["forgetting"], row["scores"][-1]))[:MOST_LOST]
    return [
        {
            "name": svg.shorten(row["name"], plots.MOST_CHARS), "rows": row["rows"], "last": row["scores"][-1],
            "best": row["scores"][-1] + row["forgetting"], "lost": row["forgetting"],
        }
        for row in worst
    ]  # fmt: skip


def _settings(block: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """Settings without the wrapping `{name: settings}` or `{name, config}`."""
    for key in (name, "config"):
        inner = block.get(key) if key else None
        if isinstance(inner, Mapping):
            return inner
    return block


def _experiences(report: Report) -> list[dict[str, Any]]:
    stream = report["details"].get("stream") or {}
    classes = stream.get("classes") or []
    room, rows = MOST_CLASSES, []
    for j, name in enumerate(stream.get("experiences") or []):
        mine = list(classes[j] or ()) if j < len(classes) else []
        shown = [svg.shorten(label, plots.MOST_CHARS) for label in mine[: max(room, 0)]]
        rows.append({"name": svg.shorten(name, plots.MOST_CHARS), "classes": shown, "more": len(mine) - len(shown)})
        room -= len(mine)
    return rows


# ---- a comparison
def render_comparison(comparison: Report, reports: Sequence[Report], path: str | Path | None = None) -> str:
    """The page of a comparison; written to `path` where given.

    Args:
        comparison: the content of comparison.json.
        reports: the reports of its runs, in the order of `comparison["runs"]`.

    Raises:
        BadInput: something does not validate, or the reports are not those of the runs.
        CannotWrite: the page cannot be written.
    """
    comparison = validate_comparison(comparison)
    arms = _arms(comparison, reports)
    metric = comparison["metric"]
    best = words.best_cells(comparison)
    columns = [c for c in words.columns(comparison) if any(c[1] in row[c[0]] for row in comparison["rows"])]
    page = _page(
        "comparison.html",
        comparison=comparison,
        metric=metric,
        columns=columns,
        best={f"{i}/{name}" for i, name in best},
        swatches=[
            svg.swatch(n, row["status"] in ("upper bound", "control")) for n, row in enumerate(comparison["rows"])
        ],
        seeds=sorted({seed for row in comparison["rows"] for seed in row["seeds"]}),
        fewest=min(len(row["seeds"]) for row in comparison["rows"]),
        few_seeds=words.few_seeds(comparison),
        claim_seeds=CLAIM_SEEDS,
        models=sorted({row.get("model") or "" for row in comparison["rows"]} - {""}),
        said=_said(comparison),
        order=words.class_order(comparison),
        curves=plots.arm_curves(arms, metric),
        planes=_planes(comparison),
        matrices=_matrices(arms, comparison),
        differences=words.compared(comparison),
        stream={
            k: v for k, v in (comparison.get("stream_details") or {}).items() if k not in ("experiences", "classes")
        },
        experiences=_experiences(next(iter(arms.values()))[0]),
    )
    if path is not None:
        write_text(path, page)
    return page


def _arms(comparison: Report, reports: Sequence[Report]) -> dict[str, list[Report]]:
    runs = comparison["runs"]
    if len(reports) != len(runs):
        raise BadInput(f"reports: {len(reports)} for {len(runs)} runs; give one report for each, in the order of runs")
    checked = [validate_report(r, f"reports[{n}]") for n, r in enumerate(reports)]
    arms = {}
    for row in comparison["rows"]:
        arms[row["arm"]] = [checked[n] for n in row["runs"]]
        seeds = [r["seed"] for r in arms[row["arm"]]]
        if seeds != list(row["seeds"]):
            raise BadInput(f"reports: arm {row['arm']!r} has seeds {list(row['seeds'])}, its reports have {seeds}")
    return arms


def _said(comparison: Report) -> list[dict[str, str]]:
    """The headline: who leads in what, upper bounds aside."""
    metric, found = comparison["metric"], []
    best = words.best_cells(comparison)
    for name in ("average_accuracy", "forgetting", "learning_accuracy"):
        leaders = [row for i, row in enumerate(comparison["rows"]) if (i, name) in best]
        if not leaders:
            continue
        lowest = name == "forgetting" or not comparison["higher_is_better"]
        what = f"{'Lowest' if lowest else 'Highest'} {words.label(name, metric).lower()}"
        value = words.interval(name, leaders[0]["metrics"][name], metric)
        found.append(
            {
                "what": what,
                "value": value,
                "unit": words.unit(name, metric),
                "who": ", ".join(row["arm"] for row in leaders),
            }
        )
    return found


def _planes(comparison: Report) -> list[dict[str, str]]:
    metric = comparison["metric"]
    wanted = (
        ("metrics", "forgetting", f"Average {metric} and forgetting"),
        ("cost", "stored_bytes", "What is stored"),
        ("cost", "seconds", "Time"),
        ("cost", "inference_flops_per_row", "Work of a prediction"),
    )
    found = [{"svg": plots.arm_plane(comparison, block, name), "title": title} for block, name, title in wanted]
    return [plane for plane in found if plane["svg"]]


def _matrices(arms: Mapping[str, Sequence[Report]], comparison: Report) -> list[dict[str, str]]:
    metric, higher = comparison["metric"], comparison["higher_is_better"]
    means = {arm: plots.mean_matrix(reports) for arm, reports in arms.items()}
    # One scale for all arms, or their colours could not be compared.
    shade = plots.shade_for(
        [c for rows in means.values() for row in rows for c in row if c is not None], metric, higher
    )
    found = [plots.names_of(report) for reports in arms.values() for report in reports]
    # With an order of its own for each seed a column is a place in the stream and no experience.
    names = found[0] if all(one == found[0] for one in found) else [f"{j + 1}" for j in range(len(found[0]))]
    return [
        {"arm": arm, **plots.matrix_heatmap(rows, names, metric, higher, shade, compact=True)}
        for arm, rows in means.items()
        if rows
    ]
