"""What the results page advises, from rows made by hand."""

from __future__ import annotations

from typing import Any

from perdure.evaluation.advice import advice


def row(arm: str, mean: float | None, half: float = 0.01, *, seconds: float = 10.0, note: str = "", **more: Any):
    figures = {"average_accuracy": mean, **more.pop("metrics", {})}
    metrics = {
        name: {
            "mean": value,
            "low": None if value is None else value - half,
            "high": None if value is None else value + half,
        }
        for name, value in figures.items()
    }
    cost = {"seconds": {"mean": seconds}, "stored_bytes": {"mean": 2e6}, **more.pop("cost", {})}
    return {"method": arm, "metrics": metrics, "cost": cost, "note": note, "seeds": [0, 1, 2], **more}


def test_the_best_is_advised_and_bounds_and_illustrations_are_not():
    rows = [
        row("a", 0.8),
        row("b", 0.9, seconds=99),
        row("joint", 0.99, note="upper bound"),
        row("one", 0.95, seeds=[0]),
    ]
    assert advice(rows) == ["Take **b**: 90.0 %, 99 s of training, 2.00 MB stored."]
    assert advice([row("a", 0.8), row("one", 0.95, seeds=[0])]) == [] == advice([row("a", 0.8), row("joint", None)])


def test_the_quickest_of_those_on_one_level_is_advised():
    rows = [row("best", 0.9, 0.02, seconds=50), row("quick", 0.89, 0.02, seconds=5), row("low", 0.85, 0.2, seconds=1)]
    (said,) = advice(rows)  # low's interval holds the best one's mean, but not the other way round
    assert said.startswith("Take **quick**: 89.0 %, 5 s") and said.endswith("do not tell apart; the others: best 90.0.")


def test_pairs_by_seed_tell_apart_what_intervals_do_not():
    best = row("best", 0.9, 0.2, seconds=50, values={"average_accuracy": [0.8, 0.9, 1.0]})
    behind = row("behind", 0.89, 0.2, values={"average_accuracy": [0.79, 0.89, 0.99]})
    mixed = row("mixed", 0.89, 0.2, values={"average_accuracy": [0.85, 0.85, 0.97]})
    assert advice([best, behind])[0].startswith("Take **best**")
    assert advice([best, mixed])[0].startswith("Take **mixed**")


def test_where_the_best_stores_rows_the_best_without_them_is_named_too():
    counted = row("er", 0.9, cost={"rehearsal_bytes": {"mean": 10.0}})
    said = advice([counted, row("lora", 0.7), row("old-er", 0.8, note="LoRA with 20 stored blocks")])
    assert [line.split(":")[0] for line in said] == ["Take **er**", "Take without stored rows **lora**"]
    free = row("replay-free", 0.9, cost={"rehearsal_bytes": {"mean": 0.0}}, note="nothing stored")
    assert len(advice([free, row("lora", 0.7)])) == 1


def test_the_lowest_perplexity_wins_by_the_geometric_mean_where_all_have_it():
    first = row("a", 40.0, 1.0, metrics={"geometric_average": 9.0})
    second = row("b", 30.0, 1.0, metrics={"geometric_average": 12.0})
    assert advice([first, second])[0].startswith("Take **a**: geometric mean of perplexities 9.00,")
    assert advice([first, row("b", 30.0, 1.0)])[0].startswith("Take **b**: mean perplexity 30.00,")


def test_rows_without_costs_are_not_advised():
    bare = row("bare", 0.9)
    bare["cost"] = {"seconds": {"mean": 1.0}}
    assert advice([bare, row("lora", 0.7)]) == []


def test_names_are_safe_in_a_page():
    assert advice([row("a|<b", 0.9), row("c", 0.5)])[0].startswith("Take **a\\|&lt;b**")
