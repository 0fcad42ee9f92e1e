"""`method: auto`: what is chosen, from what, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from perdure import auto, yamltext
from perdure.errors import BadInput, ProtocolRefused
from perdure.recipe import annotated_yaml, load_recipe, make_recipe

LEDGER = Path(__file__).parents[2] / "results" / "ledger.jsonl"
TEXT = {"scratch": {"family": "bert", "layers": 1, "width": 16, "heads": 2}}
IMAGES = {"scratch": {"family": "vit", "layers": 1, "width": 16, "heads": 2}}
ARMS = {
    "er": {"method": [{"lora": {"rank": 3}}, {"er": {"budget": 6}}], "training": {"learning_rate": 2e-3}, "note": "x"},
    "seta-oracle": {"method": {"seta": {"gate": "oracle"}}},
    "joint": {"method": [{"lora": {"rank": 3}}, "joint"]},
    "probe": {"method": "linear_probe", "head": "ridge"},
    "moram": {"method": {"moram": {"rank": 2}}, "training": {"learning_rate": 5e-4}},
}


def settings(**changes):
    made = {
        "name": "mine", "model": TEXT,
        "stream": {"source": "rows.jsonl", "scenario": "class_incremental", "experiences": 2},
        "objective": "classification", "protocol": {"rehearsal": 40, "task_id": "test"}, "arms": ARMS,
    }  # fmt: skip
    return {**made, **changes}


def row(folder, named, arm, valid, test=0.5, **changes):
    path = folder / f"{named}.yaml"
    changes.setdefault("stream", {"source": f"{named}.jsonl", "scenario": "class_incremental", "experiences": 2})
    path.write_text(yamltext.dump(settings(name=named, **changes)), encoding="utf-8")
    figures = {"validation_average": valid, "average_accuracy": test}
    metrics = {name: {"mean": value, "low": None, "high": None} for name, value in figures.items() if value is not None}
    facts = {"recipe": named, "method": arm, "head": None, "model": "m", "stream": "s", "seeds": [0, 1, 2]}
    return {**facts, "metrics": metrics, "run": [str(path)]}


@pytest.fixture
def offers(tmp_path):
    first = {"er": 0.9, "probe": 0.8, "moram": 0.7, "joint": 0.99, "seta-oracle": 0.98}
    table = {"one": first, "two": {"er": 0.5, "probe": 0.7, "moram": 0.75}}
    rows = [row(tmp_path, stream, arm, value) for stream, arms in table.items() for arm, value in arms.items()]
    rows.append(row(tmp_path, "one", "lora", None))  # from before runs scored their validation rows
    old = row(tmp_path, "one", "moram", 1.0) | {"recipe": "old"}
    rows.append({key: value for key, value in old.items() if key != "run"})
    return auto.extract(rows)


def test_the_best_on_validation_rows_of_all_streams_of_a_kind_comes_first(offers):
    assert [offer["arm"] for offer in offers] == ["probe", "moram", "er"]  # 0.75, 0.725, 0.7; bounds are no offers
    assert {offer["kind"] for offer in offers} == {"classification of text"}
    assert offers[0]["validation"] == {"one": 0.8, "two": 0.7} and [o["stores_rows"] for o in offers] == [0, 0, 1]
    choice = auto.choose(settings(), offers)
    assert choice.settings == {"method": "linear_probe", "head": "ridge"}
    assert choice.why == "auto: probe, best on validation rows of what is granted (one 80.0 %, two 70.0 %)"


def test_test_figures_decide_nothing(tmp_path):
    rows = [row(tmp_path, "one", "er", 0.6, test=0.1), row(tmp_path, "one", "probe", 0.5, test=0.9)]
    assert auto.extract(rows)[0]["arm"] == "er"


def test_an_illustration_of_one_seed_decides_nothing(tmp_path):
    rows = [row(tmp_path, "one", "er", 0.6), row(tmp_path, "one", "probe", 0.5)]
    rows.append(row(tmp_path, "long", "probe", 0.9) | {"seeds": [0]})
    assert auto.extract(rows)[0]["arm"] == "er"
    assert not auto.extract([one | {"seeds": [0, 1]} for one in rows])


def test_recipes_on_one_stream_are_one_stream(tmp_path):
    stream = {"source": "shared.jsonl", "scenario": "class_incremental", "experiences": 2}
    rows = [row(tmp_path, "one", "er", 0.6, stream=stream), row(tmp_path, "two", "moram", 0.7, stream=stream)]
    rows.append(row(tmp_path, "two", "probe", 0.5, stream=stream) | {"model": "another"})  # one arm of three: left out
    assert [(offer["arm"], offer["validation"]) for offer in auto.extract(rows)] == [
        ("moram", {"one": 0.7}), ("er", {"one": 0.6}),
    ]  # fmt: skip


def test_settings_are_those_of_the_stream_that_was_judged(tmp_path):
    other = {name: {**arm, "training": {"learning_rate": 7e-2}} for name, arm in ARMS.items()}
    rows = [row(tmp_path, "small", "moram", 0.9, arms=other)]  # of three arms one is too few to join
    rows += [row(tmp_path, "one", arm, value) for arm, value in {"er": 0.6, "probe": 0.5, "moram": 0.7}.items()]
    best = auto.extract(rows)[0]
    assert best["arm"] == "moram" and list(best["validation"]) == ["one"]
    assert best["settings"]["training"] == ARMS["moram"]["training"]


def test_a_stream_joins_where_half_of_the_arms_were_measured_on_it(tmp_path):
    rows = [row(tmp_path, "one", arm, 0.5) for arm in ("er", "probe", "moram")]
    rows.append(row(tmp_path, "small", "er", 0.1))
    assert {tuple(offer["validation"]) for offer in auto.extract(rows)} == {("one",)}
    rows += [row(tmp_path, "large", arm, value) for arm, value in (("er", 0.9), ("moram", 0.8))]
    offers = auto.extract(rows)
    assert [offer["arm"] for offer in offers] == ["er", "moram"] and list(offers[0]["validation"]) == ["one", "large"]


def test_arms_of_one_name_under_different_heads_are_different_arms(tmp_path):
    rows = [row(tmp_path, "one", "moram", 0.6), row(tmp_path, "one", "probe", 0.5)]
    rows += [row(tmp_path, "two", "moram", 0.9) | {"head": "ridge"}, row(tmp_path, "two", "probe", 0.5)]
    (only,) = auto.extract(rows)
    assert only["arm"] == "probe" and only["validation"] == {"one": 0.5, "two": 0.5}


def test_only_what_is_granted_is_taken_and_the_buffer_is_the_granted_one(tmp_path):
    offers = auto.extract([row(tmp_path, "one", "er", 0.9), row(tmp_path, "one", "moram", 0.8)])
    granted = auto.choose(settings(), offers).settings
    assert granted["method"][1] == {"er": {"budget": 40}} and "note" not in granted
    assert offers[0]["settings"]["method"][1]["er"]["budget"] == 6  # the offer itself stays
    none = auto.choose(settings(protocol={"rehearsal": 0}), offers)
    assert none.settings == {"method": {"moram": {"rank": 2}}, "training": {"learning_rate": 5e-4}}
    with pytest.raises(ProtocolRefused, match=r"method: auto finds nothing .*rehearsal"):
        auto.choose(settings(protocol={"rehearsal": 0}), offers[:1])


def test_kinds_are_kept_apart_and_another_scenario_is_said(tmp_path):
    rows = [row(tmp_path, "pictures", "probe", 0.9, model=IMAGES), row(tmp_path, "one", "moram", 0.3)]
    offers = auto.extract(rows)
    assert [offer["kind"] for offer in offers] == ["classification of images", "classification of text"]
    assert auto.choose(settings(model=IMAGES), offers).settings["head"] == "ridge"
    (tmp_path / "preprocessor_config.json").touch()
    assert auto.choose(settings(model=str(tmp_path)), offers).settings["head"] == "ridge"
    assert auto.choose(settings(model="google/vit-base-patch16-224"), offers).settings["head"] == "ridge"
    stream = {"source": ["a.jsonl", "b.jsonl"], "scenario": "domain_incremental"}
    assert auto.choose(settings(stream=stream), offers).why.endswith(
        "; measured on class_incremental (task known at test) streams, none was domain_incremental (task known at test)"
    )
    with pytest.raises(BadInput, match=r"no stream of instruction was; name a method .*classification of text"):
        auto.choose(settings(objective="instruction"), offers)


def test_what_was_measured_with_known_tasks_is_another_scenario(tmp_path):
    free = {"protocol": {"rehearsal": 40}}
    rows = [row(tmp_path, "known", "probe", 0.9), row(tmp_path, "free", "moram", 0.3, **free)]
    offers = auto.extract(rows)
    assert auto.choose(settings(), offers).settings["method"] == "linear_probe"
    choice = auto.choose(settings(**free), offers)
    assert choice.settings["method"] == {"moram": {"rank": 2}} and "none was" not in choice.why
    only = auto.choose(settings(**free), auto.extract(rows[:1]))
    assert only.why.endswith("on class_incremental (task known at test) streams, none was class_incremental")
    language = {"objective": "causal_lm", "model": {"scratch": {**TEXT["scratch"], "family": "gpt2"}}}
    (offer,) = auto.extract([row(tmp_path, "language", "er", 4.0, **language)])
    assert offer["scenario"] == "class_incremental"  # no classes compete there


def test_the_page_sets_the_choice_against_the_seed_papers_arms(tmp_path):
    table = {"one": {"probe": (0.9, 0.6), "moram": (0.8, 0.7)}, "two": {"probe": (0.7, 0.9), "moram": (0.6, 0.5)}}
    rows = [row(tmp_path, s, arm, *figures) for s, arms in table.items() for arm, figures in arms.items()]
    page = auto.page(auto.extract(rows))
    assert "| moram | 2 | 75.0 % | 60.0 % |" in page  # of auto (0.6 + 0.9) / 2
    assert "- without stored rows: `auto` takes **probe**, test 75.0 %" in page
    assert "- methods of the seed papers, test: moram 60.0 %" in page
    assert "over all streams" not in auto.page(auto.extract([row(tmp_path, "one", "probe", 0.5)]))


def test_controls_and_what_belongs_to_one_model_are_shown_and_not_offered(tmp_path):
    arms = {**ARMS, "ffn": {"method": {"finetune": {"parameters": "mlp"}}}, "all": {"method": "finetune"}}
    arms["chance"] = {"method": {"random_prune": {"rank": 4, "kept_rank": 2.0}}}
    figures = {"ffn": 0.9, "chance": 0.85, "moram": 0.8, "all": 0.7}
    offers = auto.extract([row(tmp_path, "one", arm, value, arms=arms) for arm, value in figures.items()])
    assert [offer["withheld"] for offer in offers] == ["made for the measured model", "a control", "", ""]
    assert auto.choose(settings(), offers).settings["method"] == {"moram": {"rank": 2}}
    assert "| ffn (made for the measured model, not offered) |" in auto.page(offers)
    assert "without stored rows: `auto` takes **moram**" in auto.page(offers)


def test_perplexities_are_averaged_by_their_logarithms_and_the_lowest_wins(tmp_path):
    language = {"objective": "causal_lm", "model": {"scratch": {**TEXT["scratch"], "family": "gpt2"}}}
    streams = {s: {"source": [f"{s}.jsonl", "b.jsonl"], "scenario": "domain_incremental"} for s in ("one", "two")}
    # By logarithms er has 6.0 and moram 6.2; the plain means are 6.5 and 6.2.
    table = {"one": {"er": 4.0, "moram": 6.2}, "two": {"er": 9.0, "moram": 6.2}}
    rows = [
        row(tmp_path, s, arm, value, **language, stream=streams[s])
        for s, arms in table.items()
        for arm, value in arms.items()
    ]
    assert [offer["arm"] for offer in auto.extract(rows)] == ["er", "moram"]
    assert auto.mean([4.0, 9.0]) == pytest.approx(6.0) and auto.mean([0.2, 0.4]) == pytest.approx(0.3)
    assert auto.mean([6.0, 5.9]) == pytest.approx(math.sqrt(35.4))


def test_a_recipe_takes_it_and_what_is_typed_wins(offers, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    table.write_text(json.dumps(sorted(offers, key=lambda offer: offer["arm"] != "er")), encoding="utf-8")
    monkeypatch.setattr(auto, "EXTRACT", table)
    recipe = make_recipe(settings(arms={}), ["method=auto", "method.er.per_step=2", "training.learning_rate=7e-3"])
    assert recipe.label == "auto" and recipe.choice.startswith("auto: er, best")
    assert recipe.method[1]["er"]["budget"] == 40 and recipe.method[1]["er"]["per_step"] == 2
    assert recipe.training.learning_rate == 7e-3
    assert annotated_yaml(recipe).startswith("# auto: er, best on validation rows")
    typed = make_recipe(settings(arms={}, method="auto"), ["protocol.rehearsal=0"])
    assert [name for item in typed.method for name in item] == ["linear_probe"]  # what is typed counts
    with pytest.raises(BadInput, match="head: auto brings its own"):
        make_recipe(settings(arms={}), ["method=auto+ridge"])
    path = tmp_path / "mine.yaml"
    path.write_text(yamltext.dump(settings()), encoding="utf-8")
    compared = load_recipe(path, ["protocol.rehearsal=7"], compared=True).with_arm("auto", seed=3)
    assert compared.label == "auto" and compared.method[1]["er"]["budget"] == 7
    assert make_recipe(settings(arms={}), ["method=lora"]).choice is None


def test_package_and_page_are_made_from_the_ledger(tmp_path, monkeypatch):
    made = tmp_path / "_auto.json"
    kept, page = auto.EXTRACT, LEDGER.parents[1] / "docs" / "auto.md"
    monkeypatch.setattr(auto, "EXTRACT", made)
    assert auto.main([str(tmp_path / "auto.md"), str(LEDGER)]) == 0
    assert made.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")
    assert (tmp_path / "auto.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    assert auto.main([]) == BadInput.exit_code
