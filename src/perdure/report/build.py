"""Assembles, checks, writes and reads report.json and comparison.json."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput, CannotWrite
from ..evaluation.compare import COMPARISON_SCHEMA
from ..evaluation.metrics import check_matrix, check_row, summary

REPORT_SCHEMA = 1
METRICS = ("accuracy", "perplexity", "score")

_TEXT = (str,)
_OPTIONAL_TEXT = (str, type(None))
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "name": _TEXT,
    "method": _TEXT,
    "head": _OPTIONAL_TEXT,
    "model": _TEXT,
    "stream": _TEXT,
    "objective": _TEXT,
    "metric": _TEXT,
    "higher_is_better": (bool,),
    "seed": (int,),
    "protocol": (Mapping,),
    "training": (Mapping,),
    "details": (Mapping,),
    "matrix": (Sequence,),
    "baseline": (Sequence, type(None)),
    "metrics": (Mapping,),
    "plasticity": (Mapping,),
    "cost": (Mapping,),
    "curves": (Mapping,),
    "router": (Mapping,),
    "environment": (Mapping,),
    "status": _TEXT,
    "notes": (Sequence,),
}
_LIST = (Sequence, type(None))
_OBJECT = (Mapping, type(None))
_DETAILS: dict[str, tuple[type, ...]] = {
    "arm": _OPTIONAL_TEXT, "method": _LIST, "head": _OBJECT, "model": _OBJECT, "stream": _OBJECT,
    "router_history": _LIST,
}  # fmt: skip
"""What pages are made from; absent is null."""
_METHOD_FIELDS: dict[str, tuple[type, ...]] = {
    "name": _TEXT, "title": _OPTIONAL_TEXT, "status": _OPTIONAL_TEXT, "config": _OBJECT
}  # fmt: skip
_CLASS_FIELDS: dict[str, tuple[type, ...]] = {
    "name": _TEXT, "rows": (int,), "scores": (Sequence,), "forgetting": (int, float, type(None))
}  # fmt: skip
_METRIC_KEYS = ("average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer")
_METRIC_KEYS += ("forward_transfer", "learning_accuracy")
_COST_KEYS = ("seconds", "trainable_parameters", "stored_bytes")


def build_report(
    *,
    name: str,
    method: str,
    head: str | None,
    model: str,
    stream: str,
    objective: str,
    metric: str,
    higher_is_better: bool,
    seed: int,
    protocol: Mapping[str, Any],
    training: Mapping[str, Any],
    details: Mapping[str, Any],
    matrix: Sequence[Sequence[float | None]],
    baseline: Sequence[float | None] | None,
    cost: Mapping[str, Any],
    status: str,
    plasticity: Mapping[str, float] | None = None,
    metrics: Mapping[str, float | None] | None = None,
    curves: Mapping[str, Any] | None = None,
    router: Mapping[str, Mapping[str, float]] | None = None,
    environment: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    per_class: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A run's report, schema 1, with `metrics` computed from the matrix.

    Args:
        matrix: R[i][j], score on experience j after learning experience i; None where not measured.
        baseline: scores before any learning, or None.
        cost: at least `seconds`, `trainable_parameters`, `stored_bytes`.
        metrics: further figures (anytime accuracy, intransigence) beside those of R.
        curves: `loss`: [[step, experience, value]]; `stored_bytes`: bytes after each experience.
        router: site -> figure -> value.
        status: "complete" or "running".
        per_class: as `evaluation.classes.class_table` gives it.

    Raises:
        BadInput: as `validate_report`.
    """
    rows = check_matrix(matrix, "matrix")
    figures = {**summary(rows, higher_is_better, baseline), **(metrics or {})}
    report = {
        "schema": REPORT_SCHEMA,
        "name": name,
        "method": method,
        "head": head,
        "model": model,
        "stream": stream,
        "objective": objective,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "seed": seed,
        "protocol": dict(protocol),
        "training": dict(training),
        "details": dict(details),
        "matrix": rows,
        "baseline": None if baseline is None else check_row(baseline, "baseline"),
        "metrics": figures,
        "plasticity": dict(plasticity or {}),
        "cost": dict(cost),
        "curves": dict(curves or {}),
        "router": {site: dict(stats) for site, stats in (router or {}).items()},
        "environment": dict(environment or {}),
        "status": status,
        "notes": list(notes),
        "per_class": [dict(row) for row in per_class],
    }
    return validate_report(report)


def validate_report(report: Any, where: str = "report") -> dict[str, Any]:
    """Checks a run's report and returns it; keys beyond the schema are kept.

    Raises:
        BadInput: another schema, a field missing or of the wrong type, a number that is not finite; names the field.
    """
    if not isinstance(report, Mapping):
        raise BadInput(f"{where}: expected an object, found {type(report).__name__}")
    _check_schema(report, REPORT_SCHEMA, where)
    _check_fields(report, _FIELDS, where)
    if report["metric"] not in METRICS:
        raise BadInput(f"{where}: metric: found {report['metric']!r}; must be one of {', '.join(METRICS)}")
    if report["status"] not in ("complete", "running"):
        raise BadInput(f"{where}: status: found {report['status']!r}; must be 'complete' or 'running'")
    check_matrix(report["matrix"], f"{where}: matrix")
    if report["baseline"] is not None:
        check_row(report["baseline"], f"{where}: baseline")
    for block, keys in (("metrics", _METRIC_KEYS), ("cost", _COST_KEYS)):
        for key in keys:
            if key not in report[block]:
                raise BadInput(f"{where}: {block}.{key}: is missing; write null where it was not measured")
    _check_numbers(report["metrics"], f"{where}: metrics")
    _check_details(report["details"], f"{where}: details")
    _check_loss(report["curves"].get("loss", []), f"{where}: curves.loss")
    _check_per_class(report.get("per_class") or (), f"{where}: per_class")
    for site, stats in report["router"].items():
        if not isinstance(stats, Mapping):
            raise BadInput(f"{where}: router.{site}: expected figures by name, found {stats!r}")
        _check_numbers(stats, f"{where}: router.{site}")
    _check_finite(report, where)
    return dict(report)


def _check_details(details: Mapping[str, Any], where: str) -> None:
    _check_present(details, _DETAILS, where)
    for number, method in enumerate(details.get("method") or ()):
        _check_fields(method, _METHOD_FIELDS, f"{where}.method.{number}")
    for number, router in enumerate(details.get("router_history") or ()):
        _check_fields(router, {}, f"{where}.router_history.{number}")
    stream = details.get("stream") or {}
    _check_present(stream, {"experiences": _LIST, "classes": _LIST}, f"{where}.stream")
    classes: Any = stream.get("classes") or ()
    for number, names in enumerate(classes):
        good = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if names is not None and not good:
            raise BadInput(f"{where}.stream.classes.{number}: expected a list of names or null, found {names!r:.80}")


def _check_present(block: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    _check_fields(block, {field: types for field, types in fields.items() if field in block}, where)


def _check_loss(points: Any, where: str) -> None:
    if not isinstance(points, (list, tuple)):
        raise BadInput(f"{where}: expected a list of [step, experience, value], found {points!r:.80}")
    for number, point in enumerate(points):
        if not isinstance(point, (list, tuple)) or len(point) != 3 or not all(map(_is_number, point)):
            raise BadInput(
                f"{where}: point {number}: expected three numbers [step, experience, value], found {point!r:.80}"
            )


def _check_per_class(rows: Any, where: str) -> None:
    if not isinstance(rows, (list, tuple)):
        raise BadInput(f"{where}: expected a list of classes, found {rows!r:.80}")
    for number, row in enumerate(rows):
        _check_fields(row, _CLASS_FIELDS, f"{where}.{number}")
        check_row(row["scores"], f"{where}.{number}.scores")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "arm": _TEXT,
    "method": _TEXT,
    "adapter": _TEXT,
    "head": _OPTIONAL_TEXT,
    "seeds": (Sequence,),
    "metrics": (Mapping,),
    "cost": (Mapping,),
    "difference": (Mapping, type(None)),
    "status": _TEXT,
    "note": _TEXT,
    "runs": (Sequence,),
}
_COMPARISON_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "recipe": _TEXT,
    "metric": _TEXT,
    "higher_is_better": (bool,),
    "reference": _TEXT,
    "illustration": (bool,),
    "rows": (Sequence,),
    "protocol": (Mapping,),
    "stream": _TEXT,
    "environment": (Mapping,),
    "runs": (Sequence,),
}


def validate_comparison(comparison: Any, where: str = "comparison") -> dict[str, Any]:
    """Checks the content of comparison.json and returns it.

    Raises:
        BadInput: as `validate_report`.
    """
    if not isinstance(comparison, Mapping):
        raise BadInput(f"{where}: expected an object, found {type(comparison).__name__}")
    _check_schema(comparison, COMPARISON_SCHEMA, where)
    _check_fields(comparison, _COMPARISON_FIELDS, where)
    _check_present(comparison, {"tuning": _OBJECT}, where)
    runs = comparison["runs"]
    for number, folder in enumerate(runs):
        if not isinstance(folder, str):
            raise BadInput(f"{where}: runs.{number}: expected the folder of a run, found {folder!r:.80}")
    if not comparison["rows"]:
        raise BadInput(f"{where}: rows: is empty; a comparison has at least one arm")
    for number, row in enumerate(comparison["rows"]):
        _check_fields(row, _ROW_FIELDS, f"{where}: rows.{number}")
        for position in row["runs"]:
            if type(position) is not int or not 0 <= position < len(runs):
                raise BadInput(
                    f"{where}: rows.{number}.runs: found {position!r:.80}; expected positions in runs, 0 to "
                    f"{len(runs) - 1}"
                )
        for block in ("metrics", "cost", "difference"):
            for key, value in (row[block] or {}).items():
                if not isinstance(value, Mapping) or not {"mean", "low", "high"} <= set(value):
                    raise BadInput(
                        f"{where}: rows.{number}.{block}.{key}: expected mean, low and high, found {value!r}"
                    )
    _check_finite(comparison, where)
    return dict(comparison)


def _check_schema(data: Mapping[str, Any], schema: int, where: str) -> None:
    if data.get("schema") != schema:
        raise BadInput(
            f"{where}: schema: found {data.get('schema')!r}, this version reads {schema}; "
            "rebuild it with the version of perdure that wrote it"
        )


def _check_fields(data: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(data, Mapping):
        raise BadInput(f"{where}: expected an object, found {data!r}")
    for field, types in fields.items():
        if field not in data:
            raise BadInput(f"{where}: {field}: is missing")
        value = data[field]
        wrong = isinstance(value, str) and str not in types or isinstance(value, bool) and bool not in types
        if wrong or not isinstance(value, types):
            names = " or ".join("null" if t is type(None) else t.__name__.lower() for t in types)
            raise BadInput(f"{where}: {field}: expected {names}, found {value!r:.80}")


def _check_numbers(block: Mapping[str, Any], where: str) -> None:
    for key, value in block.items():
        if value is not None and not _is_number(value):
            raise BadInput(f"{where}.{key}: expected a number or null, found {value!r}")


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_finite(item, f"{where}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{where}: found {value!r}; JSON holds finite numbers only, write null")


# ---- files
def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Writes JSON (UTF-8, no NaN) aside and renames it, so that a reader never sees half a file.

    Raises:
        CannotWrite: the folder is full or not writable.
    """
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file aside and renames it.

    Raises:
        CannotWrite: the folder is full or not writable.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise CannotWrite(
            f"{path}: cannot be written: {error.strerror}; free space or choose another folder"
        ) from error


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads and checks a report.json.

    Raises:
        BadInput: the file is absent, not JSON, or not a report of this schema.
    """
    return validate_report(_read(path), str(path))


def read_comparison(path: str | Path) -> dict[str, Any]:
    """Reads and checks a comparison.json.

    Raises:
        BadInput: as `read_report`.
    """
    return validate_comparison(_read(path), str(path))


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; give the path of a finished run") from error
    except ValueError as error:
        raise BadInput(f"{path}: is not valid JSON ({error}); run it again or remove the file") from error
