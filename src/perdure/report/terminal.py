"""Tables for the terminal: one run, one comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..evaluation.compare import CLAIM_SEEDS
from ..evaluation.metrics import check_matrix, row_averages
from . import words
from .plots import names_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST = 10
"""Experiences shown of a long stream."""
_HEADINGS = {
    "average_accuracy": "average",
    "forgetting": "forgetting",
    "learning_accuracy": "learning",
    "anytime_accuracy": "anytime",
    "trainable_parameters": "trainable",
    "stored_bytes": "stored",
    "seconds": "time",
}


def run_table(report: Mapping[str, Any]) -> Table:
    """The matrix of a run; of a long stream ten experiences that were learnt, evenly spaced, and the next one."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    rows, names, metric = check_matrix(report["matrix"]), names_of(report), report["metric"]
    shown, width = _spread(len(rows)), len(rows[0]) if rows else 0
    columns = range(width) if width <= MOST else [*shown, *range(len(rows), width)[:1]]  # the next one too
    unit = "per cent" if words.percent(metric) else ""
    title = f"{escape(words.label('average_accuracy', metric))} and its parts{', ' + unit if unit else ''}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("after learning", overflow="fold")
    for j in columns:
        table.add_column(f"{j + 1}", justify="right", no_wrap=True)
    table.add_column("average", justify="right", no_wrap=True)
    means = row_averages(rows)
    for i in shown:
        name = f"{i + 1} {names[i]}" if names[i] != str(i + 1) else names[i]
        table.add_row(escape(name), *(words.score(rows[i][j], metric) for j in columns), words.score(means[i], metric))
    if len(columns) < width:
        table.caption = f"{len(shown)} of {width} experiences; averages are over all, and all are in the report"
        table.caption_justify = "left"
    return table


def _spread(count: int) -> list[int]:
    """`MOST` of so many numbers at the most, evenly spaced, both ends among them."""
    if count <= MOST:
        return list(range(count))
    return [number * (count - 1) // (MOST - 1) for number in range(MOST)]


def figures_table(report: Mapping[str, Any]) -> Table:
    """The headline figures and the cost of a run."""
    from rich import box
    from rich.table import Table

    metric = report["metric"]
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    headline = ["average_accuracy", "average_incremental_accuracy", "forgetting", "learning_accuracy"]
    read = "matrix_file" in report["details"]
    for name in report["metrics"] if read else headline:
        table.add_row(words.label(name, metric), _with_unit(report["metrics"].get(name), name, metric))
    for name in () if read else ("trainable_parameters", "stored_bytes", "seconds"):
        table.add_row(words.label(name), words.figure(name, report["cost"].get(name)))
    return table


def _with_unit(value: float | None, name: str, metric: str) -> str:
    unit = words.unit(name, metric) if value is not None else ""
    return f"{words.figure(name, value, metric)} {unit}".rstrip()


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """One row for each arm; the best honest value of each column is bold, upper bounds and controls are named."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    metric = comparison["metric"]
    best = words.best_cells(comparison)
    title = escape(comparison["recipe"]) + (
        f" [yellow]· illustration ({words.few_seeds(comparison)})[/]" if comparison["illustration"] else ""
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", min_width=10)
    columns = [column for column in words.columns(comparison) if column[1] in _HEADINGS]
    for block, name in columns:
        # In a narrow terminal an interval takes two lines; with no_wrap the arms' names would give way, to nothing.
        table.add_column(_HEADINGS[name], justify="right", overflow="fold", no_wrap=block == "cost")
    for i, row in enumerate(comparison["rows"]):
        aside = row["status"] in ("upper bound", "control")
        name = escape(row["arm"]) + (f" [dim]({row['status']})[/]" if aside else "")
        cells = []
        for block, column in columns:
            shown = escape(words.interval(column, row[block].get(column), metric))
            cells.append(f"[bold]{shown}[/]" if (i, column) in best else shown)
        table.add_row(name, *cells, style="dim" if row["status"] == "upper bound" else None)
    return table


def difference_table(comparison: Mapping[str, Any]) -> Table | None:
    """Each arm minus the reference, paired by seed; None where there is no pair."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    metric = comparison["metric"]
    rows = [(row["arm"], row["difference"]) for row in comparison["rows"] if row["difference"]]
    if not rows:
        return None
    title = f"Difference to {escape(comparison['reference'])}, paired by seed{words.in_points(metric)}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", min_width=10)
    for heading in ("average", "wins : losses", "forgetting"):
        table.add_column(heading, justify="right", overflow="fold")
    for arm, found in rows:
        average, wins = words.difference("average_accuracy", found.get("average_accuracy"), metric)
        lost, _ = words.difference("forgetting", found.get("forgetting"), metric)
        table.add_row(escape(arm), *map(escape, (average, wins, lost)))
    return table


def print_run(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a run: what learnt what, the matrix, the figures."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console(emoji=False)  # names are names: `:bomb:` is no picture
    head = f" with head {report['head']}" if report["head"] else ""
    text = f"{report['method']}{head} on {report['model']}, stream {report['stream']}, seed {report['seed']}"
    if read := report["details"].get("matrix_file"):
        text = f"read from {read['path']}, seed {report['seed']}"
    console.print(f"[bold]{escape(report['name'])}[/]  {escape(text)}", highlight=False)
    if report["status"] != "complete":
        console.print("[yellow]still running[/]")
    console.print(run_table(report))
    console.print(figures_table(report))
    for note in report["notes"]:
        console.print(escape(f"note: {note}"), highlight=False)


def print_comparison(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a comparison: the table, what bold means, the arms' notes."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console(emoji=False)  # names are names: `:bomb:` is no picture
    console.print(comparison_table(comparison))
    legend = "average and learning accuracy, forgetting: per cent; " if words.percent(comparison["metric"]) else ""
    legend += "bold: best of the column, upper bounds aside"
    if any(len(row["seeds"]) > 1 for row in comparison["rows"]):
        legend += "; ±: half of the 95 % interval over seeds"
    if comparison["illustration"]:
        legend += f"; fewer than {CLAIM_SEEDS} seeds are an illustration, not evidence"
    console.print(legend, style="dim", highlight=False)
    differences = difference_table(comparison)
    if differences is not None:
        console.print(differences)
    for line in comparison.get("warnings") or ():
        console.print(escape(f"warning: {line}"), style="yellow", highlight=False)
    for row in comparison["rows"]:
        if row["note"]:
            console.print(escape(f"{row['arm']}: {row['note']}"), style="dim", highlight=False)
