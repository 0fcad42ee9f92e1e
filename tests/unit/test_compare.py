"""Intervals over seeds, paired differences, and what may not be compared."""

from __future__ import annotations

import copy
import math

import pytest

from perdure.errors import BadInput
from perdure.evaluation import compare as c
from tests.unit.report_samples import arms, sample

# Two-sided 95 % and 99 % points from printed tables of Student's t.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 9: (2.262, 3.250)}
TABLE |= {10: (2.228, 3.169), 20: (2.086, 2.845), 30: (2.042, 2.750), 120: (1.980, 2.617)}


@pytest.mark.parametrize("df", TABLE)
def test_t_quantile_agrees_with_the_table(df):
    assert round(c.t_quantile(0.975, df), 3) == TABLE[df][0]
    assert round(c.t_quantile(0.995, df), 3) == TABLE[df][1]
    assert c.t_quantile(0.025, df) == -c.t_quantile(0.975, df)


def test_t_in_closed_form_and_in_the_limit():
    for t in (-3.0, -0.2, 0.0, 0.7, 12.0):
        assert c.t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-13)
        assert c.t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-13)
    assert c.t_quantile(0.975, 1e7) == pytest.approx(1.959964, abs=1e-5)
    with pytest.raises(BadInput, match="p must lie"):
        c.t_quantile(1.0, 3)


def test_interval():
    # Mean 2, deviation 1, half width 4.302653 / sqrt 3.
    found = c.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] == pytest.approx(2 + 2.484138, abs=1e-5)
    assert found["low"] == pytest.approx(2 - 2.484138, abs=1e-5)
    assert c.interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
    assert c.interval([]) == c.interval([0.5, None]) == {"mean": None, "low": None, "high": None}
    assert c.interval([0.25, 0.25]) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_paired_difference_pairs_by_seed():
    found = c.paired_difference({0: 0.5, 1: 0.7, 2: 0.9}, {2: 0.6, 1: 0.5, 0: 0.4, 7: 9.0})
    assert found is not None
    assert found["mean"] == pytest.approx(0.2)
    # Differences 0.1, 0.2, 0.3.
    assert found["high"] == pytest.approx(0.2 + 0.2484138, abs=1e-6)
    assert (found["wins"], found["losses"], found["ties"], found["pairs"]) == (3, 0, 0, 3)
    lower = c.paired_difference({0: 5.0, 1: 4.0}, {0: 4.0, 1: 4.0}, higher_is_better=False)
    assert lower is not None and (lower["wins"], lower["losses"], lower["ties"]) == (0, 1, 1)
    assert c.paired_difference({0: 1.0}, {1: 1.0}) is None
    assert c.paired_difference({0: None}, {0: 1.0}) is None


def test_comparison_has_the_published_shape():
    runs = arms((0, 1, 2))
    made = c.build_comparison(runs, recipe="demo", reference="lora")
    assert made["schema"] == 1 and made["reference"] == "lora" and made["illustration"] is False
    assert [row["arm"] for row in made["rows"]] == list(runs)
    assert len(made["runs"]) == 3 * len(runs)
    row = next(row for row in made["rows"] if row["arm"] == "moram")
    assert row["method"] == "moram" and row["head"] == "cosine" and row["seeds"] == [0, 1, 2]
    values = [r["metrics"]["average_accuracy"] for r in runs["moram"]]
    assert row["metrics"]["average_accuracy"] == c.interval(values)
    assert set(row["cost"]["stored_bytes"]) == {"mean", "low", "high"}
    theirs = [r["metrics"]["average_accuracy"] for r in runs["lora"]]
    expected = c.interval([a - b for a, b in zip(values, theirs, strict=True)])
    difference = row["difference"]["average_accuracy"]
    assert {k: difference[k] for k in expected} == expected
    assert difference["wins"] == 3 and row["difference"]["forgetting"]["wins"] == 3
    # Slower than the reference: a loss, although the number is larger.
    assert row["difference"]["seconds"]["mean"] > 0 and row["difference"]["seconds"]["losses"] == 3
    assert next(row for row in made["rows"] if row["arm"] == "lora")["difference"] is None
    assert next(row for row in made["rows"] if row["arm"] == "joint")["status"] == "upper bound"
    indices = [n for row in made["rows"] for n in row["runs"]]
    assert indices == list(range(len(made["runs"])))


def test_one_seed_is_an_illustration():
    made = c.build_comparison(arms((4,)), recipe="demo")
    assert made["illustration"] is True and made["reference"] == "frozen + cosine"
    entry = made["rows"][4]["metrics"]["average_accuracy"]
    assert entry["mean"] is not None and entry["low"] is None and entry["high"] is None


def test_fewer_than_three_seeds_are_an_illustration():
    assert c.build_comparison(arms((0, 1)), recipe="demo")["illustration"] is True
    assert c.build_comparison(arms((0, 1, 2)), recipe="demo")["illustration"] is False


def test_what_made_the_runs_is_collected_over_all_of_them():
    """A comparison that reuses runs of older code, or of another machine, says so."""
    runs = arms((0, 1, 2))
    assert c.build_comparison(runs, recipe="demo")["warnings"] == []
    for report in runs["lora"]:
        report["environment"] = {**report["environment"], "commit": "old", "cpu": "X", "threads": 1}
    for report in (r for arm, reports in runs.items() for r in reports if arm != "lora"):
        report["environment"] = {**report["environment"], "commit": "new", "cpu": "X", "threads": 2}
    runs["moram"][1]["environment"]["commit"] = None
    made = c.build_comparison(runs, recipe="demo")
    commit, threads = made["warnings"]
    assert "differ in commit: new (17 runs), old (3 runs), not recorded (1 run)" in commit
    assert "differ in threads: 2 (18 runs), 1 (3 runs)" in threads
    assert made["environment"]["commit"] == ["new", "old", None] and made["environment"]["cpu"] == "X"
    rows = {row["arm"]: row for row in made["rows"]}
    assert [one["commit"] for one in rows["moram"]["made_by"]] == ["new", None]
    assert rows["lora"]["made_by"] == [{"commit": "old", "cpu": "X", "device": "cpu", "threads": 1}]


def test_rows_keep_the_values_of_each_seed():
    runs = arms((3, 1))
    row = c.build_comparison(runs, recipe="demo")["rows"][0]
    assert row["seeds"] == [3, 1]
    assert row["values"]["forgetting"] == [r["metrics"]["forgetting"] for r in runs[row["arm"]]]


def _two() -> dict:
    return {"a": [sample("a")], "b": [sample("b")]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r["protocol"].update(mask="seen"), r"protocol\.mask"),
        (lambda r: r["protocol"].update(rehearsal=200), r"protocol\.rehearsal"),
        (lambda r: r["protocol"].pop("passes"), r"protocol\.passes"),
        (lambda r: r.update(stream="clinc150"), "stream"),
        (lambda r: r.update(schema=2), "schema"),
        (lambda r: r.update(metric="perplexity"), "metric"),
        (lambda r: r.update(objective="language_modelling"), "objective"),
        (lambda r: r["details"]["stream"].update(hash="other"), r"details\.stream\.hash"),
        (lambda r: r["details"]["stream"].update(scenario="online"), r"details\.stream\.scenario"),
        (lambda r: r.update(status="running"), "status"),
    ],
)
def test_unlike_runs_are_refused_by_field(change, field):
    runs = copy.deepcopy(_two())
    c.build_comparison(runs, recipe="x")
    change(runs["b"][0])
    with pytest.raises(BadInput, match=rf"^{field}: run 'b, seed 0'"):
        c.build_comparison(runs, recipe="x")


def test_streams_may_differ_between_seeds_only():
    runs = {"a": [sample("a", 0), sample("a", 1)], "b": [sample("b", 0), sample("b", 1)]}
    assert runs["a"][0]["details"]["stream"]["hash"] != runs["a"][1]["details"]["stream"]["hash"]
    assert [row["seeds"] for row in c.build_comparison(runs, recipe="x")["rows"]] == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"length": 4}, "length"),
        ({"classes": [["other"]]}, "classes"),
        ({"class_order": "seed"}, "class_order"),
    ],
)
def test_another_stream_under_another_seed_is_refused(change, field):
    """Its rows may differ between seeds, but not what it is a stream of."""
    runs = {"a": [sample("a", 0), sample("a", 1)]}
    runs["a"][1]["details"]["stream"].update(change)
    with pytest.raises(BadInput, match=rf"^details\.stream\.{field}: run 'a, seed 1'"):
        c.build_comparison(runs, recipe="x")


def test_wrong_arms_are_named():
    with pytest.raises(BadInput, match="at least one arm"):
        c.build_comparison({}, recipe="x")
    with pytest.raises(BadInput, match="reference: 'c'"):
        c.build_comparison(_two(), recipe="x", reference="c")
    with pytest.raises(BadInput, match=r"arms\.a: seed 0 appears twice"):
        c.build_comparison({"a": [sample("a"), sample("a")]}, recipe="x")
    with pytest.raises(BadInput, match=r"arms\.a: has no run"):
        c.build_comparison({"a": []}, recipe="x")
    with pytest.raises(BadInput, match=r"paths\.a: 2 paths for 1"):
        c.build_comparison({"a": [sample("a")]}, recipe="x", paths={"a": ["x", "y"]})
