"""Accuracy and forgetting of each class over a stream, from right answers at its boundaries. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Counts = Mapping[str, Sequence[int]]
"""Class -> [rows classified right, rows]."""


def count_classes(counts: dict[str, list[int]], rows: Sequence[Mapping[str, Any]], right: Sequence[bool]) -> None:
    """Adds rows (each with a `label`) and whether each was classified right."""
    for row, good in zip(rows, right, strict=True):
        found = counts.setdefault(str(row["label"]), [0, 0])
        found[0] += bool(good)
        found[1] += 1


def class_table(history: Sequence[Counts]) -> list[dict[str, Any]]:
    """What became of each class.

    Args:
        history: after each experience, the counts over the test rows of the experiences learnt so far.

    Returns:
        For each class, in the order in which they came: `name`, `rows` (test rows at the end), `scores` (accuracy after
        each experience, None where it was not scored), and `forgetting` = max over earlier boundaries of the accuracy -
        the last accuracy (Chaudhry et al. 2018, by class). A boundary at which the class had other test rows, as where
        it recurs in a later experience, cannot be compared and is left out; None where none is left.
    """
    names = dict.fromkeys(name for counts in history for name in counts)
    table = []
    for name in names:
        cells = [counts.get(name) for counts in history]
        scores = [None if cell is None else cell[0] / cell[1] for cell in cells]
        last = cells[-1]
        earlier = [cell[0] / cell[1] for cell in cells[:-1] if cell is not None and last and cell[1] == last[1]]
        lost = max(earlier) - last[0] / last[1] if earlier and last else None
        table.append({"name": name, "rows": last[1] if last else 0, "scores": scores, "forgetting": lost})
    return table


def class_figures(table: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """`worst_class`: the lowest last accuracy; `class_forgetting`: mean over the classes that have it (classes weigh
    alike, however many test rows they have); `worst_class_forgetting`: the largest. None where there is nothing.
    """
    ends = [row["scores"][-1] for row in table]
    lost = [row["forgetting"] for row in table if row["forgetting"] is not None]
    return {
        "worst_class": min(ends) if ends and None not in ends else None,
        "class_forgetting": math.fsum(lost) / len(lost) if lost else None,
        "worst_class_forgetting": max(lost) if lost else None,
    }
