"""The ledger of verified results: one JSON object a line, and the page made from it.

python -m perdure.evaluation.ledger docs/results.md results/ledger.jsonl
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput, CannotWrite, PerdureError
from .advice import advice, escaped
from .compare import CLAIM_SEEDS

FIELDS = ("recipe", "method", "head", "model", "stream", "seeds", "metrics", "cost", "hardware", "commit")
FIELDS += ("published", "status", "note")
OPTIONAL = ("values", "run", "protocol")
"""Younger than the first rows: each figure by seed, in the order of `seeds`; the recipe and what was typed over it; the
block `protocol` of its runs."""
STATUSES = ("reproduced", "differs", "no published figure", "illustration")

COLUMNS = {
    "average_accuracy": "average", "geometric_average": "geometric", "forgetting": "forgetting",
    "learning_accuracy": "learning", "anytime_accuracy": "anytime",
}  # fmt: skip
"""Of the page, with their heads."""
OPTIONAL_COLUMNS = ("geometric_average", "anytime_accuracy")
"""Stand where an arm has them."""

TASK_KNOWN = "The task of a row is known at test: it is scored among the classes of its own experience alone."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def validate_row(row: Any, where: str = "row") -> dict[str, Any]:
    """Checks one row of the ledger and returns it.

    Raises:
        BadInput: a field is missing, unknown or malformed, or the status does not fit the seeds or the published
            figure; the message starts with `where` and names the field.
    """
    if not isinstance(row, Mapping):
        raise BadInput(f"{where}: expected an object, found {row!r}")
    for field in FIELDS:
        if field not in row:
            raise BadInput(f"{where}: field {field!r} is missing; a row holds {', '.join(FIELDS)}")
    for field in row:
        if field not in FIELDS + OPTIONAL:
            raise BadInput(f"{where}: field {field!r} is unknown; a row holds {', '.join(FIELDS + OPTIONAL)}")
    for field in ("recipe", "method", "model", "stream", "hardware", "commit"):
        if not _is_text(row[field]):
            raise BadInput(f"{where}: {field}: expected text, found {row[field]!r}")
    if row["head"] is not None and not _is_text(row["head"]):
        raise BadInput(f"{where}: head: expected text or null, found {row['head']!r}")
    if not isinstance(row["note"], str):
        raise BadInput(f"{where}: note: expected text, empty if there is none, found {row['note']!r}")
    seeds = row["seeds"]
    good = isinstance(seeds, list) and seeds and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise BadInput(f"{where}: seeds: expected a list of different whole numbers, found {seeds!r}")
    for block in ("metrics", "cost"):
        _check_figures(row[block], f"{where}: {block}")
    _check_optional(row, where)
    _check_status(row, where)
    return dict(row)


def _check_optional(row: Mapping[str, Any], where: str) -> None:
    values, run = row.get("values", {}), row.get("run", ["recipe"])
    if not isinstance(row.get("protocol", {}), Mapping):
        raise BadInput(f"{where}: protocol: expected the block of a recipe, found {row['protocol']!r}")
    if not isinstance(values, Mapping):
        raise BadInput(f"{where}: values: expected figures by name, found {values!r}")
    for name, found in values.items():
        fits = isinstance(found, list) and len(found) == len(row["seeds"])
        if name not in row["metrics"] or not fits or not all(v is None or _is_number(v) for v in found):
            raise BadInput(
                f"{where}: values.{name}: expected a number or null for each seed of a figure in metrics, found "
                f"{found!r}"
            )
    if not isinstance(run, list) or not run or not all(_is_text(part) for part in run):
        raise BadInput(f"{where}: run: expected a recipe and the settings typed over it, found {run!r}")


def _check_figures(block: Any, where: str) -> None:
    if not isinstance(block, Mapping) or not block:
        raise BadInput(f"{where}: expected figures by name, found {block!r}")
    for name, figure in block.items():
        if not isinstance(figure, Mapping) or set(figure) != {"mean", "low", "high"}:
            raise BadInput(f"{where}.{name}: expected an object with mean, low, high, found {figure!r}")
        for key, value in figure.items():
            if value is not None and not _is_number(value):
                raise BadInput(f"{where}.{name}.{key}: expected a finite number or null, found {value!r}")


def _check_status(row: Mapping[str, Any], where: str) -> None:
    status, published = row["status"], row["published"]
    if status not in STATUSES:
        raise BadInput(f"{where}: status: found {status!r}; must be one of {', '.join(STATUSES)}")
    if published is not None:
        named = isinstance(published, Mapping) and _is_text(published.get("source"))
        if not named or not (_is_number(published.get("figure")) or _is_text(published.get("figure"))):
            raise BadInput(
                f"{where}: published: expected null or an object with figure and source, found {published!r}"
            )
    if status in ("reproduced", "differs") and published is None:
        raise BadInput(f"{where}: status: is {status!r} but published is null; name the figure and its source")
    if status == "no published figure" and published is not None:
        raise BadInput(f"{where}: status: is {status!r} but published names one; use 'reproduced' or 'differs'")
    if status != "illustration" and len(row["seeds"]) < CLAIM_SEEDS:
        raise BadInput(f"{where}: status: fewer than {CLAIM_SEEDS} seeds are an 'illustration', found {status!r}")


def read(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a ledger; an absent file is an empty ledger.

    Raises:
        BadInput: a line is not valid JSON or not a valid row; names file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise BadInput(
                f"{path.name}: line {number}: is not valid JSON ({error}); mend or remove the line"
            ) from None
        rows.append(validate_row(row, f"{path.name}: line {number}"))
    return rows


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def append(path: str | Path, row: Mapping[str, Any]) -> None:
    """Adds one row at the end in a single write; what stands in the file is never rewritten.

    Raises:
        BadInput: the row is not valid; nothing is written.
        CannotWrite: the file or its folder cannot be written.
    """
    path = Path(path)
    checked = validate_row(row)
    ordered = {field: checked[field] for field in FIELDS + OPTIONAL if field in checked}
    line = json.dumps(ordered, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A line cut short by a crash must not swallow the new one.
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CannotWrite(f"ledger: cannot write {path}: {error.strerror}; check the folder and free space") from error


def rows_from_comparison(
    comparison: Mapping[str, Any],
    *,
    published: Mapping[str, Mapping[str, Any]] | None = None,
    status: Mapping[str, str] | None = None,
    note: str = "",
    run: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Ledger rows of all arms of a comparison.json.

    Args:
        published: arm -> {"figure", "source"}.
        status: arm -> status; else `illustration` for fewer than 3 seeds, `no published figure` for an arm without one.
        note: said in every row, before the arm's own note.
        run: the recipe and what was typed over it, so that `make ledger-check` can run it again.

    Commit and hardware are what the arm's own runs recorded, all of them where they differ.

    Raises:
        BadInput: an arm has a published figure but no status: whether it was reproduced is a judgement; or the
            comparison does not say what made its runs.
    """
    rows = []
    for arm in comparison["rows"]:
        name = arm["arm"]
        found = (published or {}).get(name)
        default = "illustration" if len(arm["seeds"]) < CLAIM_SEEDS else None if found else "no published figure"
        said = (status or {}).get(name, default)
        if said is None:
            raise BadInput(f"status: arm {name!r} has a published figure; say whether it 'reproduced' or 'differs'")
        made_by = arm.get("made_by")
        if not made_by:
            raise BadInput(f"made_by: arm {name!r} has none; rebuild the comparison with `perdure report` first")
        row = {
            "recipe": comparison["recipe"],
            "method": name,
            "head": arm["head"],
            "model": arm["model"],
            "stream": comparison["stream"],
            "seeds": arm["seeds"],
            "metrics": arm["metrics"],
            "cost": arm["cost"],
            "hardware": _listed(_machine(one) for one in made_by),
            "commit": _listed(one.get("commit") or "not recorded" for one in made_by),
            "published": dict(found) if found else None,
            "status": said,
            "note": "; ".join(part for part in (note, arm.get("note", "")) if part),
        }
        if arm.get("values"):  # younger than the first comparisons
            row["values"] = {name: list(found) for name, found in arm["values"].items() if name in arm["metrics"]}
        if run is not None:
            row["run"] = list(run)
        if comparison.get("protocol"):
            row["protocol"] = dict(comparison["protocol"])
        rows.append(validate_row(row, f"arm {name!r}"))
    return rows


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _machine(made_by: Mapping[str, Any]) -> str:
    threads, device = made_by.get("threads"), made_by.get("device")
    parts = [made_by.get("cpu") or "processor not recorded"]
    parts += [f"{threads} thread{'s' if threads > 1 else ''} a run"] if isinstance(threads, int) else []
    return ", ".join([*parts, *([str(device)] if device not in (None, "cpu") else [])])


def latest(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row for each recipe, method, head, model and stream: the last one; in order of first appearance."""
    newest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        newest[tuple(row[key] for key in ("recipe", "method", "head", "model", "stream"))] = row
    return list(newest.values())


# ---- docs/results.md
def _figure(block: Mapping[str, Any], name: str, scale: float = 1.0, digits: int = 1) -> str:
    figure = block.get(name)
    if not figure or figure["mean"] is None:
        return "–"
    text = f"{figure['mean'] * scale:,.{digits}f}"
    if figure["low"] is not None and figure["high"] is not None:
        text += f" ± {(figure['high'] - figure['low']) / 2 * scale:,.{digits}f}"
    return text.replace("-", "−")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page `docs/results.md`: one table for each recipe, model and stream, from the newest row of each arm."""
    lines = [
        "# Results",
        "",
        "Made from the ledger by `python -m perdure.evaluation.ledger docs/results.md results/ledger.jsonl`;",
        "do not edit by hand. Figures are means over seeds ± half of the 95 % t-interval; fewer than "
        f"{CLAIM_SEEDS} seeds are an illustration.",
        "Accuracies, forgetting and learning accuracy in per cent; where perplexity was measured, in its own unit.",
        "",
    ]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in latest(rows):
        groups.setdefault((row["recipe"], row["model"], row["stream"]), []).append(row)
    for (recipe, model, stream), members in groups.items():
        lines += [f"## {escaped(recipe)}", "", f"Stream {escaped(stream)} · model {escaped(model)}", ""]
        if any(row["head"] and (row.get("protocol") or {}).get("task_id") == "test" for row in members):
            lines += [TASK_KNOWN, ""]
        lines += _table(members)
    if not groups:
        lines += ["No result has been recorded yet.", ""]
    return "\n".join(lines)


def _table(members: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = dict(COLUMNS)
    for name in OPTIONAL_COLUMNS:
        if all((row["metrics"].get(name) or {}).get("mean") is None for row in members):
            del columns[name]
    lines = [
        f"| method | head | {' | '.join(columns.values())} | trainable | MB stored | s | seeds | published | status |",
        f"|---|---|{'--:|' * len(columns)}--:|--:|--:|--:|---|---|",
    ]
    for row in members:
        metrics, cost, published = row["metrics"], row["cost"], row["published"]
        average = (metrics.get("average_accuracy") or {}).get("mean")
        # Accuracies are shares, perplexities start at 1.
        scale, digits = (100.0, 1) if average is None or average <= 1 else (1.0, 2)
        cells = [escaped(row["method"]), escaped(row["head"] or "–")]
        cells += [_figure(metrics, name, scale, digits) for name in columns]
        cells += [_figure(cost, "trainable_parameters", 1, 0), _figure(cost, "stored_bytes", 1e-6, 2)]
        cells += [_figure(cost, "seconds", 1, 0), str(len(row["seeds"]))]
        cells += [f"{escaped(published['figure'])} ({escaped(published['source'])})" if published else "–"]
        lines.append("| " + " | ".join([*cells, row["status"]]) + " |")
    notes = [f"- {escaped(r['method'])}: {escaped(r['note'])}" for r in members if r["note"]]
    told = sorted({(r["hardware"], r["commit"]) for r in members})
    advised = [line for sentence in advice(members) for line in (sentence, "")]
    return [*lines, "", *advised, *notes, *[f"- Ran on {escaped(h)}, commit {escaped(c)}." for h, c in told], ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page from a ledger; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 2:
        print("usage: python -m perdure.evaluation.ledger PAGE.md LEDGER.jsonl", file=sys.stderr)
        return BadInput.exit_code
    page, ledger = Path(arguments[0]), Path(arguments[1])
    try:
        if not ledger.exists():
            raise BadInput(f"ledger: {ledger} does not exist; name the file to read as the second argument")
        text = markdown(read(ledger))
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CannotWrite(f"page: cannot write {page}: {error.strerror}") from error
    except PerdureError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
