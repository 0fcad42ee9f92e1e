"""Comparisons: which runs are made, in which folders, what is reused, and what the pages are made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest

from perdure import comparison as comparisons
from perdure import yamltext
from perdure.errors import BadInput, Interrupted, ProtocolRefused
from perdure.evaluation.compare import interval
from perdure.recipe import Recipe, load_recipe, make_recipe, recipe_hash
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
            "arm": recipe.label,
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


def test_an_order_of_classes_for_each_seed_is_shared_by_its_arms(tmp_path):
    from perdure.streams import build_stream

    rows = [{"text": f"row {n} of {label}", "label": label} for label in "abcdef" for n in range(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {**SETTINGS, "stream": {"source": {"path": str(path), "test": str(path)}, "experiences": 3}}
    (tmp_path / "tiny.yaml").write_text(yamltext.dump(settings))
    loaded = load_recipe(str(tmp_path / "tiny.yaml"), ["stream.class_order=seed"], compared=True)
    made = comparisons.plan(loaded, ["lora", "frozen"], [0, 1, 2], tmp_path / "out")
    orders = {
        arm: [[each.classes for each in build_stream(run.stream, run.seed)] for run in members]
        for arm, members in made.items()
    }
    assert orders["lora"] == orders["frozen"]
    assert len({str(order) for order in orders["lora"]}) == 3


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
    recipe = make_recipe(SETTINGS | {"arms": {"lora": {}, "wrong": {"method": ["lora", "lora"]}}})
    with pytest.raises(BadInput, match=r"arm wrong: method: .*lora"):
        comparisons.compare(recipe, None, [0], output_dir=tmp_path)
    greedy = make_recipe(SETTINGS | {"arms": {"lora": {}, "greedy": {"method": {"er": {"budget": 9}}}}})
    with pytest.raises(ProtocolRefused, match=r"arm greedy: protocol.rehearsal"):
        comparisons.compare(greedy, None, [0], output_dir=tmp_path)
    assert runs.trained == []


# ---- what is typed over several arms
@pytest.mark.parametrize("typed", ["method=frozen", "method={lora: {rank: 7}}", "method=[lora]"])
def test_a_whole_method_typed_over_arms_is_refused(tmp_path, typed):
    """Dropped or put into every arm, it would leave arms that are not what they are called."""
    with pytest.raises(BadInput, match=r"^method: .*every arm of a comparison brings its own.*--methods"):
        comparisons.plan(make_recipe(SETTINGS, [typed]), None, [0], tmp_path)


def test_a_setting_of_a_method_holds_for_the_arms_that_have_it(tmp_path):
    plan = comparisons.plan(make_recipe(SETTINGS, ["method.lora.rank=5"]), None, [0], tmp_path)
    assert plan["frozen"][0].method == [{"linear_probe": {}}]
    assert [plan[arm][0].method[0]["lora"]["rank"] for arm in ("lora", "lora+ridge")] == [5, 5]


def test_settings_of_methods_that_only_arms_have(tmp_path):
    """`perdure compare mine --methods replay,lora method.er.budget=5`: the recipe's own method is lora."""
    path = tmp_path / "mine.yaml"
    path.write_text(yamltext.dump(SETTINGS | {"protocol": {"rehearsal": 9}}), encoding="utf-8")
    typed = ["method.replay.budget=5", "head.ridge.features=32"]
    plan = comparisons.plan(load_recipe(path, typed, compared=True), ["replay", "lora+ridge", "lora"], [0], tmp_path)
    assert plan["er"][0].method[0]["er"]["budget"] == 5 and plan["lora"][0].method[0]["lora"]["rank"] == 2
    assert plan["lora+ridge"][0].head["ridge"]["features"] == 32 and list(plan["lora"][0].head) == ["cosine"]
    with pytest.raises(BadInput, match=r"method\.replay\.budget: no arm has the method replay; arms: lora"):
        comparisons.plan(load_recipe(path, typed[:1], compared=True), ["lora"], [0], tmp_path)
    with pytest.raises(BadInput, match="'lorra' is unknown; did you mean lora"):
        comparisons.plan(load_recipe(path, ["method.lorra.rank=2"], compared=True), None, [0], tmp_path)
    with pytest.raises(BadInput, match="method.er"):  # of a single run it would mean nothing
        load_recipe(path, ["method.er.budget=5"])


def test_a_typed_head_with_settings_is_in_the_arms_name(tmp_path):
    plan = comparisons.plan(make_recipe(SETTINGS, ["head={ridge: {features: 8}}"]), ["lora"], [0], tmp_path)
    assert list(plan) == ["lora+ridge"]


def test_the_folder_of_one_run_is_not_taken_for_that_of_many(recipe, tmp_path):
    with pytest.raises(BadInput, match=r"output_dir: .*--output-dir here"):
        comparisons.plan(make_recipe(SETTINGS, ["output_dir=here"]), None, [0], tmp_path)
    own = make_recipe(SETTINGS | {"output_dir": "here"})
    with pytest.raises(BadInput, match=r"output_dir: the recipe sets here"):
        comparisons.plan(own, None, [0])
    assert comparisons.plan(own, ["lora"], [0], tmp_path)["lora"][0].output_dir == f"{tmp_path}/lora/seed-0"


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


@pytest.mark.parametrize("there", ["report.json", "recipe.yaml", "report.html"])
def test_a_folder_with_another_page_is_refused_before_any_run(runs, recipe, tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(BadInput, match=rf"output_dir: .*{there}.*--output-dir"):
        comparisons.compare(recipe, None, [0], output_dir=tmp_path)
    assert runs.trained == [] and (tmp_path / there).read_text() == "mine"


def test_runs_that_forgot_too_much_are_named(runs, tmp_path):
    limited = make_recipe(SETTINGS | {"protocol": {"max_forgetting": 0.25}})
    comparison, page = comparisons.compare(limited, ["frozen", "lora"], [0, 1], output_dir=tmp_path)
    beyond = comparisons.forgot_too_much(comparison) or ""
    assert "allows 0.25" in beyond and "lora, seed 0: 0.6000; lora, seed 1: 0.5900" in beyond and page.is_file()
    assert "frozen" not in beyond
    free = make_recipe(SETTINGS)
    comparison, _ = comparisons.compare(free, ["lora"], [0], output_dir=tmp_path / "free")
    assert comparisons.forgot_too_much(comparison) is None


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
    assert [row["arm"] for row in rows] == ["frozen", "lora", "lora+ridge"]  # as the recipe calls them


def change(folder: Path, block: str | None = None, **values) -> None:
    report = build.read_report(folder / "report.json")
    (report if block is None else report[block]).update(values)
    build.write_json(folder / "report.json", report)


def arms_of(folder: Path) -> list[tuple[str, list[int]]]:
    return [(row["arm"], row["seeds"]) for row in build.read_comparison(folder / "comparison.json")["rows"]]


def test_runs_that_differ_in_more_than_the_seed_are_different_arms(runs, recipe, tmp_path):
    comparisons.compare(recipe, ["lora"], range(4), output_dir=tmp_path / "made")
    folders = [tmp_path / "made" / "lora" / f"seed-{seed}" for seed in range(4)]
    change(folders[1], model="large bert")
    change(folders[2], "training", epochs=7)
    del_training = build.read_report(folders[3] / "report.json")["training"]
    change(folders[3], training={k: v for k, v in del_training.items() if k != "keep_boundaries"})
    comparisons.rebuild(folders, tmp_path / "page")
    # What seed 3 does not name came later: it ran as if it had its default.
    assert arms_of(tmp_path / "page") == [("lora", [0, 3]), ("lora (2)", [1]), ("lora (3)", [2])]


def test_a_setting_of_the_protocol_that_is_younger_than_a_run_counts_with_its_default(runs, recipe, tmp_path):
    comparisons.compare(recipe, ["frozen", "lora"], [0], output_dir=tmp_path)
    old = build.read_report(tmp_path / "lora/seed-0/report.json")
    change(tmp_path / "lora/seed-0", protocol={k: v for k, v in old["protocol"].items() if k != "max_test_rows"})
    comparison, _ = comparisons.compare(recipe, ["frozen", "lora"], [0], output_dir=tmp_path)
    assert comparison["protocol"] == recipe.protocol.model_dump(mode="json")
    change(tmp_path / "lora/seed-0", "protocol", max_test_rows=3)
    with pytest.raises(BadInput, match=r"protocol\.max_test_rows"):
        comparisons.rebuild([tmp_path])


def test_the_page_of_several_runs_replaces_no_other_comparison(runs, recipe, tmp_path):
    comparisons.compare(recipe, ["frozen", "lora", "lora+ridge"], [0], "lora", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    some = [tmp_path / name / "seed-0" for name in ("frozen", "lora")]
    with pytest.raises(BadInput, match=r"holds a page of something other than these 2 runs.*--output-dir"):
        comparisons.rebuild(some)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    comparisons.rebuild([*some, tmp_path / "lora+ridge" / "seed-0"])  # these very runs: rebuilt with all it knew
    assert {path: path.read_bytes() for path in before} == before
    assert comparisons.rebuild(some, tmp_path / "page")[-1] == tmp_path / "page" / "report.html"
    (tmp_path / "comparison.json").unlink()
    with pytest.raises(BadInput, match="something other"):  # somebody else's page
        comparisons.rebuild(some)


def test_a_folder_without_a_report(tmp_path):
    with pytest.raises(BadInput, match=r"holds no report.json"):
        comparisons.rebuild([tmp_path])
    (tmp_path / "report.json").write_text('{"status": "complete"}')
    with pytest.raises(BadInput, match=rf"^{re.escape(str(tmp_path / 'report.json'))}: schema: found None"):
        comparisons.rebuild([tmp_path])


# ---- in words
def row(arm: str, accuracy: float | None, forgetting: float, *others: float) -> dict:
    """An arm with one seed, and one more for each further accuracy."""
    values = [accuracy, *others]
    figures = {"average_accuracy": interval(values), "forgetting": {"mean": forgetting}}
    return {
        "arm": arm, "seeds": list(range(len(values))), "metrics": figures, "values": {"average_accuracy": values}
    }  # fmt: skip


def told(*rows: dict, metric: str = "accuracy", arm: str = "a", against: str = "b") -> str | None:
    return comparisons.verdict({"rows": rows, "metric": metric, "higher_is_better": metric == "accuracy"}, arm, against)


def test_the_verdict_says_where_an_arm_stands():
    above, below = row("a", 0.75, 0.1), row("b", 0.7, 0.25)
    assert told(above, below) == (
        "a is 5.0 points above b in average accuracy (better): 75.0 against 70.0 %, forgetting 10.0 against 25.0"
        "; one seed, an illustration."
    )
    assert "5.0 points below a in average accuracy (worse)" in (told(above, below, arm="b", against="a") or "")
    assert "a is equal to b in average accuracy:" in (told(row("a", 0.5, 0), row("b", 0.5, 0)) or "")
    perplexity = told(row("a", 20.0, 1.0), row("b", 18.5, 2.0), metric="perplexity") or ""
    assert "a is 1.50 above b in average perplexity (worse): 20.00 against 18.50" in perplexity
    assert told(above, below, against="c") is None and told(above, row("b", None, 0)) is None


def test_the_verdict_is_that_of_the_differences_within_each_seed():
    """Seeds differ more than arms: both intervals are wide and overlap, and yet one arm is always 5 points ahead."""
    a, b = row("a", 0.50, 0, 0.60, 0.70), row("b", 0.45, 0, 0.551, 0.648)
    assert a["metrics"]["average_accuracy"]["low"] < b["metrics"]["average_accuracy"]["high"]
    assert (told(a, b) or "").endswith("; 3 seeds, 95 % interval of the paired difference +4.7 to +5.4.")
    # The same figures in another order of seeds: nothing is settled.
    crossed = told(row("a", 0.70, 0, 0.50, 0.60), b) or ""
    assert crossed.endswith("which contains 0: not settled.") and "5.0 points above b" in crossed
    worse = told(row("a", 20.0, 1, 21.0, 22.0), row("b", 18.0, 1, 19.1, 19.9), metric="perplexity") or ""
    assert "(worse)" in worse and "paired difference +1.75 to +2.25." in worse


def test_fewer_than_three_pairs_are_an_illustration():
    assert (told(row("a", 0.5, 0, 0.6), row("b", 0.4, 0, 0.5)) or "").endswith("; 2 seeds, an illustration.")
    one, other = row("a", 0.5, 0, 0.6, 0.7), row("b", 0.4, 0, 0.5, 0.6)
    other["seeds"] = [2, 3, 4]
    assert (told(one, other) or "").endswith("; one seed, an illustration.")
    del other["values"]  # written by a version that did not keep them
    assert (told(one, other) or "").endswith("; 3 seeds, an illustration.")
