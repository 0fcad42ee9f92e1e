"""A comparison as CSV and LaTeX, and what it says against joint training."""

from __future__ import annotations

import csv
import io
import re

import pytest

from perdure.evaluation.compare import build_comparison
from perdure.report import tables, words
from perdure.report.build import validate_comparison
from tests.unit.report_samples import arms, sample, status


def compared(seeds: tuple[int, ...] = (0, 1, 2), **options):
    return build_comparison(arms(seeds), recipe="demo", reference="lora", **options)


def test_csv_holds_every_figure_of_every_arm():
    comparison = compared()
    rows = list(csv.DictReader(io.StringIO(tables.comparison_csv(comparison))))
    expected = sum(len(row["metrics"]) + len(row["cost"]) for row in comparison["rows"])
    assert len(rows) == expected
    found = {(row["arm"], row["figure"]): row for row in rows}
    moram = next(row for row in comparison["rows"] if row["arm"] == "moram")
    one = found["moram", "average_accuracy"]
    assert float(one["mean"]) == moram["metrics"]["average_accuracy"]["mean"]
    assert float(one["difference_high"]) == moram["difference"]["average_accuracy"]["high"]
    assert (one["block"], one["seeds"], one["pairs"]) == ("metrics", "3", "3")
    assert int(one["wins"]) + int(one["losses"]) + int(one["ties"]) == 3
    assert found["lora", "forgetting"]["difference"] == "" and found["moram", "transfer"]["mean"] == ""
    assert ("moram, protected keys + ridge", "seconds") in found  # a comma in a name


def test_latex_has_as_many_cells_in_each_line_and_the_best_bold():
    comparison = compared()
    text = tables.comparison_latex(comparison)
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(body) == 1 + len(comparison["rows"])
    columns = len(words.columns(comparison)) + 3
    assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {columns}
    assert rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}" in text
    best = next(row for row in comparison["rows"] if row["arm"] == "moram, protected keys + ridge")
    shown = tables.latex_text(words.interval("average_accuracy", best["metrics"]["average_accuracy"]))
    assert rf"\textbf{{{shown}}}" in text and "joint (upper bound)" in text
    assert "means over 3 seeds" in text and "illustration" not in text
    assert text.isascii()
    assert "an illustration" in tables.comparison_latex(compared((0,)))


def test_latex_escapes_what_it_would_take_for_commands():
    assert tables.latex_text(r"a_b & 50% {x} \y #1 $2 ~z ^") == (
        r"a\_b \& 50\% \{x\} \textbackslash{}y \#1 \$2 \textasciitilde{}z \textasciicircum{}"
    )


def joint(seed: int = 0, head: str = "cosine", last: float = 0.8):
    details = status("joint", "upper bound")
    details["stream"]["hash"] = f"5f3c-{seed}"
    return sample("joint", seed, matrix=[[None, None], [0.9, last]], head=head, details=details)


def test_intransigence_is_counted_from_the_joint_arm_of_the_seed():
    members = [sample("lora", seed, matrix=[[0.7, None], [0.5, 0.6 + seed / 10]]) for seed in (0, 1)]
    comparison = build_comparison(
        {"lora": members, "joint": [joint(0), joint(1, last=0.9)]}, recipe="demo", reference="lora"
    )
    lora, bound = validate_comparison(comparison)["rows"]
    # (0.9 - 0.7 + 0.8 - 0.6) / 2 and (0.9 - 0.7 + 0.9 - 0.7) / 2
    assert lora["values"]["intransigence"] == pytest.approx([0.2, 0.2]) and lora["joint"] == "joint"
    assert "intransigence" not in bound["metrics"] and bound["joint"] is None
    assert ("metrics", "intransigence") in words.columns(comparison)
    assert "Intransigence" in tables.comparison_latex(comparison)


def test_intransigence_takes_the_joint_arm_with_the_same_head():
    matrix = [[0.7, None], [0.5, 0.6]]
    comparison = build_comparison(
        {
            "lora+ridge": [sample("lora", head="ridge", matrix=matrix)],
            "joint": [joint()],
            "joint+ridge": [joint(head="ridge", last=0.9)],
            "er": [sample("er", head="linear", matrix=matrix)],
        },
        recipe="demo",
    )
    rows = {row["arm"]: row for row in comparison["rows"]}
    assert rows["lora+ridge"]["joint"] == "joint+ridge" and rows["er"]["joint"] == "joint"
    assert rows["lora+ridge"]["metrics"]["intransigence"]["mean"] == pytest.approx((0.2 + 0.3) / 2)


def test_a_seed_without_joint_training_leaves_it_open():
    members = [sample("lora", seed, matrix=[[0.7, None], [0.5, 0.6]]) for seed in (0, 1)]
    comparison = build_comparison({"lora": members, "joint": [joint(0)]}, recipe="demo")
    assert comparison["rows"][0]["values"]["intransigence"] == [pytest.approx(0.2), None]
    assert comparison["rows"][0]["metrics"]["intransigence"]["mean"] is None
    without = build_comparison({"lora": members}, recipe="demo")
    assert "intransigence" not in without["rows"][0]["metrics"] and without["rows"][0]["joint"] is None
