"""What a sweep searches, which trials it plans, what it refuses before work starts, and what it makes of results."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sweeps import RECIPE, write_recipe

from perdure import yamltext
from perdure.errors import BadInput, ProtocolRefused
from perdure.recipe import load_recipe
from perdure.sweep.driver import Sweep, plan_sweep, read_table
from perdure.sweep.space import Range, Space, space_of, without_effect
from perdure.sweep.table import SAME, best_trials, table_of, tuning_of, warnings_of
from perdure.sweep.trials import Trial, read_result, units_of, write_result
from perdure.sweep.writing import new_text, target_of


@pytest.fixture
def path(tmp_path) -> Path:
    return write_recipe(tmp_path)


def planned(path: Path, *grid: str, overrides=(), draws=None, **options) -> Sweep:
    recipe = load_recipe(path, overrides, compared=True)
    options = {"folder": path.parent / "trials", "experiences": 2, **options}
    return plan_sweep(recipe, space_of(recipe, grid, draws), **options)


# ---- the space
def test_the_grid_of_the_recipe_and_one_that_is_typed(path):
    recipe = load_recipe(path)
    assert space_of(recipe, ()).settings == {
        "training.learning_rate": [1e-3, 1e-2],
        "training.head_learning_rate": [1e-2, 3e-2],
    }
    typed = space_of(
        recipe, ["learning_rate=1e-4,1e-3", "method.lora.rank=2,4", "method.lora.targets=[query],attention"]
    )
    assert len(typed.points()) == 8 and typed.points()[1]["method.lora.targets"] == "attention"
    assert typed.declared() == {
        "learning_rate": [1e-4, 1e-3], "method.lora.rank": [2, 4], "method.lora.targets": [["query"], "attention"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "overrides", "draws", "words"),
    [
        (["learning_rate"], [], None, "expected key=values"),
        (["learning_rat=1"], [], None, "did you mean learning_rate"),
        (["training.rate=1"], [], None, "cannot be swept"),
        (["stream.experiences=2,3"], [], None, "same stream, model and protocol"),
        (["seed=1,2"], [], None, "seed: cannot be swept"),
        (["method.lora=1"], [], None, "method.lora: cannot be swept"),
        (["learning_rate="], [], None, "give values"),
        (["learning_rate=1e-3,1e-3"], [], None, "stands twice"),
        (["learning_rate=1e-3", "training.learning_rate=1e-2"], [], None, "given twice"),
        (["learning_rate=1e-4..1e-2"], [], None, "add --random N"),
        (["learning_rate=1e-2..1e-4"], [], 3, "lower end first"),
        ([], [], 0, "--random: found 0"),
        ([], ["training.learning_rate=1e-4"], None, "both typed and swept"),
        ([], ["tuning={}"], None, "declares no tuning.grid"),
    ],
)
def test_a_space_that_cannot_be_is_refused(path, grid, overrides, draws, words):
    with pytest.raises(BadInput, match=words.replace(".", r"\.")):
        space_of(load_recipe(path, overrides, compared=True), grid, draws)


def test_draws_are_seeded_and_the_first_stay_when_more_are_drawn(path):
    recipe = load_recipe(path)
    grid = ["learning_rate=1e-4..1e-1", "method.lora.rank=2..64", "head_learning_rate=1e-2,3e-2"]
    few, more, other = (space_of(recipe, grid, n, seed).points() for n, seed in ((5, 0), (9, 0), (5, 1)))
    assert few == more[:5] and few != other
    for point in more:
        assert 1e-4 <= point["training.learning_rate"] <= 1e-1 and point["training.head_learning_rate"] in (1e-2, 3e-2)
        assert type(point["method.lora.rank"]) is int and 2 <= point["method.lora.rank"] <= 64
    again = load_recipe(path, [f"tuning={yamltext.inline({'grid': space_of(recipe, grid, 5).declared()})}"])
    assert space_of(again, (), 5).points() == few  # a recipe holds ranges too


def test_ranges_are_even_over_logarithms_and_have_edges():
    drawn = [Range(1e-4, 1e-2).draw(random.Random(n)) for n in range(400)]
    assert 160 < sum(value < 1e-3 for value in drawn) < 240
    assert all(value == float(f"{value:.2e}") for value in drawn)
    assert Range(1e-4, 1e-2).at_edge(1.1e-4, 0.05) and not Range(1e-4, 1e-2).at_edge(1e-3, 0.05)
    assert Range(-1.0, 1.0).at_edge(0.95, 0.05) and not Range(-1.0, 1.0).at_edge(0.8, 0.05)


# ---- what an arm has
@pytest.mark.parametrize(
    ("method", "head", "idle"),
    [
        ("lora", "cosine", set()),
        ("lora", "ridge", set()),  # an auxiliary head trains the adapter
        ("finetune", "linear", set()),
        ("er", "cosine", set()),  # beside full fine-tuning
        ("linear_probe", "cosine", {"learning_rate"}),
        ("linear_probe", "ridge", {"learning_rate", "head_learning_rate", "epochs"}),
    ],
)
def test_settings_without_effect_are_known(path, method, head, idle):
    space = Space({f"training.{name}": [1] for name in ("learning_rate", "head_learning_rate", "epochs", "bf16")})
    arm = load_recipe(path, [f"method={method}", f"head={head}", "protocol.rehearsal=999"])
    assert {name.partition(".")[2] for name in without_effect(arm, space)} == idle


def test_the_models_own_output_layer_has_no_rate_of_its_own(path):
    arm = load_recipe(path, ["objective=causal_lm"])
    space = Space({"training.learning_rate": [1], "training.head_learning_rate": [1]})
    assert without_effect(arm, space) == {"training.head_learning_rate": "no head of the arm trains"}


def test_a_head_without_a_rate_of_its_own_has_the_common_one(path):
    arm = load_recipe(path, ["method=linear_probe"])
    assert without_effect(arm, Space({"training.learning_rate": [1e-3]})) == {}
    assert "own rate" in without_effect(
        load_recipe(path, ["method=linear_probe", "training.head_learning_rate=1e-2"]),
        Space({"training.learning_rate": [1e-3]}),
    )["training.learning_rate"]  # fmt: skip


# ---- planning
def test_every_arm_gets_the_same_points_and_what_has_no_effect_is_declared(path):
    sweep = planned(path)
    found = {each.arm: (len(each.trials), set(each.without_effect)) for each in sweep.plans}
    rates = {"training.learning_rate", "training.head_learning_rate"}
    assert found == {
        "lora": (4, set()), "frozen": (2, {"training.learning_rate"}), "frozen+ridge": (0, rates)
    }  # fmt: skip
    first = sweep.plans[0].trials[0]
    assert first.recipe.training.learning_rate == 1e-3 and first.recipe.training.head_learning_rate == 1e-2
    assert sweep.plans[1].trials[1].recipe.training.learning_rate == 1e-3  # as in the recipe
    assert sweep.positions == (0, 1) and sweep.length == 3


def test_a_setting_of_a_method_is_swept_where_the_method_is(path):
    sweep = planned(path, "method.lora.rank=1,2,4", "head.ridge.features=16,32")
    assert [(each.arm, len(each.trials)) for each in sweep.plans] == [("lora", 3), ("frozen", 0), ("frozen+ridge", 2)]
    assert sweep.plans[0].without_effect == {"head.ridge.features": "the arm has no head ridge"}
    assert [trial.recipe.method[0]["lora"]["rank"] for trial in sweep.plans[0].trials] == [1, 2, 4]


def test_a_recipe_without_arms_is_swept_itself(tmp_path):
    path = write_recipe(tmp_path, RECIPE[: RECIPE.index("arms:")])
    (plan,) = planned(path).plans
    assert plan.arm == "lora" and len(plan.trials) == 4


@pytest.mark.parametrize(
    ("grid", "options", "words"),
    [
        ([], {"experiences": 0}, "at least 1"),
        ([], {"experiences": 4}, "has 3 experiences; ask for fewer"),
        ([], {"first": 2}, "has 3 experiences; ask for fewer"),
        ([], {"arms": ["lora", "lore"]}, "arm lore: "),
        ([], {"arms": ["lora", "lora"]}, "keep one"),
        ([], {"arms": ["frozen+ridge"]}, "nothing of it has an effect in frozen+ridge"),
        (["method.moram.rank=1,2"], {}, "no method moram, nor has another"),
        (["method.lora.rank=0,2"], {}, "arm lora, method.lora.rank 0: method.lora.rank"),
        (["training.epochs=1,2"], {"overrides": ["output_dir=x"]}, "output_dir"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_work_starts(path, grid, options, words):
    with pytest.raises(BadInput, match=words.replace("+", r"\+").replace(".", r"\.")):
        planned(path, *grid, **options)
    assert not (path.parent / "trials").exists()


def test_a_stream_without_validation_rows_is_refused(path):
    source = yamltext.inline({"path": f"{path.parent}/train.jsonl", "test": f"{path.parent}/test.jsonl"})
    with pytest.raises(BadInput, match="validation rows, on which trials are judged; set stream.validation"):
        planned(path, overrides=[f"stream.source={source}"])


def test_values_that_the_protocol_does_not_grant_are_refused(path):
    with pytest.raises(ProtocolRefused, match="arm lora, epochs 3: "):
        planned(path, "epochs=1,3", overrides=["protocol.passes=1"])


def test_trials_are_new_where_anything_that_counts_has_changed(path):
    def keys(*overrides: str, **options) -> list[str]:
        return [trial.key for trial in planned(path, overrides=overrides, arms=["lora"], **options).trials]

    first = keys()
    assert len(set(first)) == 4 and keys() == first
    assert keys("name=other", "description=x", "tuning.note=x", "training.logging_steps=10") == first
    for other in (keys("seed=1"), keys("training.weight_decay=0.1"), keys("method.lora.rank=3"), keys(experiences=1)):
        assert not set(other) & set(first)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("lora: {}", "lora: {training: {learning_rate: 5e-3}}"), encoding="utf-8")
    assert keys() == first  # that one is swept
    train = path.parent / "train.jsonl"
    train.write_text(train.read_text(encoding="utf-8").replace("oak", "ash"), encoding="utf-8")
    assert not set(keys()) & set(first)


def test_a_trial_reads_back_as_it_was(path):
    for trial in planned(path).trials:
        again = Trial.from_json(trial.to_json())
        assert again.key == trial.key and again.recipe.training == trial.recipe.training


@pytest.mark.parametrize(("own", "shared"), [("{learning_rate: 1e-3}", True), ("{epochs: 2}", False)])
def test_trials_share_a_pretraining_only_where_the_rate_does_not_reach_it(tmp_path, own, shared):
    text = RECIPE.replace("family: bert", "family: gpt2").replace(
        "classification: {{max_length", "causal_lm: {{block_size"
    )
    text = text.replace("experiences: 3", "scenario: domain_incremental\n  domain_field: label")
    text = text.replace(
        "lora: {{}}",
        f"lora: {{{{method: {{{{lora: {{{{pretrain: {own.replace('{', '{{').replace('}', '}}')}}}}}}}}}}}}}",
    )
    path = write_recipe(tmp_path, text[: text.index("  frozen:")])
    trials = planned(path, "learning_rate=1e-3,1e-2", "method.lora.rank=2,4").trials
    units = [
        [(trial.values["training.learning_rate"], trial.values["method.lora.rank"]) for trial in unit]
        for unit in units_of(trials)
    ]
    if shared:
        assert units == [[(1e-3, 2), (1e-2, 2)], [(1e-3, 4), (1e-2, 4)]]
    else:
        assert [len(unit) for unit in units] == [1, 1, 1, 1]


# ---- results
def ended(sweep: Sweep, losses: dict[str, list[float | str]]) -> dict:
    """As if the trials of each arm had found these losses; text is the reason of a failure."""
    for plan in sweep.plans:
        for trial, found in zip(plan.trials, losses[plan.arm], strict=True):
            if isinstance(found, str):
                write_result(trial, sweep.folder, "not finite", reason=found)
            else:
                facts = {"loss": found, "score": 0.5, "metric": "accuracy", "seconds": 1.0, "base": "b"}
                write_result(trial, sweep.folder, "done", **facts)
    return {trial.key: read_result(trial, sweep.folder) for trial in sweep.trials}


LOSSES = {"lora": [0.4, 0.3, "loss is nan", 0.5], "frozen": [0.9, 0.8], "frozen+ridge": []}


def test_the_table_holds_best_and_trials_and_what_was_declared(path):
    sweep = planned(path)
    table = table_of(sweep, ended(sweep, LOSSES))
    lora, frozen, ridge = table["lora"], table["frozen"], table["frozen+ridge"]
    assert lora["best"] == {
        "learning_rate": 1e-3, "head_learning_rate": 3e-2, "experiences": [0, 1],
        "loss": 0.3, "score": 0.5, "seconds": 1.0,
    }  # fmt: skip
    assert [row.get("failed") for row in lora["trials"]] == [None, None, "loss is nan", None]
    assert lora["points"] == frozen["points"] == 4 and lora["seed"] == 0 and lora["rows"] == sweep.rows
    assert frozen["best"]["learning_rate"] is None and frozen["best"]["head_learning_rate"] == 3e-2
    assert ridge["best"] is None and ridge["trials"] == [] and len(ridge["without_effect"]) == 2
    assert lora["edge"] == ["learning_rate", "head_learning_rate"] and frozen["edge"] == ["head_learning_rate"]
    told = "\n".join(warnings_of(table))
    assert "lora: the best learning_rate 1e-3 lies on the edge of its grid" in told
    assert "lora: 1 of 4 trials failed, the first: loss is nan" in told
    assert "frozen: learning_rate has no effect, only the head" in told


def test_no_warning_inside_the_grid(path):
    sweep = planned(path, "learning_rate=1e-4,1e-3,1e-2", "method.lora.rank=4", arms=["lora"])
    table = table_of(sweep, ended(sweep, {"lora": [0.4, 0.3, 0.5]}))
    assert table["lora"]["edge"] == [] and warnings_of(table) == []


def test_results_of_other_weights_are_not_mixed(path):
    sweep = planned(path, arms=["frozen"])
    results = ended(sweep, {"frozen": [0.9, 0.8]})
    results[sweep.trials[0].key]["base"] = "other"
    with pytest.raises(BadInput, match="different weights"):
        table_of(sweep, results)


def test_a_file_that_is_no_result_or_no_table_is_refused(path):
    sweep = planned(path)
    file = sweep.trials[0].path(sweep.folder)
    file.parent.mkdir(parents=True)
    file.write_text('{"state": "done"}', encoding="utf-8")
    with pytest.raises(BadInput, match="is not the result of a trial"):
        read_result(sweep.trials[0], sweep.folder)
    with pytest.raises(BadInput, match="no results table"):
        read_table(path)
    assert read_table(path.parent / "nothing.json") == {}


def test_the_tables_of_the_repository_are_read():
    folder = Path(__file__).resolve().parents[2] / "results" / "tuning"
    tables = [read_table(file) for file in sorted(folder.glob("*.json"))]
    assert len(tables) > 10
    for table in tables:
        for entry in table.values():
            if not entry["trials"]:  # an arm in which nothing of the grid has an effect
                assert entry["best"] is None and entry["without_effect"]
                continue
            assert entry["best"]["loss"] == min(row["loss"] for row in entry["trials"] if "loss" in row)


# ---- the recipe's tuning block
def block(path: Path, overrides=(), arms=None, losses=LOSSES, before=None) -> dict:
    sweep = planned(path, overrides=overrides, arms=arms)
    table = (before or {}) | table_of(sweep, ended(sweep, losses))
    own = load_recipe(path)
    return tuning_of(own, own.seed, table, sweep)


def test_the_tuning_block_says_what_was_tuned_on_what(path):
    assert block(path) == {
        "grid": {"learning_rate": [1e-3, 1e-2], "head_learning_rate": [1e-2, 3e-2]}, "trials": 4, "equal": True,
        "on": "lowest validation loss of the head that predicts after experiences 1 to 2 of 3, mean over their "
        "validation rows, seed 0",
        "without_effect": {
            "frozen": ["learning_rate"], "frozen+ridge": ["learning_rate", "head_learning_rate"]
        },
        "failed": {"lora": 1},
    }  # fmt: skip


def test_what_differs_from_the_recipe_is_declared(path):
    found = block(path, ["seed=3", "stream.rows_per_class=4"])
    assert found["on"].endswith("seed 3 (the recipe has 0); typed over the recipe: stream.rows_per_class=4")


def test_arms_count_as_equal_only_where_all_had_the_same_chance(path):
    alone = block(path, arms=["lora"])
    assert alone["equal"] is False and alone["arms"] == ["lora"]
    sweep = planned(path, arms=["frozen", "frozen+ridge"])
    before = table_of(sweep, ended(sweep, LOSSES))
    assert block(path, arms=["lora"], before=before)["equal"] is True
    for key in SAME:
        assert (
            block(path, arms=["lora"], before=before | {"frozen": {**before["frozen"], key: "other"}})["equal"] is False
        )
    other = planned(path, overrides=["seed=1"], arms=["frozen", "frozen+ridge"])
    before = table_of(other, ended(other, LOSSES))
    assert block(path, arms=["lora"], before=before)["equal"] is False


# ---- writing
def written(path: Path, sweep: Sweep, losses=LOSSES, copy=None) -> str:
    results = ended(sweep, losses)
    table, own = table_of(sweep, results), load_recipe(path)
    target = target_of(path, copy)
    text = new_text(*target, sweep, best_trials(sweep, results), tuning_of(own, 0, table, sweep))
    target[0].write_text(text, encoding="utf-8")
    return text


def test_the_best_values_go_into_the_users_recipe_and_comments_stay(path):
    before = path.read_text(encoding="utf-8")
    text = written(path, planned(path))
    assert [line for line in before.splitlines() if "#" in line and line not in text] == []
    assert "  lora: {training: {learning_rate: 1e-3, head_learning_rate: 3e-2}}" in text
    assert "    training: {head_learning_rate: 3e-2}\n" in text
    assert "  source: by hand\n" in text  # not a sweep's own
    recipe = load_recipe(path)
    assert recipe.tuning["equal"] is True and recipe.tuning["trials"] == 4
    assert recipe.with_arm("lora").training.head_learning_rate == 3e-2
    assert load_recipe(path).with_arm("frozen").training.learning_rate == 1e-3
    again = written(path, planned(path))
    assert again == text  # a second time changes nothing


def test_settings_of_plug_ins_are_written_where_they_stand(path):
    sweep = planned(path, "method.lora.rank=2,4", "head.ridge.features=16,32")
    text = written(path, sweep, {"lora": [0.4, 0.3], "frozen": [], "frozen+ridge": [0.1, 0.2]})
    assert "  lora: {method: {lora: {rank: 4}}}" in text and "head: {ridge: {features: 16}}" in text
    assert "method: {lora: {rank: 2}}\n" in text  # the recipe's own stays


def test_a_recipe_without_arms_takes_the_values_itself(tmp_path):
    path = write_recipe(tmp_path, RECIPE[: RECIPE.index("arms:")])
    text = written(path, planned(path), {"lora": [0.4, 0.5, 0.3, 0.5]})
    assert (
        "training: {learning_rate: 1e-2, per_device_train_batch_size: 4, num_threads: 1, head_learning_rate: 1e-2}"
        in text
    )


def test_recipes_of_the_package_are_not_written(tmp_path):
    with pytest.raises(BadInput, match="belongs to the package; name a file of your own with --copy"):
        target_of("clinc150", None)
    path, text = target_of("clinc150", tmp_path / "mine.yaml")
    assert path == tmp_path / "mine.yaml" and "name: clinc150" in text and not path.exists()
    path.write_text("x: 1\n", encoding="utf-8")
    with pytest.raises(BadInput, match="is there already"):
        target_of("clinc150", path)
    with pytest.raises(BadInput, match="end it with .yaml"):
        target_of("clinc150", tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arms": ["l2_anchor"]}, "--write: l2_anchor is no arm of the recipe"),
        ({"arms": ["lora"], "overrides": ["head=ridge"]}, r"--write: lora\+ridge is no arm of the recipe"),
    ],
)
def test_an_arm_that_does_not_stand_in_the_file_cannot_be_written(path, options, words):
    sweep = planned(path, "learning_rate=1e-3", **options)
    with pytest.raises(BadInput, match=words):
        new_text(*target_of(path, None), sweep, {sweep.plans[0].arm: sweep.trials[0]}, {})


def test_a_recipe_that_would_not_mean_the_winner_is_refused(path):
    text = path.read_text(encoding="utf-8").replace("arms:", "seed: 0\narms:")
    path.write_text(text, encoding="utf-8")
    sweep = planned(path)
    results = ended(sweep, LOSSES)
    changed = text.replace("seed: 0", "seed: 5")
    with pytest.raises(BadInput, match="would not give what lora was tried with"):
        new_text(path, changed, sweep, best_trials(sweep, results), {"trials": 4})
