"""Plain words for a table of the ledger: which arm to take on this stream, what it costs, what is level with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .compare import CLAIM_SEEDS, paired_difference

Row = Mapping[str, Any]
ARITHMETIC, GEOMETRIC = "average_accuracy", "geometric_average"
COSTS = ("seconds", "stored_bytes")


def advice(rows: Sequence[Row]) -> list[str]:
    """At most two sentences on rows of one stream.

    The cheapest in seconds among the arm with the best mean and those level with it is advised; where it stores rows,
    the same is said of arms that store none. Another arm is level if each of the two means lies in the other's 95 %
    interval and, where figures by seed are kept, the interval of their paired difference holds 0. Upper bounds and arms
    with fewer than 3 seeds are left out; with fewer than two others nothing is said. Perplexities are compared by their
    geometric average where all arms have it.
    """
    table = Table([row for row in rows if len(row["seeds"]) >= CLAIM_SEEDS and "upper bound" not in row["note"]])
    if len(table.rows) < 2:
        return []
    best = table.best(table.rows)
    lines = [table.sentence(table.rows, best, "")]
    free = [row for row in table.rows if not _stores(row)]
    if _stores(best) and free:
        lines.append(table.sentence(free, table.best(free), " without stored rows"))
    return lines


class Table:
    """Rows that have the figure by which they are compared.

    Attributes:
        figure: name in `metrics`. higher: whether more of it is better; perplexities start at 1.
    """

    def __init__(self, rows: Sequence[Row]):
        known = [row for row in rows if _mean(row, ARITHMETIC) is not None and {*COSTS} <= {*row["cost"]}]
        self.figure = GEOMETRIC if known and all(_mean(row, GEOMETRIC) is not None for row in known) else ARITHMETIC
        self.rows = known
        self.higher = all(self._value(row) <= 1 for row in known)

    def best(self, rows: Sequence[Row]) -> Row:
        return (max if self.higher else min)(rows, key=self._value)

    def sentence(self, rows: Sequence[Row], best: Row, what: str) -> str:
        level = [row for row in rows if row is best or self._level(row, best)]
        taken = min(level, key=lambda row: row["cost"]["seconds"]["mean"])
        others = [f"{escaped(row['method'])} {self._shown(row)}" for row in level if row is not taken]
        measure = "geometric mean of perplexities " if self.figure == GEOMETRIC else "mean perplexity "
        unit, cost = (" %", taken["cost"]) if self.higher else ("", taken["cost"])
        text = f"Take{what} **{escaped(taken['method'])}**: {'' if self.higher else measure}"
        text += f"{self._shown(taken)}{unit}, "
        text += f"{cost['seconds']['mean']:,.0f} s of training, {cost['stored_bytes']['mean'] / 1e6:,.2f} MB stored."
        if others:
            text += f" It is the quickest of those that the seeds do not tell apart; the others: {', '.join(others)}."
        return text

    def _level(self, row: Row, best: Row) -> bool:
        mine, its = row["metrics"][self.figure], best["metrics"][self.figure]
        if not _holds(its, mine["mean"]) or not _holds(mine, its["mean"]):
            return False
        difference = paired_difference(self._by_seed(row), self._by_seed(best), self.higher)
        return difference is None or difference["low"] is None or _holds(difference, 0.0)

    def _by_seed(self, row: Row) -> dict[int, float | None]:
        values = row.get("values", {}).get(self.figure)
        return dict(zip(row["seeds"], values, strict=True)) if values else {}

    def _value(self, row: Row) -> float:
        value = _mean(row, self.figure)
        assert value is not None
        return value

    def _shown(self, row: Row) -> str:
        return f"{self._value(row) * 100:.1f}" if self.higher else f"{self._value(row):.2f}"


def _holds(interval: Mapping[str, Any], value: float) -> bool:
    low, high = interval["low"], interval["high"]
    return low is not None and high is not None and low <= value <= high


def _mean(row: Row, figure: str) -> float | None:
    return (row["metrics"].get(figure) or {}).get("mean")


def _stores(row: Row) -> bool:
    """By the bytes of its buffer; rows from before these were counted say it in their note."""
    counted = row["cost"].get("rehearsal_bytes")
    return bool(counted["mean"]) if counted else "stored" in row["note"]


def escaped(text: Any) -> str:
    """Text inside a page of Markdown, table cells included."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
