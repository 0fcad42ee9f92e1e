"""Recipes: layers of settings, dotted overrides, arms, and every check that comes before a model is loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure import recipe as recipes
from perdure import yamltext
from perdure.config import MethodConfig
from perdure.errors import BadInput, ProtocolRefused
from perdure.methods import Method, register
from perdure.recipe import annotated_yaml, load_recipe, make_recipe, recipe_hash, resolved_yaml, source_of
from perdure.registry import METHODS
from perdure.streams import build_stream

BASE = """
model: {scratch: {family: bert, layers: 1, width: 16, heads: 2}}
stream: {source: stdlib, experiences: 5}
method: lora
head: cosine
training: {learning_rate: 5e-4, epochs: 2}
protocol: {rehearsal: 50, passes: 2}
arms:
  er:
    method: {er: {budget: 40}}
    training: {learning_rate: 2e-3}
  wide: {method: {lora: {rank: 32}}, head: ridge, note: more rank}
tuning: {grid: {learning_rate: [1e-3, 2e-3]}, trials: 2, on: validation rows of the first experience}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(BASE, encoding="utf-8")
    return file


def refused(path: Path, *overrides: str, error=BadInput, **more) -> str:
    with pytest.raises(error) as caught:
        load_recipe(path, overrides, **more)
    return str(caught.value)


# ---- YAML
def test_yaml_reads_words_and_numbers_as_people_mean_them():
    text = "on: 1e-3\noff: no\nb: 1E5\nc: 010\nd: 1_000\ne: 12:30\nf: true\ng: ~\nh: .inf\ni: -2.5\nj: 1.\n"
    expected = {"on": 1e-3, "off": "no", "b": 1e5, "c": 10, "d": 1000, "e": "12:30", "f": True, "g": None}
    assert yamltext.load(text, "x") == expected | {"h": float("inf"), "i": -2.5, "j": 1.0}


def test_yaml_errors_name_place_and_reason():
    with pytest.raises(BadInput, match=r"mine, line 2, column 1: .*'a' stands here twice"):
        yamltext.load("a: 1\na: 2\n", "mine")
    with pytest.raises(BadInput, match=r"mine, line 2"):
        yamltext.load("a: [1,\nb: }", "mine")
    with pytest.raises(BadInput):
        yamltext.load("a: !!python/object/apply:os.system [ls]", "mine")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_yaml_gives_back_what_was_dumped(value):
    assert yamltext.load(yamltext.dump(value), "x") == value
    assert yamltext.load(yamltext.inline(value), "x") == value
    assert "\n" not in yamltext.inline(value)


# ---- layers
def test_a_recipe_is_complete_and_says_where_each_setting_comes_from(path):
    recipe = load_recipe(path, ["training.epochs=1", "seed=4"])
    assert recipe.name == "mine" and recipe.seed == 4
    assert recipe.training.learning_rate == 5e-4 and recipe.training.epochs == 1
    assert recipe.method[0]["lora"]["rank"] == 8 and "cosine" in recipe.head
    expected = {
        "training.learning_rate": "recipe mine",
        "training.epochs": "command line",
        "training.optimizer": "default",
        "method.lora.rank": "default",
        "method.lora": "recipe mine",
        "seed": "command line",
        "stream.experiences": "recipe mine",
        "protocol.mask": "default",
    }
    assert {key: source_of(recipe, key) for key in expected} == expected


def test_an_arm_brings_its_tuned_values_and_what_is_typed_wins(path):
    recipe = load_recipe(path, ["method=er"])
    assert list(recipe.method[0]) == ["er"] and recipe.method[0]["er"]["budget"] == 40
    assert recipe.training.learning_rate == 2e-3 and recipe.training.epochs == 2 and recipe.label == "er"
    assert source_of(recipe, "method.er.budget") == source_of(recipe, "training.learning_rate") == "arm er"
    typed = load_recipe(path, ["method.er.budget=20", "method=er", "training.learning_rate=1e-2"])
    assert typed.method[0]["er"]["budget"] == 20 and typed.training.learning_rate == 1e-2
    assert source_of(typed, "method.er.budget") == "command line"


def test_an_alias_finds_the_arm(path):
    assert load_recipe(path, ["method=replay"]).label == "er"
    assert load_recipe(path, ["method=replay"]).training.learning_rate == 2e-3


def test_a_method_without_an_arm_keeps_the_other_settings(path):
    recipe = load_recipe(path, ["method=linear_probe"])
    assert recipe.method == [{"linear_probe": {}}] and recipe.training.learning_rate == 5e-4
    assert recipe.label == "linear_probe" and recipe.output_dir == "runs/mine/linear_probe/seed-0"


def test_arms_with_another_head(path):
    assert "ridge" in load_recipe(path, arm="linear_probe+ridge").head
    er = load_recipe(path, arm="er+linear")
    assert "linear" in er.head and er.training.learning_rate == 2e-3 and er.label == "er+linear"
    typed = load_recipe(path, ["method=er", "head=ridge", "head.ridge.features=64"])
    assert typed.head["ridge"]["features"] == 64
    assert typed.output_dir == "runs/mine/er+ridge/seed-0"
    assert "no_head" in refused(path, arm="er+no_head")


def test_a_preset_brings_methods_and_head(path):
    recipe = load_recipe(path, ["method=ranpac", "head.ridge.features=64"])
    assert recipe.method[0]["lora"]["first_only"] is True and recipe.head["ridge"]["features"] == 64
    assert recipe.label == "ranpac" and recipe.output_dir == "runs/mine/ranpac/seed-0"
    assert recipe.training.learning_rate == 5e-4 and load_recipe(path, arm="ranpac").label == "ranpac"
    own = yamltext.load(Path(path).read_text(), "mine") | {"method": "ranpac"}
    assert "ridge" in make_recipe({key: value for key, value in own.items() if key != "head"}).head
    with pytest.raises(BadInput, match="head: the preset ranpac brings its own"):
        make_recipe(own | {"head": "cosine"})
    assert "did you mean ranpac?" in refused(path, "method=ranpak")


@pytest.mark.parametrize(("name", "method", "head"), [
    ("simple_cil", "linear_probe", "ncm"), ("slda", "linear_probe", "slda"), ("slca", "finetune", "slca"),
])  # fmt: skip
def test_presets_are_complete_arms(path, name, method, head):
    recipe = load_recipe(path, [f"method={name}"])
    assert list(recipe.method[0]) == [method] and list(recipe.head) == [head] and recipe.label == name
    if name == "slca":
        assert recipe.training.head_learning_rate == 100 * recipe.training.learning_rate
        faster = load_recipe(path, ["method=slca", "training.learning_rate=3e-5", "head.slca.epochs=2"])
        assert faster.training.learning_rate == 3e-5 and faster.head["slca"]["epochs"] == 2


def test_corrections_that_do_not_go_with_the_methods_are_refused_before_any_work(path):
    moved = ["head=ncm", "head.ncm.recentre={}"]
    assert "head.ncm.recentre: corrects for features that move" in refused(path, "method=linear_probe", *moved)
    assert "add er" in refused(path, "method=lora", "head=ridge", "head.ridge.refresh=true")
    whole = load_recipe(path, ["method=finetune", "head=ridge", "head.ridge.recentre.sigma=0.2"])
    assert whole.head["ridge"]["recentre"] == {"sigma": 0.2, "rows": 2000}


def test_lists_of_methods_and_settings_inside_them(path):
    recipe = load_recipe(
        path, ["method=[{lora: {rank: 4}}, {er: {budget: 10}}]", "method.lora.alpha=4", "method.er.per_step=2"]
    )
    assert [next(iter(item)) for item in recipe.method] == ["lora", "er"]
    assert recipe.method[0]["lora"]["alpha"] == 4 and recipe.method[1]["er"]["per_step"] == 2
    assert recipe.label == "lora+er"
    protected = load_recipe(path, ["method.lora.protect.inputs=.9"])
    assert protected.method[0]["lora"]["protect"] == {"inputs": 0.9}
    whole = load_recipe(path, ["method.lora={rank: 3}"])
    assert whole.method[0]["lora"]["rank"] == 3 and source_of(whole, "method.lora.rank") == "command line"


def test_blocks_and_scratch_models_are_reached_by_dots(path):
    recipe = load_recipe(
        path, ["model.scratch.layers=3", "objective.classification.max_length=16", "protocol.max_forgetting=.5"]
    )
    assert recipe.model.scratch.layers == 3 and recipe.objective["classification"]["max_length"] == 16
    assert recipe.protocol.max_forgetting == 0.5
    assert source_of(recipe, "model.scratch.layers") == "command line"


def test_with_arm_resolves_anew_and_keeps_what_was_typed(path):
    recipe = load_recipe(path, ["training.epochs=1", "method=er"])
    wide = recipe.with_arm("wide", seed=3)
    assert wide.label == "wide" and wide.seed == 3 and wide.training.epochs == 1
    assert wide.training.learning_rate == 5e-4 and "ridge" in wide.head
    assert wide.with_arm("er").training.learning_rate == 2e-3
    plain = recipes.Recipe(**yamltext.load(BASE, "x"))
    assert plain.with_arm("er").training.learning_rate == 2e-3


def test_the_resolved_text_reads_back_to_the_same_run(path, tmp_path):
    recipe = load_recipe(path, ["method=er", "seed=2"])
    for number, text in enumerate((resolved_yaml(recipe), annotated_yaml(recipe))):
        copied = tmp_path / f"copy{number}.yaml"
        copied.write_text(text, encoding="utf-8")
        again = load_recipe(copied)
        assert recipe_hash(again) == recipe_hash(recipe) and resolved_yaml(again) == resolved_yaml(recipe)
    assert "arms" not in yamltext.load(resolved_yaml(recipe), "x")


def test_the_hash_follows_what_is_computed_and_nothing_else(path):
    recipe = load_recipe(path)
    same = [["name=other"], ["description=text"], ["output_dir=elsewhere"], ["tuning={}"], ["method.lora.rank=8"]]
    assert {recipe_hash(load_recipe(path, each)) for each in same} == {recipe_hash(recipe)}
    other = [["seed=1"], ["method.lora.rank=9"], ["head=linear"], ["stream.experiences=4"], ["training.epochs=1"]]
    assert len({recipe_hash(load_recipe(path, each)) for each in [*other, []]}) == 6


def test_resolving_changes_nothing_that_was_given(path):
    base = yamltext.load(BASE, "x")
    before = copy.deepcopy(base)
    make_recipe(base, ["method=er", "method.er.budget=7", "training.epochs=1"])
    assert base == before


def test_whole_numbers_stand_for_floats_and_words_for_what_takes_words(path):
    typed = ["training.weight_decay=1", "stream.class_order=seed", "stream.experiences=B0-Inc2", "training.bf16=true"]
    recipe = load_recipe(path, typed)
    assert recipe.training.weight_decay == 1.0 and recipe.training.bf16 is True
    assert recipe.stream.class_order == "seed" and recipe.stream.experiences == "B0-Inc2"


def test_a_name_is_one_folder_below_the_runs(path):
    for name, folder in (("..", "run"), ("../../up", "-..-up"), (".hidden", "hidden"), ("a/b", "a-b")):
        assert load_recipe(path, [f"name={name}"]).output_dir == f"runs/{folder}/lora/seed-0"


def test_a_classifier_without_a_head_gets_the_cosine_head(path):
    recipe = load_recipe(path, ["head=null"])
    assert list(recipe.head) == ["cosine"] and source_of(recipe, "head.cosine") == "default"


# ---- refusals: the field, what was found, what to do
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.learning_rat=1"], ["training.learning_rat", "unknown key", "'learning_rate'"]),
        (["trainin.epochs=1"], ["trainin", "unknown key", "'training'"]),
        (["training.epochs=many"], ["training.epochs", "'many'"]),
        (["training.learning_rate=-1"], ["training.learning_rate", "-1"]),
        (["protocol.mask=old"], ["protocol.mask", "'old'", "'seen'"]),
        (["method=morram"], ["method", "'morram'", "moram"]),
        (["head=cosin"], ["head", "'cosin'", "cosine"]),
        (["objective=regression"], ["objective", "'regression'"]),
        (["method.lora.rnk=2"], ["method.lora.rnk", "unknown key", "'rank'"]),
        (["method.lora.rank=two"], ["method.lora.rank", "'two'"]),
        (["method.er.budget=2"], ["method.er", "lora", "method=er"]),
        (["head.ridge.features=2"], ["head.ridge", "cosine", "head=ridge"]),
        (["method=[]"], ["method", "empty"]),
        (["method=[lora, lora]"], ["method", "lora", "2 times"]),
        (["head=[cosine, linear]"], ["head", "cosine, linear", "keep one"]),
        (["objective=causal_lm", "model.scratch.family=gpt2"], ["head", "cosine", "causal_lm"]),
        (["objective=causal_lm", "model.scratch.family=gpt2", "head=ridge"], ["head", "ridge", "causal_lm"]),
        (["model.scratch.family=rnn"], ["model.scratch.family", "'rnn'", "'bert'"]),
        (["model.scratch.width=17"], ["model.scratch", "width 17", "heads 2"]),
        (["model={folder: x}"], ["model.folder", "unknown key"]),
        (["model=minilm", "model.scratch.layers=2"], ["model.scratch.layers", "'minilm'"]),
        (["stream.scenario=any"], ["stream.scenario", "'any'"]),
        (["stream.experienses=3"], ["stream.experienses", "'experiences'"]),
        (["seed=-1"], ["seed", "-1"]),
        (["seed"], ["'seed'", "key=value"]),
        (["seed="], ["seed", "seed=null"]),
        (["a..b=1"], ["key=value"]),
        (["training=[1]"], ["training", "[1]"]),
        (["seed={a"], ["seed"]),
        (["arms.er.training={learning_rat: 1}"], ["arms.er.training", "'learning_rat'", "'learning_rate'"]),
        (["arms.er.protocol={passes: 9}"], ["arms.er.protocol", "unknown key"]),
        (["arms.er.method=morram"], ["arms.er.method", "'morram'", "moram"]),
        (["arms.wide.method={lora: {rnk: 2}}"], ["arms.wide.method.lora.rnk", "unknown key", "'rank'"]),
        (["arms.wide.head=rigde"], ["arms.wide.head", "'rigde'", "ridge"]),
        (["tuning.equal=yes"], ["tuning.equal", "'yes'", "true"]),
        (["stream.experiences=null"], ["stream.experiences: needs a number"]),
        (["stream.source={path: x, tset: y}"], ["stream.source.tset: unknown key"]),
        (["stream.block_chars=3"], ["stream.text_unit, block_chars, max_chars: need plain text"]),
        (["training.learning_rate=true"], ["training.learning_rate", "number", "True"]),
        (["training.epochs='3'"], ["training.epochs", "integer", "'3'"]),
        (["training.learning_rate='1e-3'"], ["training.learning_rate", "number", "'1e-3'"]),
        (["training.bf16='true'"], ["training.bf16", "boolean", "'true'"]),
        (["seed=true"], ["seed", "integer", "True"]),
        (["seed='1'"], ["seed", "integer", "'1'"]),
        (["method.lora.rank=true"], ["method.lora.rank", "integer", "True"]),
        (["method.lora.protect={inputs: true}"], ["method.lora.protect.inputs", "number", "True"]),
        (["method=moram", "method.moram.layers=[0, true]"], ["method.moram.layers", "integer", "True"]),
        (["stream.rows_per_class='5'"], ["stream.rows_per_class", "integer", "'5'"]),
        (["stream.max_chars={train: '5'}"], ["stream.max_chars", "integer", "'5'"]),
        (["model.scratch.layers=true"], ["model.scratch.layers", "integer", "True"]),
        (
            ["stream.scenario=boundary_free", "stream.experience_rows=5"],
            ["protocol.boundaries", "train", "boundary_free", "none"],
        ),
        (["stream.scenario=online", "stream.experience_rows=5"], ["training.epochs", "2", "online"]),
    ],
)
def test_bad_settings_are_named_before_anything_is_loaded(path, overrides, words):
    message = refused(path, *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.epochs=3"], ["training.epochs", "3", "2 pass"]),
        (["method=er", "method.er.budget=60"], ["protocol.rehearsal", "50", "60"]),
        (["protocol.rehearsal=0", "method=er"], ["protocol.rehearsal", "0", "40"]),
        (["method=wants_all_tasks"], ["protocol.task_id", "none"]),
        (["method=wants_all_tasks", "protocol.task_id=test", "protocol.boundaries=none"], ["protocol.boundaries"]),
    ],
)
def test_what_the_protocol_does_not_grant_is_refused(path, own_methods, overrides, words):
    message = refused(path, *overrides, error=ProtocolRefused)
    assert all(word in message for word in words), message
    assert ProtocolRefused.exit_code == 65


@pytest.fixture
def own_methods():
    """Two methods that own the prediction, one of which needs task ids; taken out again afterwards."""

    @register("wants_all_tasks")
    class WantsAll(Method):
        """Needs the task."""

        needs = frozenset({"task_id", "boundaries"})

        def predict(self, batch, forward):
            return forward(batch)

    @register("other_owner")
    class Other(Method):
        """Owns the prediction too."""

        Config = MethodConfig

        def predict(self, batch, forward):
            return forward(batch)

    yield
    for name in ("wants_all_tasks", "other_owner"):
        del METHODS._classes[name]


def test_two_owners_of_the_prediction(path, own_methods):
    message = refused(path, "method=[wants_all_tasks, other_owner]", "protocol.task_id=test")
    assert "wants_all_tasks and other_owner both own the predict" in message
    assert load_recipe(path, ["method=other_owner"]).label == "other_owner"


def test_a_causal_language_model_has_no_head(path):
    recipe = load_recipe(path, ["objective=causal_lm", "model.scratch.family=gpt2", "head=null"])
    assert recipe.head is None and list(recipe.objective) == ["causal_lm"]


# ---- files
def test_files_that_are_no_recipe(tmp_path):
    assert "no file" in refused(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"name: \xff\n")
    assert "not UTF-8" in refused(bad)
    bad.write_text("- a\n- b\n")
    assert "holds list" in refused(bad)
    bad.write_text("1: a\n")
    assert "1" in refused(bad)
    bad.write_text("method: lora\n")
    assert "model: is missing" in refused(bad) and "stream: is missing" in refused(bad)


def test_names_are_found_with_and_without_their_area():
    assert load_recipe("clinc150") == load_recipe("text/clinc150")
    assert "did you mean clinc150 or clinc150-long?" in refused(Path("clinc15"))
    assert "did you mean text/clinc150 or text/clinc150-long?" in refused(Path("text/clinc15"))


def test_a_near_source_is_suggested_once():
    with pytest.raises(BadInput, match=r"did you mean clinc150\?"):
        build_stream({"source": "clinc15", "experiences": 2})


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_of_the_package_is_valid_with_every_arm(name):
    recipe = load_recipe(name)
    text = recipes.find_recipe(name).read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("# command:", "# hardware:", "# time:", "# expected:"):
        assert any(line.startswith(word) for line in head), f"{name} lacks {word}"
    assert recipe.arms and recipe.description
    hashes = set()
    for arm in recipe.arms:
        each = recipe.with_arm(arm)
        assert each.label == arm and each.protocol == recipe.protocol and each.stream == recipe.stream
        hashes.add(recipe_hash(each))
    assert len(hashes) == len(recipe.arms)
