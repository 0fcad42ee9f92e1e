"""Accuracy and forgetting by class, from hand-worked counts."""

from __future__ import annotations

import pytest

from perdure.evaluation.classes import class_figures, class_table, count_classes


def test_counts_add_up():
    counts: dict[str, list[int]] = {}
    count_classes(counts, [{"label": "a"}, {"label": "b"}, {"label": "a"}], [True, False, False])
    count_classes(counts, [{"label": "a"}, {"label": 7}], [True, True])
    assert counts == {"a": [2, 3], "b": [0, 1], "7": [1, 1]}
    with pytest.raises(ValueError, match="zip"):
        count_classes(counts, [{"label": "a"}], [])


HISTORY = [
    {"a": [8, 10], "b": [6, 10]},
    {"a": [9, 10], "b": [3, 10], "c": [4, 4]},
    {"a": [5, 10], "b": [4, 10], "c": [3, 4], "d": [2, 5]},
]


def test_forgetting_is_counted_from_the_best_boundary_of_each_class():
    table = {row["name"]: row for row in class_table(HISTORY)}
    assert list(table) == ["a", "b", "c", "d"]
    assert table["a"] == {"name": "a", "rows": 10, "scores": [0.8, 0.9, 0.5], "forgetting": pytest.approx(0.4)}
    assert table["b"]["forgetting"] == pytest.approx(0.2) and table["c"]["forgetting"] == pytest.approx(0.25)
    assert table["d"] == {"name": "d", "rows": 5, "scores": [None, None, 0.4], "forgetting": None}
    figures = class_figures(class_table(HISTORY))
    assert figures == {
        "worst_class": 0.4, "class_forgetting": pytest.approx((0.4 + 0.2 + 0.25) / 3),
        "worst_class_forgetting": pytest.approx(0.4),
    }  # fmt: skip


def test_a_class_that_recurs_is_compared_where_it_had_the_same_rows():
    history = [{"a": [10, 10]}, {"a": [10, 20]}, {"a": [5, 20]}]
    (row,) = class_table(history)
    assert row["forgetting"] == pytest.approx(0.25)  # from 10 of 20, not from 10 of 10
    (row,) = class_table(history[:2])
    assert row["forgetting"] is None


def test_joint_training_has_last_scores_alone():
    table = class_table([{}, {"a": [1, 2], "b": [2, 2]}])
    assert [row["scores"] for row in table] == [[None, 0.5], [None, 1.0]]
    assert class_figures(table) == {"worst_class": 0.5, "class_forgetting": None, "worst_class_forgetting": None}
    assert class_figures([]) == {"worst_class": None, "class_forgetting": None, "worst_class_forgetting": None}
