"""A comparison as a table for other programs: CSV with every figure, LaTeX with the columns of the page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from ..evaluation.compare import CLAIM_SEEDS
from . import words

COLUMNS: tuple[str, ...] = (
    "arm", "adapter", "head", "status", "block", "figure", "seeds", "mean", "low", "high",
    "difference", "difference_low", "difference_high", "wins", "losses", "ties", "pairs",
)  # fmt: skip
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u2212": "$-$", "\u00b1": r"$\pm$", "\u00a0": "~",
    "\u2013": "--",
}  # fmt: skip


def comparison_csv(comparison: Mapping[str, Any]) -> str:
    """One line for each arm and figure, numbers as in comparison.json (accuracy as a share), empty where there is none.

    `difference` is arm minus `comparison["reference"]`, paired by seed; low and high are ends of 95 % intervals.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in comparison["rows"]:
        told = {key: row[key] for key in ("arm", "adapter", "head", "status")}
        for block in ("metrics", "cost"):
            for name, found in row[block].items():
                pair = (row["difference"] or {}).get(name) or {}
                writer.writerow(
                    {
                        **told, "block": block, "figure": name, "seeds": len(row["seeds"]),
                        **{key: found[key] for key in ("mean", "low", "high")},
                        "difference": pair.get("mean"), "difference_low": pair.get("low"),
                        "difference_high": pair.get("high"),
                        **{key: pair.get(key) for key in ("wins", "losses", "ties", "pairs")},
                    }
                )  # fmt: skip
    return file.getvalue()


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], text)


def comparison_latex(comparison: Mapping[str, Any]) -> str:
    """A `table` with the columns of the page and the difference to the reference; needs the package booktabs."""
    metric, columns, best = comparison["metric"], words.columns(comparison), words.best_cells(comparison)
    paired = any(row["difference"] for row in comparison["rows"])
    heads = ["arm", *(_head(block, name, metric) for block, name in columns)]
    heads += [f"difference{words.in_points(metric)}", "wins : losses"] if paired else []
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{latex_text(_caption(comparison, paired))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", _line(latex_text(head) for head in heads),
        r"\midrule",
    ]  # fmt: skip
    for number, row in enumerate(comparison["rows"]):
        aside = row["status"] in ("upper bound", "control")
        cells = [latex_text(row["arm"] + (f" ({row['status']})" if aside else ""))]
        for block, name in columns:
            shown = latex_text(words.interval(name, row[block].get(name), metric))
            cells.append(rf"\textbf{{{shown}}}" if (number, name) in best else shown)
        if paired and row["arm"] == comparison["reference"]:
            cells += ["reference", ""]
        elif paired:
            pair = (row["difference"] or {}).get("average_accuracy")
            cells += map(latex_text, words.difference("average_accuracy", pair, metric))
        lines.append(_line(cells))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _head(block: str, name: str, metric: str) -> str:
    unit = words.unit(name, metric) if block == "metrics" else ""
    return words.label(name, metric) + (f" ({unit})" if unit else "")


def _line(cells: Any) -> str:
    return " & ".join(cells) + r" \\"


def _caption(comparison: Mapping[str, Any], paired: bool) -> str:
    seeds = sorted({len(row["seeds"]) for row in comparison["rows"]})
    text = f"{comparison['recipe']}: means over {' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}"
    text += ", ± half of the 95 % t-interval" if seeds[-1] > 1 else ""
    if paired:
        text += f". Difference in average {comparison['metric']} to {comparison['reference']}, paired by seed"
    text += ". Bold: best of the column, upper bounds aside."
    return text + (f" Fewer than {CLAIM_SEEDS} seeds: an illustration." if comparison["illustration"] else "")
