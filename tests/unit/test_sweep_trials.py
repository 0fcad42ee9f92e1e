"""Trials: what they learn and are judged on, what happens when one fails, and what a second call does."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sweeps import RECIPE, Here, write_recipe

from perdure import yamltext
from perdure.errors import CannotWrite, NonFiniteLoss, PerdureError, ProtocolRefused
from perdure.learner import Learner
from perdure.methods import Method, register
from perdure.models import load_model
from perdure.progress import Progress
from perdure.recipe import Recipe, load_recipe
from perdure.registry import METHODS
from perdure.state import RunLock
from perdure.streams import build_stream
from perdure.streams.guarded import FirstExperiences
from perdure.sweep import cluster, command, training, worker
from perdure.sweep.command import Request
from perdure.sweep.driver import run_sweep
from perdure.sweep.trials import pretraining_of


@pytest.fixture
def path(tmp_path) -> Path:
    return write_recipe(tmp_path)


def sweep(path: Path, *grid: str, runner: Here | None = None, **options) -> tuple[str, dict]:
    """What is printed and the results table."""
    options = {"experiences": 2, "output_dir": str(path.parent / "trials"), **options}
    request = Request(str(path), grid=grid, **options)
    console = Console(file=io.StringIO(), width=200)
    try:
        table = command.sweep(request, console, progress=False, runner=runner or Here())
    finally:
        printed = console.file.getvalue()
    return printed, json.loads(table.read_text(encoding="utf-8"))


def seen(recipe: Recipe, *positions: int) -> FirstExperiences:
    return FirstExperiences(build_stream(recipe.stream, recipe.seed), positions)


def by_hand(recipe: Recipe, *positions: int) -> tuple[Learner, list]:
    """A learner that has learnt these experiences of the whole stream."""
    stream = build_stream(recipe.stream, recipe.seed)
    model, tokenizer, _ = load_model(recipe.model, next(iter(recipe.objective)), seed=recipe.seed)
    learner = Learner(
        model, tokenizer, method=recipe.method, head=recipe.head, objective=recipe.objective,
        training=recipe.training, protocol=recipe.protocol, seed=recipe.seed,
    )  # fmt: skip
    experiences = [stream.experience(position) for position in positions]
    for experience in experiences:
        learner.learn(experience)
    return learner, experiences


# ---- one trial
@pytest.mark.parametrize("arm", ["lora", "frozen", "frozen+ridge"])
def test_a_trial_is_a_run_over_the_first_experiences_judged_on_their_validation_rows(path, arm):
    recipe = load_recipe(path).with_arm(arm)
    found = training.train_trial(recipe, seen(recipe, 0, 1), {})
    learner, experiences = by_hand(recipe, 0, 1)
    scores = learner.evaluate(experiences, split="valid")
    assert found["score"] == sum(scores.values()) / 2 and found["metric"] == "accuracy"
    losses = []
    for experience in experiences:
        features = learner.features(experience.valid)
        logits = learner.head.logits(features).double()
        labels = torch.tensor([learner.labels[row["label"]] for row in experience.valid])
        if arm.endswith("ridge"):
            losses.append((logits - torch.nn.functional.one_hot(labels, 4)).square().mean().item())
        else:
            losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_what_is_learnt_last_is_the_end_of_a_trial(path):
    """So that a method which learns at the end alone (`joint`) learns something."""
    recipe = load_recipe(path, ["method=[lora,joint]"])
    assert training.train_trial(recipe, seen(recipe, 0), {})["score"] > 0.4
    last = by_hand(recipe, 0)[0]  # of the whole stream the first experience is not the end
    assert last.counters.steps == 0


def test_passes_that_are_listed_are_those_of_the_experience(path):
    recipe = load_recipe(path, ["training.epochs=[1,3,2]", "protocol.passes=3"])
    steps = []
    training.train_trial(recipe, seen(recipe, 1, 2), {}, lambda learner, _: steps.append(learner.position.experience))
    assert steps == [0] * 3 * 4 + [1] * 2 * 4  # four steps a pass


@pytest.mark.parametrize(("typed", "known"), [([], None), (["protocol.mask=all"], 6)])
def test_a_trial_knows_of_later_classes_what_a_run_knows(path, typed, known):
    recipe, declared = load_recipe(path, typed), []
    training.train_trial(recipe, seen(recipe, 0), {}, lambda learner, _: declared.append(learner.declared))
    assert {None if each is None else len(each) for each in declared} == {known}


def test_a_loss_that_is_not_finite_is_said(path, monkeypatch):
    recipe = load_recipe(path)
    monkeypatch.setattr(training, "validation_loss", lambda *_: math.nan)
    with pytest.raises(NonFiniteLoss, match="validation loss is nan"):
        training.train_trial(recipe, seen(recipe, 0), {})


LANGUAGE = (
    RECIPE[: RECIPE.index("  frozen:")]
    .replace("family: bert", "family: gpt2")
    .replace("classification: {{max_length", "causal_lm: {{block_size")
    .replace("experiences: 3", "scenario: domain_incremental\n  domain_field: label")
    .replace("lora: {{}}", "lora: {{method: {{lora: {{rank: 2, pretrain: {{learning_rate: 2e-3}}}}}}}}")
)


def test_a_shared_pretraining_changes_no_result(tmp_path):
    path = write_recipe(tmp_path, LANGUAGE)
    recipes = [load_recipe(path, [f"training.learning_rate={rate}"], arm="lora") for rate in (1e-3, 1e-1)]
    assert pretraining_of(recipes[0]) == pretraining_of(recipes[1]) is not None
    begun, steps, stream = {}, [0, 0], seen(recipes[0], 0, 1)

    def shared(number: int) -> float:
        def count(*_) -> None:
            steps[number] += 1

        return training.train_trial(recipes[number], stream, begun, count)["loss"]

    found = [shared(0), shared(1)]
    assert found == [training.train_trial(each, stream, {})["loss"] for each in recipes] and found[0] != found[1]
    assert steps == [4, 2]  # two steps an experience, the first one once


# ---- cheats
def test_a_trial_that_is_judged_on_test_rows_is_caught_and_ends_the_sweep(path, monkeypatch):
    monkeypatch.setattr(training, "validation_loss", lambda learner, each: len(each.test))
    with pytest.raises(ProtocolRefused, match=r"test rows of experience 0 .*: tuning may not see them"):
        sweep(path)
    assert not list((path.parent / "trials").glob("lora/*.json")) and not (path.parent / "trials/sweep.json").exists()


def test_a_score_on_test_rows_is_caught(path, monkeypatch):
    real = Learner.evaluate
    monkeypatch.setattr(Learner, "evaluate", lambda self, experiences, split: real(self, experiences, "test"))
    with pytest.raises(ProtocolRefused, match="test rows of experience 0"):
        sweep(path)


def test_a_trial_that_learns_a_later_experience_is_caught(path, monkeypatch):
    real = training._learn

    def peeks(learner, experiences, key, begun, on_step):
        real(learner, [*experiences, stream.experience(2)], key, begun, on_step)

    stream = seen(load_recipe(path), 0, 1)
    monkeypatch.setattr(training, "_learn", peeks)
    with pytest.raises(ProtocolRefused, match="experience 2 .*tuning may not see it, but 0, 1 alone"):
        sweep(path)


# ---- whole sweeps
def test_a_sweep_tries_every_point_of_every_arm_and_a_second_call_repeats_none(path, monkeypatch):
    printed, table = sweep(path)
    assert [len(table[arm]["trials"]) for arm in ("lora", "frozen", "frozen+ridge")] == [4, 2, 0]
    assert len({row["loss"] for row in table["lora"]["trials"]}) == 4
    assert table["lora"]["best"] == min(table["lora"]["trials"], key=lambda row: row["loss"])
    assert "2 of 4" in printed and "nothing to tune" in printed and "experiences 1, 2, seed 0" in printed
    assert not (path.parent / "trials/.jobs").exists()
    monkeypatch.setattr(training, "train_trial", None)
    runner = Here()
    assert sweep(path, runner=runner)[1] == table and runner.jobs == 0


def test_a_killed_sweep_goes_on_with_what_is_missing(path, monkeypatch):
    real, trained = training.train_trial, []

    def until(recipe, *rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(recipe.training.learning_rate)
        return real(recipe, *rest)

    monkeypatch.setattr(training, "train_trial", until)
    with pytest.raises(KeyboardInterrupt):
        sweep(path)
    assert len(list((path.parent / "trials").glob("[!.]*/*.json"))) == 3
    monkeypatch.setattr(training, "train_trial", lambda *all: trained.append(all[0]) or real(*all))
    assert len(sweep(path)[1]["frozen"]["trials"]) == 2 and len(trained) == 6


def test_a_folder_that_is_in_use_is_refused(path):
    with RunLock(path.parent / "trials"), pytest.raises(CannotWrite, match="trials"):
        sweep(path)


def test_a_trial_that_fails_stops_no_other_and_is_told(path, monkeypatch):
    real = training.train_trial

    def fails(recipe, *rest):
        if recipe.training.learning_rate == 1e-2 and "lora" in recipe.method[0]:
            raise NonFiniteLoss("loss is nan")
        if recipe.training.head_learning_rate == 1e-2:
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return real(recipe, *rest)

    monkeypatch.setattr(training, "train_trial", fails)
    printed, table = sweep(path)
    lora = table["lora"]["trials"]
    assert [row.get("failed") for row in lora] == [
        "OutOfMemoryError: CUDA out of memory", None, "loss is nan", "loss is nan"
    ]  # fmt: skip
    assert table["lora"]["best"] == lora[1] and "lora: 3 of 4 trials failed" in printed
    log = (path.parent / "trials/.jobs/process-1.log").read_text(encoding="utf-8")
    assert log.count("begun") == 6
    monkeypatch.setattr(training, "train_trial", real)
    again = sweep(path)[1]["lora"]["trials"]  # a loss that is not finite would come again, want of memory need not
    assert [row.get("failed") for row in again] == [None, None, "loss is nan", "loss is nan"] and again[1] == lora[1]


def test_an_arm_of_which_every_trial_failed_ends_the_command_after_all_is_written(path, monkeypatch):
    real = training.train_trial

    def fails(recipe, *rest):
        if "lora" in recipe.method[0]:
            raise NonFiniteLoss("loss is nan")
        return real(recipe, *rest)

    monkeypatch.setattr(training, "train_trial", fails)
    with pytest.raises(PerdureError, match=r"no trial of lora came to an end \(loss is nan\)"):
        sweep(path, write=True)
    recipe = load_recipe(path)
    assert recipe.tuning["failed"] == {"lora": 4} and recipe.arms["frozen"].training != {"head_learning_rate": 5e-2}


def test_a_process_that_dies_costs_the_trial_that_it_was_at_and_no_other(path):
    """Killed for want of memory, it can say nothing itself."""
    order = path.parent / "trials/.jobs/order.json"

    def dies(job) -> int | None:
        if job.name != "process-1":
            return None
        unit = json.loads(order.read_text(encoding="utf-8"))["units"][1]
        (order.parent / unit["claim"]).touch()
        key = worker.Trial.from_json(unit["trials"][0]).key
        job.log.write_text(f"begun {key}\n", encoding="utf-8")
        return -signal.SIGKILL

    runner = Here(dies)
    printed, table = sweep(path, runner=runner)
    assert [row.get("failed") for row in table["lora"]["trials"]] == [
        None, "the process ended with SIGKILL (out of memory?)", None, None
    ]  # fmt: skip
    assert runner.jobs == 3 and "1 of 4 trials failed" in printed
    assert not any("failed" in row for row in sweep(path)[1]["lora"]["trials"])


@pytest.mark.parametrize("code", [64, 1, -9])
def test_a_process_that_cannot_start_ends_the_sweep(path, code):
    def fails(job) -> int:
        job.log.write_text("perdure: --import: own.py is not a Python file\n", encoding="utf-8")
        return code

    runner = Here(fails)
    with pytest.raises(PerdureError, match="process-1.log says: --import: own.py is not") as caught:
        sweep(path, runner=runner)
    assert runner.jobs == 1 and caught.value.exit_code == (64 if code == 64 else 1)


def test_processes_share_the_trials_and_each_is_trained_once(path, monkeypatch):
    """A second process begins while the first is at its first trial."""
    real, trained = training.train_trial, []
    order = path.parent / "trials/.jobs/order.json"

    def meets(recipe, *rest):
        trained.append((str(recipe.method), recipe.training.learning_rate, recipe.training.head_learning_rate))
        if len(trained) == 1:
            worker.work(order)
        return real(recipe, *rest)

    monkeypatch.setattr(training, "train_trial", meets)
    sweep(path)
    assert len(trained) == len(set(trained)) == 6


def test_a_process_ends_once_the_sweep_that_started_it_is_gone(path, monkeypatch):
    parents = iter([1234] * 6 + [1] * 99)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(SystemExit) as end:
        sweep(path)
    assert end.value.code == 130 and not list((path.parent / "trials").glob("lora/*.json"))


def test_the_table_keeps_arms_of_earlier_calls(path):
    first = sweep(path, "head_learning_rate=1e-2", arms=["frozen"], table=str(path.parent / "all.json"))[1]
    both = sweep(path, "learning_rate=1e-3", arms=["lora"], table=str(path.parent / "all.json"))[1]
    assert list(both) == ["frozen", "lora"] and both["frozen"] == first["frozen"]


def test_a_random_search_is_written_with_its_seed(path):
    grid = ["learning_rate=1e-3..1e-1", "method.lora.rank=1..8"]
    _, table = sweep(path, *grid, arms=["lora"], random=3, search_seed=7, write=True)
    assert len(table["lora"]["trials"]) == 3 and table["lora"]["random"] == {"points": 3, "seed": 7}
    recipe = load_recipe(path)
    assert recipe.tuning["grid"] == {"learning_rate": "1e-3..0.1", "method.lora.rank": "1..8"}
    assert recipe.tuning["random"] == {"points": 3, "seed": 7} and recipe.tuning["equal"] is False
    best = table["lora"]["best"]
    assert recipe.arms["lora"].training == {"learning_rate": best["learning_rate"]}
    assert recipe.with_arm("lora").method[0]["lora"]["rank"] == best["method.lora.rank"]


def test_a_method_of_the_users_own_is_swept(path, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from perdure.methods import Method, register\n", encoding="utf-8")
    looked = []

    @register("peeping")
    class Peeping(Method):
        """Looks at all that it is given."""

        def before_experience(self, experience):
            looked.append((len(experience.train), len(experience.test), len(experience.valid)))

    try:
        _, table = sweep(path, "learning_rate=1e-3", arms=["peeping"], imports=(str(own),))
    finally:
        del METHODS._classes["peeping"]
    assert looked == [(16, 0, 0)] * 2 and table["peeping"]["best"]["loss"] > 0


def test_the_settings_of_the_run_reach_the_trial(path):
    """What the worker reads back is the recipe that was planned, typed settings included."""
    overrides = ("training.weight_decay=0.5", "seed=4", "stream.rows_per_class=5")
    printed, table = sweep(path, "learning_rate=1e-3", arms=["lora"], overrides=overrides)
    recipe = load_recipe(path, [*overrides, "training.learning_rate=1e-3"], arm="lora")
    assert table["lora"]["best"]["loss"] == training.train_trial(recipe, seen(recipe, 0, 1), {})["loss"]
    assert table["lora"]["seed"] == 4 and table["lora"]["typed"] == list(map(_plain, overrides))


def _plain(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={yamltext.inline(yamltext.load(value, key))}"


def test_progress_tells_each_trial(path):
    from perdure.sweep.driver import plan_sweep
    from perdure.sweep.space import space_of

    recipe = load_recipe(path, compared=True)
    planned = plan_sweep(recipe, space_of(recipe, ()), ["frozen"], experiences=1, folder=path.parent / "trials")
    console = Console(file=io.StringIO(), width=200)
    run_sweep(planned, Here(), Progress(console=console))
    told = console.file.getvalue()
    assert "[2/2] frozen head_learning_rate 3e-2: loss " in told
    console = Console(file=io.StringIO(), width=200)
    run_sweep(planned, Here(), Progress(console=console))
    assert "2 of 2 trials ended before" in console.file.getvalue()


def test_a_node_that_does_not_see_the_folder_of_a_sweep_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not see .*elsewhere.* all nodes share"):
        cluster.run_job(("-c", ""), "elsewhere/log", str(tmp_path), {})


def test_a_job_of_a_cluster_gets_its_environment_and_its_exit_code_comes_back(tmp_path):
    code = "import os, sys; print(os.environ['PERDURE_DATA'], os.environ['OMP_NUM_THREADS'], os.getcwd()); sys.exit(3)"
    assert cluster.run_job(("-c", code), "log", str(tmp_path), {"PERDURE_DATA": "here"}) == 3
    assert (tmp_path / "log").read_text().split() == ["here", "1", str(tmp_path)]
