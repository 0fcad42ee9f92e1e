"""The demo's own recipe, with a tiny model and few rows in place of MiniLM."""

from __future__ import annotations

import json

from perdure import comparison
from perdure.recipe import load_recipe

SMALL = [
    "model={scratch: {family: bert, layers: 1, width: 16, heads: 2, max_length: 64}}",
    "stream.source={stdlib: {classes: 4, train_rows: 4, valid_rows: 0, test_rows: 2}}",
    "stream.experiences=2", "training.epochs=1", "training.num_threads=1", "head.ridge.features=32",
]  # fmt: skip


def test_the_demo_plans_six_arms_on_one_protocol():
    recipe = load_recipe("demo/stdlib")
    plan = comparison.plan(recipe, None, [0], "runs/demo")
    assert len(plan) == 6 and list(plan) == list(recipe.arms)
    assert all(run.protocol == recipe.protocol and run.stream == recipe.stream for (run,) in plan.values())


def test_the_demo_compares_six_arms(tmp_path, nursery):
    done = nursery.run(tmp_path, "demo", *SMALL, "--output-dir", "demo", "--no-progress")
    assert done.code == 0, done.output
    made = json.loads((tmp_path / "demo" / "comparison.json").read_text(encoding="utf-8"))
    assert [row["arm"] for row in made["rows"]] == list(load_recipe("demo/stdlib").arms) and len(made["rows"]) == 6
    assert made["illustration"] and made["warnings"] == []
    assert (tmp_path / "demo" / "report.html").is_file() and "moram is " in done.output
    again = nursery.run(tmp_path, "demo", *SMALL, "--output-dir", "demo", "--no-progress")
    assert again.code == 0 and again.output.count("finished before") == 6
