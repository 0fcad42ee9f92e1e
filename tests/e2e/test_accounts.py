"""What a run counts beside its scores: it changes nothing, and it says what was spent."""

from __future__ import annotations

import html
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perdure.learner import Learner
from perdure.progress import Progress
from perdure.recipe import load_recipe
from perdure.report.html import render_run
from perdure.run import Run, learner_of, run_recipe
from perdure.run_accounts import Accounts

from . import tiny


def finished(folder: Path, arm: str, *overrides: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    recipe = load_recipe(str(tiny.write_arm(folder, arm)), [f"output_dir={folder / 'run'}", *overrides])
    return run_recipe(recipe, progress=False)


@contextmanager
def uncounted(learner: Any, batches: Any):
    yield


@pytest.mark.parametrize("arm", ["moram+er", "agem", "seta", "moram-clip"])
def test_counting_changes_nothing_else(arm, tmp_path, monkeypatch):
    counted = finished(tmp_path / "counted", arm)
    monkeypatch.setattr("perdure.metering.training_step", uncounted)
    monkeypatch.setattr("perdure.run.inference", lambda learner, experience: {})
    plain = finished(tmp_path / "plain", arm)
    own = {"train_flops_per_row", "train_flops_per_token", "step_peak_bytes"}
    own |= {"inference_flops_per_row", "inference_flops_per_token"}
    assert own & set(counted["cost"]) and not own & set(plain["cost"])
    for report in (counted, plain):
        report["cost"] = {name: value for name, value in report["cost"].items() if name not in own}
    assert tiny.without_times(counted) == tiny.without_times(plain)


def test_rehearsed_rows_are_a_cost_of_the_new_ones(tmp_path):
    plain, rehearsed = finished(tmp_path / "moram", "moram")["cost"], finished(tmp_path / "er", "moram+er")["cost"]
    # Four new rows a step, three rehearsed ones beside them.
    assert 1.5 < rehearsed["train_flops_per_row"] / plain["train_flops_per_row"] < 2.2
    assert rehearsed["train_flops_per_token"] > plain["train_flops_per_token"]
    assert plain["step_peak_bytes"] > 4 * plain["total_parameters"]


def test_bytes_and_classes_at_every_boundary(tmp_path):
    report = finished(tmp_path, "moram+er")
    kept = report["curves"]["stored_bytes"]
    assert len(kept) == 3 and kept[-1] == report["cost"]["stored_bytes"] and kept == sorted(kept)
    assert report["cost"]["growth_bytes"] == (kept[2] - kept[0]) / 2 > 0
    assert [row["rows"] for row in report["per_class"]] == [4] * 6
    for i in range(3):  # as many test rows in each class: the mean over classes is that over experiences
        scores = [row["scores"][i] for row in report["per_class"] if row["scores"][i] is not None]
        assert len(scores) == 2 * (i + 1)
        assert sum(scores) / len(scores) == pytest.approx(sum(report["matrix"][i][: i + 1]) / (i + 1))
    assert report["metrics"]["worst_class"] == min(row["scores"][-1] for row in report["per_class"])
    share = report["cost"]["probe_share"]
    spent = [report["cost"][name] for name in ("probe_seconds", "seconds", "evaluation_seconds")]
    assert share == pytest.approx(spent[0] / sum(spent)) and share > 0
    page = render_run(report)
    for said in ("Classes that lost most", "What is stored", "of all time", "FLOPs per token, training step"):
        assert said in page, said


@pytest.mark.parametrize(
    ("arm", "name"), [("moram-protected+ridge", "protected_directions"), ("inflora", "free_directions")]
)
def test_directions_left_are_kept_after_every_experience(arm, name, tmp_path):
    report = finished(tmp_path, arm)
    kept = report["curves"]["plasticity"][name]
    assert len(kept) == 3 and all(0 < value < 1 for value in kept) and report["plasticity"][name] == kept[-1]
    page = render_run(report)
    assert "Directions for what is new" in page
    assert f"share of input directions {'protected' if name.startswith('protected') else 'left free'}" in page
    assert "Directions for what is new" not in render_run({**report, "curves": {}})


def test_a_report_says_that_a_memory_is_silent(tmp_path):
    silent = finished(tmp_path / "silent", "moram", "method.moram.threshold=0.999")
    (said,) = [note for note in silent["notes"] if "no item of the memory answers" in note]
    assert silent["plasticity"]["off_rate"] > 0.5 and "6 a map here" in said and "method.moram.threshold" in said
    assert said in html.unescape(render_run(silent))
    heard = finished(tmp_path / "heard", "moram", "method.moram.threshold=0")
    assert heard["plasticity"]["off_rate"] == 0 and not [note for note in heard["notes"] if "memory" in note]


@pytest.mark.parametrize("arm", ["moram+er", "moram-lm"])
def test_validation_rows_are_scored_once_at_the_end(arm, tmp_path):
    plain = finished(tmp_path / "without", arm)
    assert "validation_average" not in plain["metrics"]
    report = finished(tmp_path / "with", arm, "stream.validation=3")
    run_folder = tmp_path / "with" / "run"
    learner, stream = learner_of(run_folder), Run(load_recipe(run_folder / "recipe.yaml"), Progress(False)).stream
    scores = learner.evaluate([stream.experience(index) for index in range(stream.length)], split="valid")
    assert report["metrics"]["validation_average"] == pytest.approx(sum(scores.values()) / len(scores))
    assert all(len(stream.experience(index).valid) for index in range(stream.length))


def test_a_closed_form_head_trains_in_no_step(tmp_path):
    cost = finished(tmp_path, "linear_probe+ridge")["cost"]
    assert "train_flops_per_row" not in cost and cost["inference_flops_per_row"] > 0


def test_a_state_from_before_there_were_accounts(tmp_path):
    assert Accounts.of(None, 2) == Accounts(classes=[{}, {}])
    full = Accounts(classes=[{"a": [1, 2]}], stored=[5], work={"train_flops_per_row": 1.0}, device_peak=7)
    assert Accounts.of(full.state_dict(), 1) == full
    assert full.cost() == {"train_flops_per_row": 1.0, "device_peak_bytes": 7}


def test_evaluation_leaves_every_random_state_and_mode_as_it_was(tmp_path, monkeypatch):
    """Also where a scorer or a method draws from Python or NumPy, and where a part stands in another mode."""
    run = Run(load_recipe(str(tiny.write_arm(tmp_path, "moram"))), Progress(enabled=False))
    learner, experience = run.learner, run.stream.experience(0)
    learner.learn(experience)
    learner.model.train()
    part = next(module for name, module in learner.model.named_modules() if name.endswith("attention"))
    part.eval()
    modes = [module.training for module in learner.model.modules()]
    drawn: list[float] = []

    def forward(self: Any, batch: Any) -> Any:
        assert not any(module.training for module in self.model.modules())
        drawn.extend([random.random(), np.random.rand(), float(torch.rand(1))])
        return plain(self, batch)

    plain = Learner.forward
    monkeypatch.setattr(Learner, "forward", forward)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), learner.generator.get_state()
    before = learner.state_dict()
    first = learner.evaluate([experience], per_class={})
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), learner.generator.get_state()
    assert drawn and states[:2] == after[:2]
    assert torch.equal(states[2], after[2]) and torch.equal(states[3], after[3])
    assert [module.training for module in learner.model.modules()] == modes and any(modes) and not all(modes)
    assert learner.evaluate([experience]) == first
    now = learner.state_dict()
    assert tiny.without_times(now[1]) == tiny.without_times(before[1])
    assert all(tiny.same_bytes(now[0][name], before[0][name]) for name in before[0]) and set(now[0]) == set(before[0])
