"""Comparisons: which runs are made, in which folders, what is reused, and what the pages are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from perdure import comparison as comparisons
from perdure.errors import BadInput, Interrupted
from perdure.recipe import Recipe, make_recipe, recipe_hash
from perdure.report import build

SETTINGS = {
    "name": "tiny",
    "model": {"scratch": {"family": "bert", "layers": 1, "width": 16, "heads": 2}},
    "stream": {"source": "stdlib", "experiences": 2},
    "method": "lora",
    "arms": {
        "frozen": {"method": "linear_probe", "note": "features stand still"},
        "lora": {"method": {"lora": {"rank": 2}}, "training": {"learning_rate": 1e-3}},
        "lora+ridge": {"method": {"lora": {"rank": 2}}, "head": "ridge"},
    },
    "tuning": {"trials": 3},
}


def report_of(recipe: Recipe, accuracy: float) -> dict:
    method = next(iter(recipe.method[0]))
    return build.build_report(
        name=recipe.name, method=method, head=next(iter(recipe.head)), model="tiny bert", stream="stdlib",
        objective="classification", metric="accuracy", higher_is_better=True, seed=recipe.seed,
        protocol=recipe.protocol.model_dump(mode="json"), training=recipe.training.model_dump(mode="json"),
        details={
            "method": [{"name": method, "title": "t", "status": "verified", "config": recipe.method[0][method]}],
            "stream": {"scenario": "class_incremental", "hash": f"h{recipe.seed}", "experiences": ["a", "b"]},
        },
        matrix=[[0.9, None], [accuracy, 0.8]], baseline=None,
        cost={"seconds": 1.0, "trainable_parameters": 10, "stored_bytes": 100}, status="complete",
    )  # fmt: skip


class Runs:
    """Stands for `run_recipe`: each arm has a fixed accuracy, finished runs are given back."""

    accuracy: ClassVar = {"frozen": 0.7, "lora": 0.3, "lora+ridge": 0.6}

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.stop_before: tuple[str, int] | None = None

    def __call__(self, recipe: Recipe, *, progress: bool = True) -> dict:
        folder = Path(recipe.output_dir or "")
        stamp = folder / "stamp"
        if stamp.exists():
            if stamp.read_text() != recipe_hash(recipe):
                raise BadInput(f"output_dir: {folder} holds a run of another recipe")
            return build.read_report(folder / "report.json")
        if self.stop_before == (recipe.label, recipe.seed):
            raise Interrupted("stopped")
        self.trained.append((recipe.label, recipe.seed))
        report = report_of(recipe, self.accuracy[recipe.label] + recipe.seed / 100)
        folder.mkdir(parents=True)
        stamp.write_text(recipe_hash(recipe))
        build.write_json(folder / "report.json", report)
        return report


@pytest.fixture
def runs(monkeypatch) -> Runs:
    from perdure import run

    fake = Runs()
    monkeypatch.setattr(run, "run_recipe", fake)
    return fake


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe(SETTINGS)


def test_the_plan_names_every_run(recipe, tmp_path):
    plan = comparisons.plan(recipe, None, [0, 1], tmp_path)
    assert list(plan) == ["frozen", "lora", "lora+ridge"]
    assert [run.output_dir for run in plan["lora+ridge"]] == [f"{tmp_path}/lora+ridge/seed-{s}" for s in (0, 1)]
    assert [run.seed for run in plan["lora"]] == [0, 1]
    assert plan["lora"][0].training.learning_rate == 1e-3 and plan["frozen"][0].training.learning_rate == 5e-4
    assert all(run.stream == recipe.stream for members in plan.values() for run in members)


def test_run_and_compare_share_their_folders(recipe):
    (run,) = comparisons.plan(recipe, ["lora"], [3])["lora"]
    alone = recipe.with_arm("lora", seed=3)
    assert alone.output_dir == run.output_dir == "runs/tiny/lora/seed-3"
    assert recipe_hash(alone) == recipe_hash(run)


def test_what_was_typed_holds_for_every_arm(tmp_path):
    recipe = make_recipe(SETTINGS, ["training.learning_rate=1e-2", "stream.experiences=4"])
    plan = comparisons.plan(recipe, None, [0], tmp_path)
    assert {run.training.learning_rate for (run,) in plan.values()} == {1e-2}
    assert {run.stream.experiences for (run,) in plan.values()} == {4}


@pytest.mark.parametrize(
    ("arms", "seeds", "words"),
    [
        ([], [0], "no arms"),
        (["lora"], [], "seeds"),
        (["lora"], [0, 0], "twice"),
        (["lora", "lora"], [0], "same arm"),
        (["lorra"], [0], "lorra"),
    ],
)
def test_a_plan_that_cannot_be(recipe, arms, seeds, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        comparisons.plan(recipe, arms, seeds, tmp_path)


def test_an_arm_that_does_not_fit_is_named_before_any_run(runs, tmp_path):
    recipe = make_recipe(SETTINGS | {"arms": {"lora": {}, "wrong": {"method": {"lora": {"rank": 0}}}}})
    with pytest.raises(BadInput, match=r"arm wrong: method.lora.rank"):
        comparisons.compare(recipe, None, [0], output_dir=tmp_path)
    assert runs.trained == []


def test_comparison_of_arms_over_seeds(runs, recipe, tmp_path):
    said: list[str] = []
    comparison, page = comparisons.compare(recipe, None, [0, 1, 2], "lora", tmp_path, progress=False, say=said.append)
    assert runs.trained[:4] == [("frozen", 0), ("lora", 0), ("lora+ridge", 0), ("frozen", 1)]
    assert len(runs.trained) == 9 and len(said) == 9 and said[0] == "[1/9] frozen, seed 0: new"
    assert page == tmp_path / "report.html" and "lora+ridge" in page.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison
    rows = {row["arm"]: row for row in comparison["rows"]}
    assert rows["lora"]["difference"] is None and rows["frozen"]["seeds"] == [0, 1, 2]
    assert rows["frozen"]["difference"]["average_accuracy"]["mean"] == pytest.approx(0.2)
    assert rows["frozen"]["note"] == "features stand still" and not comparison["illustration"]
    assert comparison["tuning"] == {"trials": 3} and comparison["recipe"] == "tiny"
    assert comparison["runs"][0] == "frozen/seed-0" and (tmp_path / comparison["runs"][-1] / "report.json").is_file()


def test_finished_runs_are_reused_and_an_interrupted_comparison_goes_on(runs, recipe, tmp_path):
    runs.stop_before = ("lora", 1)
    with pytest.raises(Interrupted):
        comparisons.compare(recipe, ["frozen", "lora"], [0, 1], output_dir=tmp_path)
    assert len(runs.trained) == 3 and not (tmp_path / "comparison.json").exists()
    runs.stop_before = None
    said: list[str] = []
    comparisons.compare(recipe, ["frozen", "lora"], [0, 1], output_dir=tmp_path, say=said.append)
    assert runs.trained == [("frozen", 0), ("lora", 0), ("frozen", 1), ("lora", 1)]
    assert [line.rsplit(": ")[-1] for line in said] == ["finished before"] * 3 + ["new"]


def test_a_folder_of_another_recipe_is_refused(runs, recipe, tmp_path):
    comparisons.compare(recipe, ["lora"], [0], output_dir=tmp_path)
    other = make_recipe(SETTINGS, ["training.learning_rate=1e-2"])
    with pytest.raises(BadInput, match="another recipe"):
        comparisons.compare(other, ["lora"], [0], output_dir=tmp_path)


def test_an_unknown_reference_is_refused_before_any_run(runs, recipe, tmp_path):
    with pytest.raises(BadInput, match="reference: 'moram' is not compared; arms: frozen, lora"):
        comparisons.compare(recipe, ["frozen", "lora"], [0], "moram", tmp_path)
    assert runs.trained == []


# ---- pages of what lies on disk
def test_pages_are_rebuilt(runs, recipe, tmp_path):
    comparison, page = comparisons.compare(recipe, ["frozen", "lora"], [0, 1], "lora", tmp_path)
    first = page.read_text(encoding="utf-8")
    page.unlink()
    pages = comparisons.rebuild([tmp_path])
    assert pages[-1] == page and page.read_text(encoding="utf-8") == first
    assert len(pages) == 5 and (tmp_path / "frozen/seed-1/report.html").is_file()
    again = build.read_comparison(tmp_path / "comparison.json")
    assert again == json.loads(json.dumps(comparison))


def test_a_page_of_several_runs(runs, recipe, tmp_path):
    comparisons.compare(recipe, ["frozen", "lora", "lora+ridge"], [0], output_dir=tmp_path / "made")
    folders = [tmp_path / "made" / name / "seed-0" for name in ("frozen", "lora", "lora+ridge")]
    pages = comparisons.rebuild(folders, tmp_path / "page")
    assert pages == [*(folder / "report.html" for folder in folders), tmp_path / "page" / "report.html"]
    rows = build.read_comparison(tmp_path / "page" / "comparison.json")["rows"]
    # Both LoRA arms are called "lora" in their reports; they stay apart.
    assert [row["arm"] for row in rows] == ["linear_probe", "lora", "lora (2)"]


def test_a_folder_without_a_report(tmp_path):
    with pytest.raises(BadInput, match=r"holds no report.json"):
        comparisons.rebuild([tmp_path])


# ---- in words
def row(arm: str, accuracy: float | None, forgetting: float, seeds: int = 1) -> dict:
    average = {"mean": accuracy}
    if accuracy is not None and seeds > 1:
        average |= {"low": accuracy - 0.02, "high": accuracy + 0.02}
    figures = {"average_accuracy": average, "forgetting": {"mean": forgetting}}
    return {"arm": arm, "seeds": list(range(seeds)), "metrics": figures}


def told(*rows: dict, metric: str = "accuracy", arm: str = "a", against: str = "b") -> str | None:
    return comparisons.verdict({"rows": rows, "metric": metric, "higher_is_better": metric == "accuracy"}, arm, against)


def test_the_verdict_says_where_an_arm_stands():
    above, below = row("a", 0.75, 0.1), row("b", 0.7, 0.25)
    assert told(above, below) == (
        "a is 5.0 points above b in average accuracy (better): 75.0 against 70.0 %, forgetting 10.0 against 25.0"
        "; one seed, an illustration."
    )
    assert "5.0 points below a in average accuracy (worse)" in (told(above, below, arm="b", against="a") or "")
    assert "a is equal to b in average accuracy:" in (told(row("a", 0.5, 0), row("b", 0.5, 0, 3)) or "")
    assert (told(row("a", 0.5, 0, 3), row("b", 0.6, 0, 3)) or "").endswith("; 3 seeds.")
    near = told(row("a", 0.5, 0, 3), row("b", 0.53, 0, 3)) or ""
    assert near.endswith("; 3 seeds, whose intervals overlap: not settled.")
    perplexity = told(row("a", 20.0, 1.0), row("b", 18.5, 2.0), metric="perplexity") or ""
    assert "a is 1.50 above b in average perplexity (worse): 20.00 against 18.50" in perplexity
    assert told(above, below, against="c") is None and told(above, row("b", None, 0)) is None
