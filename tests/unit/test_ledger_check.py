"""Rows of the ledger run again: which can be, what counts as the same result, and what the command says and returns."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ledger_check import band, check, choose, judge, main, recipe_of
from perdure.evaluation.compare import interval
from tests.unit.test_ledger import ROW

VALUES = [0.90, 0.92, 0.91]
SAID = {
    **ROW, "recipe": "clinc150", "method": "linear_probe+ridge", "head": "ridge", "stream": "clinc150",
    "metrics": {"average_accuracy": interval(VALUES), "forgetting": interval([0.03, 0.03, 0.03])},
    "hardware": "Some CPU, 1 thread a run", "commit": "0123abc",
}  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SAID), **changes}


def runner(average: float, commit: str = "another", calls: list[Any] | None = None) -> Any:
    def run(row: Any, recipe: Any, seed: int) -> dict[str, Any]:
        if calls is not None:
            calls.append((recipe.label, seed))
        metrics = {"average_accuracy": average, "forgetting": 0.03}
        return {"metrics": metrics, "environment": {"commit": commit, "cpu": "Some CPU", "threads": 1}}

    return run


def write(path: Path, *rows: dict[str, Any]) -> list[str]:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return ["--ledger", str(path)]


# ---- which rows
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": "clinc150 (rates of one experience)"}, "no recipe of that name .* older settings"),
        ({"method": "er (rates of lora)"}, "no such arm"),
        ({"head": "cosine"}, "the row has head cosine, the recipe ridge"),
        ({"model": "bert"}, "the row has model bert, the recipe minilm"),
        ({"run": ["clinc150", "stream.experiences=5", "name=short"]}, "recipe is called short"),
        ({"run": ["clinc150", "nothing.like=this"]}, "its recipe is refused: nothing"),
        ({"recipe": "domains", "method": "moram", "head": None, "model": "runs/models/shakespeare-bytes"}, "not here"),
    ],
)  # fmt: skip
def test_why_a_row_cannot_be_run_again(changes: dict[str, Any], reason: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    import re

    told = recipe_of(row(**changes))
    assert isinstance(told, str) and re.search(reason, told), told


def test_the_recipe_of_a_row_is_its_arm_with_what_was_typed() -> None:
    plain: Any = recipe_of(row())
    assert plain.label == "linear_probe+ridge" and plain.stream.experiences == 10
    typed: Any = recipe_of(row(recipe="short", run=["clinc150", "stream.experiences=5", "name=short"]))
    assert typed.name == "short" and typed.stream.experiences == 5


def test_the_cheapest_rows_or_some_drawn_by_lot() -> None:
    rows = [row(cost={"seconds": {"mean": seconds, "low": None, "high": None}}) for seconds in (30.0, 5.0, 20.0)]
    assert choose(rows, 2, None) == [rows[1], rows[2]]
    drawn = [choose(rows, 2, text) for text in ("2026-01-01", "2026-01-01", *map(str, range(9)))]
    assert drawn[0] == drawn[1] and any(each != drawn[0] for each in drawn[2:]) and len(drawn[0]) == 2


# ---- the same result
def test_the_band_of_fewer_runs_is_that_of_a_prediction() -> None:
    entry = interval(VALUES)
    assert band(entry, 3, 3) == pytest.approx((entry["low"], entry["high"]))
    low, high = band(entry, 3, 1) or (0, 0)
    deviation = 0.01  # of .90, .92, .91
    assert (high - low) / 2 == pytest.approx(4.302652729911275 * deviation * math.sqrt(1 + 1 / 3))
    assert band(interval([0.9]), 1, 1) is None


@pytest.mark.parametrize(
    ("found", "seeds", "changes", "good"),
    [
        ([0.91, 0.91, 0.91], [0, 1, 2], {}, True),
        ([0.97, 0.97, 0.97], [0, 1, 2], {}, False),
        ([0.865], [0], {}, True),  # one run varies more than the mean of three
        ([0.80], [0], {}, False),
        ([0.9151], [0], {"seeds": [0], "metrics": {"average_accuracy": interval([0.9])}}, True),
        ([0.9251], [0], {"seeds": [0], "metrics": {"average_accuracy": interval([0.9])}}, False),
        ([42.5], [0], {"seeds": [0], "metrics": {"average_accuracy": interval([42.0])}}, True),  # perplexity: a share
        ([43.0], [0], {"seeds": [0], "metrics": {"average_accuracy": interval([42.0])}}, False),
    ],
)
def test_what_counts_as_reproduced(found: list[float], seeds: list[int], changes: dict[str, Any], good: bool) -> None:
    told = judge(row(**changes), "average_accuracy", found, seeds, False)
    assert told is not None and told.good is good, told


def test_figures_by_seed_are_compared_exactly_where_commit_and_machine_are_the_same() -> None:
    kept = row(values={"average_accuracy": VALUES})
    for found, same, good in (
        (0.92, True, True),
        (0.9200001, True, False),
        (0.9200001, False, True),
        (0.7, False, False),
    ):
        told = judge(kept, "average_accuracy", [found], [1], same)
        assert told is not None and told.good is good and told.recorded == "0.9200", (found, same)
    assert judge(kept, "anytime_accuracy", [0.5], [1], False) is None
    exact = check(kept, recipe_of(kept), 1, runner(0.90, commit="0123abc"))  # type: ignore[arg-type]
    assert exact.good and exact.findings[0].judged == "equal"
    moved = check(kept, recipe_of(kept), 1, runner(0.901, commit="0123abc"))  # type: ignore[arg-type]
    assert not moved.good and "same commit and machine" in moved.findings[0].judged


# ---- the command
def test_the_command_says_what_it_did_and_what_it_left(tmp_path: Any, capsys: Any) -> None:
    older = row(recipe="clinc150 (rates of one experience)")
    ledger, calls = write(tmp_path / "l.jsonl", row(), older), []
    assert main([*ledger, "--seeds", "2"], runner(0.91, calls=calls)) == 0
    out = capsys.readouterr().out
    assert calls == [("linear_probe+ridge", 0), ("linear_probe+ridge", 1)]
    assert "2 rows, 1 of them not re-runnable, 1 run again" in out
    assert "not re-runnable: clinc150 (rates of one experience), linear_probe+ridge: no recipe" in out
    assert "| average_accuracy | 0.9100 | 0.9100 |" in out and "| ok |" in out


def test_a_row_that_does_not_reproduce_ends_with_one(tmp_path: Any, capsys: Any) -> None:
    ledger = write(tmp_path / "l.jsonl", row())
    assert main(ledger, runner(0.70)) == 1 and "DIFFERS" in capsys.readouterr().out

    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("exit 64: perdure: model: no such thing")

    assert main(ledger, broken) == 1 and "FAILED" in capsys.readouterr().out
    assert main([*ledger, "--recipe", "none of them"], runner(0.91)) == 1, "nothing was checked"


def test_every_row_of_the_ledger_is_run_again_or_told_why_not() -> None:
    from perdure.evaluation.ledger import latest, read

    known = [recipe_of(each) for each in latest(read(Path(__file__).resolve().parents[2] / "results/ledger.jsonl"))]
    assert all(known) and sum(not isinstance(each, str) for each in known) > 10
