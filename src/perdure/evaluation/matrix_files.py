"""Reads accuracy matrices that other tools have written, CSV or JSON. Imports no torch.

Rows: after learning experience i; columns: score on experience j. An empty cell (null in JSON) was not measured.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .metrics import check_matrix, check_row

SCALES = ("auto", "fraction", "percent")
METRICS = ("accuracy", "perplexity", "score")
JSON_KEYS = ("matrix", "name", "seed", "scale", "metric", "experiences", "baseline")
_SEED = re.compile(r"[-_. ]seed[-_. ]?(\d+)$", re.IGNORECASE)
Cells = list[list[float | None]]


@dataclass
class MatrixFile:
    """One matrix as a share in [0, 1] or a perplexity, and what its file says of it.

    Attributes:
        name: of the method; `seed`: None where neither the file nor its name tells it.
        rows: R[i][j], None where not measured.
        experiences: names of the columns, None where the file has none.
        notes: what was assumed in reading it.
    """

    path: Path
    name: str
    seed: int | None
    rows: Cells
    metric: str
    experiences: list[str] | None = None
    baseline: list[float | None] | None = None
    digest: str = ""
    notes: list[str] = field(default_factory=list)


def read_matrix_file(
    path: str | Path, *, name: str | None = None, scale: str = "auto", metric: str | None = None
) -> MatrixFile:
    """Reads a matrix.

    Args:
        path: `.json`: a list of rows, or an object with `matrix` and any of `name`, `seed`, `scale`, `metric`,
            `experiences`, `baseline`. Anything else: CSV with commas, semicolons or tabs, with or without a row of
            names and a column of names.
        name: of the method; the file's own, else its file name without the ending and a trailing `-seed-N`.
        scale: `fraction` ([0, 1]), `percent` ([0, 100]) or `auto`: by the largest score. Perplexities have none.
        metric: `accuracy` when neither this nor the file says another.

    Raises:
        BadInput: the file cannot be read, a row is too long or too short, a cell is no finite number or outside the
            scale, or `auto` cannot tell which scale it is; names row and column, counted from 1.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"matrix: {path} cannot be read: {error.strerror}; check the name and its permissions") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"matrix: {path} is no UTF-8 text; save it as CSV or JSON in UTF-8") from None
    where = f"matrix: {path.name}"
    said = _of_json(text, where) if path.suffix.lower() == ".json" else _of_csv(text, where)
    metric = _choice(metric or said.get("metric", "accuracy"), METRICS, f"{where}: metric")
    stated = _choice(said.get("scale", "auto"), SCALES, f"{where}: scale")
    if "auto" not in (scale, stated) and scale != stated:
        raise BadInput(f"{where}: scale: the file says {stated}, you say {scale}; leave one of them out")
    rows = _rectangle(said["matrix"], where)
    found = MatrixFile(
        path, name or said.get("name") or _SEED.sub("", path.stem), said.get("seed", _seed_of(path)), rows, metric,
        said.get("experiences"), said.get("baseline"), hashlib.sha256(content).hexdigest(),
    )  # fmt: skip
    if found.experiences is not None and len(found.experiences) != len(rows[0]):
        raise BadInput(f"{where}: {len(found.experiences)} names for {len(rows[0])} columns; give one for each")
    _to_own_unit(found, stated if scale == "auto" else scale, where)
    _drop_padding(found)
    return found


def _choice(value: Any, known: Sequence[str], where: str) -> str:
    if value not in known:
        raise BadInput(f"{where}: found {value!r}; use one of {', '.join(known)}")
    return value


def _seed_of(path: Path) -> int | None:
    match = _SEED.search(path.stem)
    return int(match[1]) if match else None


# ---- JSON
def _of_json(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{where}: is not valid JSON ({error}); mend it or give a CSV file") from None
    if isinstance(data, Mapping) and "schema" in data:
        raise BadInput(f"{where}: is a report of perdure; name its folder: perdure report FOLDER")
    said = dict(data) if isinstance(data, Mapping) else {"matrix": data}
    unknown = [key for key in said if key not in JSON_KEYS]
    if unknown or "matrix" not in said:
        what = f"key {unknown[0]!r} is unknown" if unknown else "key 'matrix' is missing"
        raise BadInput(f"{where}: {what}; an object holds {', '.join(JSON_KEYS)}, or give a list of rows")
    said = {key: value for key, value in said.items() if value is not None}
    _check_types(said, where)
    if "baseline" in said:
        said["baseline"] = check_row(said["baseline"], f"{where}: baseline")
    rows = [[_number(cell, where, i, j) for j, cell in enumerate(row)] for i, row in enumerate(said["matrix"])]
    return {**said, "matrix": rows}


def _check_types(said: Mapping[str, Any], where: str) -> None:
    matrix, names, seed = said.get("matrix"), said.get("experiences", []), said.get("seed", 0)
    if not isinstance(matrix, list) or not matrix or not all(isinstance(row, list) for row in matrix):
        raise BadInput(f"{where}: expected a list of rows of scores, found {matrix!r:.80}")
    if not isinstance(said.get("name", ""), str):
        raise BadInput(f"{where}: name: expected text, found {said['name']!r:.80}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise BadInput(f"{where}: seed: expected a whole number from 0, found {seed!r:.80}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{where}: experiences: expected a list of names, found {names!r:.80}")


def _number(cell: Any, where: str, i: int, j: int) -> float | None:
    if cell is None:
        return None
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        raise BadInput(f"{where}: row {i + 1}, column {j + 1}: expected a number or null, found {cell!r:.40}")
    return _finite(float(cell), f"{where}: row {i + 1}, column {j + 1}")


def _finite(value: float, where: str) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise BadInput(f"{where}: found {value}; leave the cell empty (null in JSON) where nothing was measured")
    return value


# ---- CSV
def _of_csv(text: str, where: str) -> dict[str, Any]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"{where}: is empty; a matrix has a row of scores for each experience learnt")
    delimiter = next((sign for sign in "\t;," if sign in lines[0]), ",")
    try:
        table = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except csv.Error as error:
        raise BadInput(f"{where}: is no CSV ({error}); save it as CSV or JSON in UTF-8") from None
    names = table.pop(0) if _is_header(table[0]) else None
    if not table:
        raise BadInput(f"{where}: has names and no row of scores; a matrix has one for each experience learnt")
    if _is_index([row[0] for row in table], names):
        table = [row[1:] for row in table]
        names = None if names is None else names[1:]
    percent = any(cell.endswith("%") for row in table for cell in row)
    rows = [[_cell(cell, where, i, j) for j, cell in enumerate(row)] for i, row in enumerate(table)]
    said: dict[str, Any] = {"matrix": rows} | ({"scale": "percent"} if percent else {})
    if names and not _counts(names):
        said["experiences"] = names
    return said


def _is_header(row: Sequence[str]) -> bool:
    """A row of names has a cell that is no number; that of pandas may be empty, 0, 1, 2 ..."""
    return any(cell and not _is_number(cell) for cell in row) or (len(row) > 2 and not row[0] and _counts(row[1:]))


def _is_index(column: Sequence[str], header: Sequence[str] | None) -> bool:
    if all(cell and not _is_number(cell) for cell in column):
        return True
    if header is None:
        return False
    return _counts(column) and (not header[0] or len(column) > 1) or not header[0] and not any(column)


def _counts(cells: Sequence[str]) -> bool:
    return [*cells] in ([str(n) for n in range(len(cells))], [str(n + 1) for n in range(len(cells))])


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix("%"))
    except ValueError:
        return False
    return True


def _cell(text: str, where: str, i: int, j: int) -> float | None:
    if not text:
        return None
    place = f"{where}: row {i + 1}, column {j + 1}"
    if not _is_number(text):
        raise BadInput(f"{place}: expected a number or nothing, found {text!r:.40}; write decimals with a point")
    return _finite(float(text.removesuffix("%")), place)


# ---- shape and unit
def _rectangle(rows: Cells, where: str) -> Cells:
    """Rows of one length, or the lower triangle alone (row i has i cells, counted from 1)."""
    lengths = [len(row) for row in rows]
    if lengths != list(range(1, len(rows) + 1)):
        wide = lengths[0]
        for i, length in enumerate(lengths):
            if length != wide:
                raise BadInput(
                    f"{where}: row {i + 1} has {length} cells, row 1 has {wide}; rows are equally long, with empty "
                    "cells where nothing was measured, or hold the lower triangle alone (1, 2, 3 ... cells)"
                )
        if wide < len(rows):
            raise BadInput(
                f"{where}: {len(rows)} rows and {wide} columns; there is a row for each experience learnt and a column "
                "for each experience, so there are at least as many columns"
            )
    if not any(cell is not None for row in rows for cell in row):
        raise BadInput(f"{where}: no cell holds a score; rows are experiences learnt, columns experiences scored")
    return check_matrix(rows, where)


def _to_own_unit(found: MatrixFile, scale: str, where: str) -> None:
    """Per cent become shares; a score outside its range is an error."""
    every = [(i, j, cell) for i, row in enumerate(found.rows) for j, cell in enumerate(row) if cell is not None]
    every += [(-1, j, cell) for j, cell in enumerate(found.baseline or ()) if cell is not None]
    if found.metric == "perplexity":
        if scale != "auto":
            raise BadInput(f"{where}: scale: a perplexity has none; leave {scale!r} out")
        low, high = 1.0, float("inf")
    else:
        if scale == "auto":
            scale = _guess([cell for _, _, cell in every], where)
            found.notes.append(f"Read as {scale}, by the size of the scores.")
        low, high = 0.0, 100.0 if scale == "percent" else 1.0
    for i, j, cell in every:
        if not low <= cell <= high:
            place = f"row {i + 1}, column {j + 1}" if i >= 0 else f"baseline, column {j + 1}"
            what = "a perplexity is 1 or more" if found.metric == "perplexity" else f"a {scale} lies in [0, {high:g}]"
            raise BadInput(f"{where}: {place}: found {cell:g}; {what}. Mend the cell, or state the scale")
    if scale == "percent":
        found.rows = [[None if cell is None else cell / 100 for cell in row] for row in found.rows]
        found.baseline = found.baseline and [None if cell is None else cell / 100 for cell in found.baseline]


def _guess(values: Sequence[float], where: str) -> str:
    top, small = max(values), sum(0 < value <= 1 for value in values)
    if top <= 1 and any(0 < value < 1 for value in values):
        return "fraction"
    if top > 2 and small * 2 < sum(value > 0 for value in values):
        return "percent"
    raise BadInput(
        f"{where}: scores from {min(values):g} to {top:g} may be shares or per cent; state it with --scale fraction or "
        '--scale percent (in JSON: "scale")'
    )


def _drop_padding(found: MatrixFile) -> None:
    """An upper triangle of zeros is how arrays are filled: it is taken as not measured, and said."""
    above = [cell for i, row in enumerate(found.rows) for cell in row[i + 1 :]]
    if above and all(cell == 0 for cell in above) and found.metric != "perplexity":
        found.rows = [[*row[: i + 1], *([None] * len(row[i + 1 :]))] for i, row in enumerate(found.rows)]
        found.notes.append("All cells above the diagonal are 0 and were taken as not measured.")
