"""Scores between the boundaries: they change nothing, go on after an interruption, and give the figures of the page."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perdure.config import ProbeConfig
from perdure.errors import BadInput, Interrupted
from perdure.probing import Probing
from perdure.progress import Progress
from perdure.recipe import load_recipe
from perdure.report.html import render_run
from perdure.run import Run, run_recipe, undo

from . import tiny


def finished(folder: Path, arm: str, *overrides: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    recipe = load_recipe(str(tiny.write_arm(folder, arm)), [f"output_dir={folder / 'run'}", *overrides])
    return run_recipe(recipe, progress=False)


@pytest.mark.parametrize("arm", ["moram", "moram+er", "moram-clip", "moram-lm"])
def test_probes_change_nothing_else(arm, tmp_path):
    without = finished(tmp_path / "without", arm, "protocol.probe=null")
    report = finished(tmp_path / "with", arm, "protocol.probe={every: 1, rows: 2}")
    assert report["matrix"] == without["matrix"]
    assert report["curves"]["loss"] == without["curves"]["loss"]
    assert "probe" not in without["curves"] and "anytime_accuracy" not in without["metrics"]


def test_every_step_and_every_end_is_looked_at(tmp_path):
    report = finished(tmp_path, "moram", "protocol.probe={every: 2}")
    probe = report["curves"]["probe"]
    assert probe["ends"] == [5, 10, 15]  # 20 rows an experience, 4 a step
    assert [step for step, _ in probe["scores"]["0"]] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert [step for step, _ in probe["scores"]["2"]] == [12, 14, 15]
    # All test rows are looked at, so the looks at the boundaries are the matrix.
    for experience, end in enumerate(probe["ends"]):
        seen = [dict(map(tuple, probe["scores"][str(j)]))[end] for j in range(experience + 1)]
        assert seen == report["matrix"][experience][: experience + 1]
    assert len({score for _, score in probe["scores"]["0"]}) > 1
    steps, averages = zip(*probe["average"], strict=True)
    area = sum(a * (s - b) for a, s, b in zip(averages, steps, (0, *steps), strict=False)) / steps[-1]
    assert report["metrics"]["anytime_accuracy"] == pytest.approx(area)
    assert report["cost"]["probe_seconds"] > 0
    assert "between the boundaries" in render_run(report)


def test_a_model_that_learns_at_the_end_alone_has_no_curve(tmp_path):
    report = finished(tmp_path, "linear_probe+ridge", "protocol.probe={every: 2}")
    assert report["metrics"]["anytime_accuracy"] is None and report["metrics"]["min_acc"] is None
    assert report["curves"]["probe"]["ends"] == [0, 0, 0]


def test_an_interrupted_run_goes_on_with_its_probes(tmp_path):
    whole = finished(tmp_path / "whole", "moram", "protocol.probe={every: 2}")
    folder = tmp_path / "cut"
    folder.mkdir()
    recipe = load_recipe(
        str(tiny.write_arm(folder, "moram")), [f"output_dir={folder / 'run'}", "protocol.probe={every: 2}"]
    )
    (folder / "run").mkdir()
    run = Run(recipe, Progress(enabled=False))
    stop, looks = threading.Event(), run.probing
    assert looks is not None
    looked = looks.after_step

    def stop_at_seven(learner: Any, stream: Any) -> None:
        looked(learner, stream)
        if learner.counters.steps == 7:
            stop.set()

    looks.after_step = stop_at_seven  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        run.go(stop)
    report = run_recipe(recipe, progress=False)
    assert report["curves"] == whole["curves"]
    assert report["metrics"] == whole["metrics"]


def test_undo_brings_the_curve_of_then_back(tmp_path):
    finished(tmp_path, "moram", "protocol.probe={every: 2, rows: 3}")
    undo(tmp_path / "run")
    report = tiny.report(tmp_path / "run")
    assert report["curves"]["probe"]["ends"] == [5, 10]
    assert [step for step, _ in report["curves"]["probe"]["scores"]["1"]] == [6, 8, 10]
    assert report["curves"]["probe"]["rows"] == 3


def test_time_of_probes_is_in_no_other_figure(tmp_path, monkeypatch):
    def slow(self: Probing, learner: Any, stream: Any) -> None:
        clock[0] += 1000.0
        self.ends.append(learner.counters.steps)

    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Probing, "after_experience", slow)
    assert finished(tmp_path, "linear_probe", "protocol.probe={every: 2}")["cost"]["evaluation_seconds"] < 1000


def hand_worked() -> Probing:
    probing = Probing(ProbeConfig(every=5, window=10))
    probing.scores = {0: [[5, 0.4], [10, 0.8], [15, 0.2], [20, 0.6]], 1: [[15, 0.5], [20, 1.0]]}
    probing.ends = [10, 20]
    return probing


def test_figures_by_hand():
    found = hand_worked().figures(higher_is_better=True)
    # averages .4 .8 .35 .8, each for 5 of 20 steps
    assert found["anytime_accuracy"] == pytest.approx((0.4 + 0.8 + 0.35 + 0.8) / 4)
    assert found["min_acc"] == pytest.approx(0.2)
    assert found["wc_acc"] == pytest.approx(1.0 / 2 + 0.2 / 2)
    assert found["windowed_forgetting"] == pytest.approx((0.6 - 0.5) / 2)  # experience 1 only rises: −.5
    assert found["windowed_plasticity"] == pytest.approx((0.4 + 0.5) / 2)


def test_an_experience_without_a_look_inside_leaves_the_figures_empty():
    probing = hand_worked()
    probing.scores[0].pop(2)
    probing.scores[1].pop(0)
    assert set(probing.figures(higher_is_better=True).values()) == {None}


def test_state_goes_through_json():
    probing, again = hand_worked(), Probing(ProbeConfig(every=5, window=10))
    again.load_state_dict(json.loads(json.dumps(probing.state_dict())))
    assert again.figures(True) == probing.figures(True) and again.curves() == probing.curves()


@pytest.mark.parametrize("text", ["{every: 0}", "{rows: 0}", "{window: 1}", "{often: 2}"])
def test_bad_settings_are_named(text, tmp_path):
    with pytest.raises(BadInput, match=r"protocol\.probe"):
        load_recipe(str(tiny.write_arm(tmp_path, "moram")), [f"protocol.probe={text}"])


def test_a_score_that_is_not_finite_ends_the_run():
    from perdure.errors import NonFiniteLoss

    experience = SimpleNamespace(index=0, name="a", test=[1], hash="h")
    learner: Any = SimpleNamespace(
        counters=SimpleNamespace(steps=5), objective=SimpleNamespace(metric="perplexity"),
        evaluate=lambda _: {0: math.inf},
    )  # fmt: skip
    stream: Any = SimpleNamespace(experience=lambda _: experience)
    with pytest.raises(NonFiniteLoss, match="experience 0"):
        Probing(ProbeConfig(every=5)).after_step(learner, stream)
