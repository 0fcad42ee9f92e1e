"""What a run measures and shows: transfer, seconds, progress; and that its state leaves nothing out."""

from __future__ import annotations

import io
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perdure import progress as bars
from perdure.learner import Learner
from perdure.progress import Progress
from perdure.recipe import make_recipe
from perdure.run import run_recipe

from . import tiny
from .nursery import Nursery, point


def run(folder: Path, made: dict[str, Any], name: str = "run") -> dict[str, Any]:
    return run_recipe(make_recipe({**made, "output_dir": str(folder / name)}), progress=False)


# ---- forward transfer
def domains(folder: Path) -> dict[str, Any]:
    """Two domains with the same two classes."""
    sources = []
    for domain, seed in enumerate((0, 10)):
        for name, number in (("train", 12), ("test", 6)):
            every = [row for label in ("kind0", "kind1") for row in tiny.rows(label, number, seed + len(name))]
            tiny.write_rows(folder / f"{name}{domain}.jsonl", every)
        sources.append({"path": str(folder / f"train{domain}.jsonl"), "test": str(folder / f"test{domain}.jsonl")})
    return {"source": sources, "scenario": "domain_incremental"}


@pytest.mark.parametrize("head", ["cosine", {"ridge": {"features": 32}}])
def test_forward_transfer_where_the_domains_share_their_classes(tmp_path, head):
    report = run(tmp_path, tiny.settings(tmp_path, "linear_probe", head, stream=domains(tmp_path)))
    baseline, matrix = report["baseline"], report["matrix"]
    assert all(0 <= score <= 1 for score in baseline)  # of a head that knows the classes and has learnt nothing
    assert report["metrics"]["forward_transfer"] == pytest.approx(matrix[0][1] - baseline[1])
    seen = tiny.settings(tmp_path, "linear_probe", head, stream=domains(tmp_path), protocol={"evaluate": "seen"})
    report = run(tmp_path, seen, "seen")
    assert report["baseline"] is None and report["metrics"]["forward_transfer"] is None


def test_the_baseline_of_a_cosine_head_leaves_the_run_as_it_was(tmp_path):
    made = tiny.settings(tmp_path, {"moram": tiny.MORAM}, stream=domains(tmp_path))
    with_baseline = run(tmp_path, made)
    without = run(tmp_path, {**made, "protocol": {**made["protocol"], "evaluate": "seen"}}, "seen")
    assert with_baseline["baseline"] is not None and without["baseline"] is None
    first, second = tiny.newest(tmp_path / "run")[0], tiny.newest(tmp_path / "seen")[0]
    assert first.keys() == second.keys() and all(tiny.same_bytes(first[name], second[name]) for name in first)


def test_forward_transfer_of_a_language_model(tmp_path):
    made = tiny.settings(tmp_path, {"moram": tiny.MORAM}, None, **tiny.language(tmp_path))
    report = run(tmp_path, made)
    assert report["metric"] == "perplexity" and not report["higher_is_better"]
    assert all(score > 1 for score in report["baseline"])
    gain = report["baseline"][1] - report["matrix"][0][1]
    assert report["metrics"]["forward_transfer"] == pytest.approx(gain)


def test_joint_training_is_scored_at_the_end_only(tmp_path):
    made = tiny.settings(tmp_path, [{"lora": {"rank": 2}}, "joint"], protocol={"evaluate": "seen_and_next"})
    report = run(tmp_path, made)
    *before, last = report["matrix"]
    assert before and all(score is None for row in before for score in row) and None not in last
    metrics = report["metrics"]
    assert metrics["average_accuracy"] == pytest.approx(sum(last) / len(last))
    assert all(metrics[name] is None for name in ("forgetting", "learning_accuracy", "backward_transfer"))
    assert (tmp_path / "run" / "report.html").is_file()


def test_no_forward_transfer_to_classes_that_were_never_seen(tmp_path):
    report = run(tmp_path, tiny.settings(tmp_path, "linear_probe", {"ridge": {"features": 32}}))
    assert report["matrix"][0][1] == 0 and report["matrix"][0][2] is None
    assert report["baseline"] is None and report["metrics"]["forward_transfer"] is None


# ---- seconds
def test_seconds_count_learning_and_evaluation_seconds_the_scoring(tmp_path, monkeypatch):
    """On a clock of which every step takes 1 s, every score 100 s and every save 10,000 s."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(owner: Any, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            now[0] += seconds
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    from perdure.state import StateStore

    slow(Learner, "_step", 1.0)
    slow(Learner, "_evaluate_one", 100.0)
    slow(StateStore, "save", 10_000.0)
    cost = run(tmp_path, tiny.settings(tmp_path, "lora"))["cost"]
    assert cost["steps"] == 15 and cost["seconds"] == 15.0
    assert cost["evaluation_seconds"] == 100.0 * (2 + 3 + 3)


# ---- what the user sees
class Experience:
    index, name = 0, "first"


def test_bars_on_a_terminal_cover_learning_and_scoring():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Progress(console=console) as progress:
        for name in ("experience 1/2", "scoring after experience 1"):
            progress.start(name, 4)
            progress.step(3, 4, "loss 0.5")
            assert progress._bars is not None
            progress._bars.refresh()
        progress.experience_done(Experience, [0.5, None], "accuracy")
    shown = console.file.getvalue()
    for words in ("experience 1/2", "scoring after experience 1", "3/4", "loss 0.5", "first: mean accuracy 0.500"):
        assert words in shown


def test_plain_lines_elsewhere_and_none_too_often(monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    with Progress(console=console) as progress:
        progress.start("scoring after experience 1", 9)
        for done in range(9):
            progress.step(done, 9)
        progress.experience_done(Experience, [None], "accuracy")
    lines = console.file.getvalue().splitlines()
    assert 1 <= len([line for line in lines if line.startswith("  scoring after experience 1: ")]) <= 4
    assert lines[-1].endswith("no test rows") and "\x1b" not in console.file.getvalue()


def test_only_warnings_where_progress_is_not_wanted():
    console = Console(file=io.StringIO(), force_terminal=False)
    with Progress(enabled=False, console=console) as progress:
        progress.message("hidden")
        progress.step(1, 2)
        progress.warn("[bold] is no markup")
    assert console.file.getvalue() == "warning: [bold] is no markup\n"


# ---- nothing is left out of the state
@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> tuple[Path, Path]:
    """A run of MoRAM with rehearsal and a ridge head, whole, and one killed behind a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("state")
    method = [{"moram": {**tiny.MORAM, "protect": {"inputs": 0.5}}}, {"er": {"budget": 9, "per_step": 3}}]
    probed = {"probe": {"every": 2, "rows": 3}}
    recipe = str(tiny.write_recipe(folder, method, {"ridge": {"features": 32}}, protocol=probed))
    assert nursery.run(folder, "run", recipe, "output_dir=whole", "--no-progress").code == 0
    done = nursery.run(folder, "run", recipe, "output_dir=run", "--no-progress", at=(point("update", 9),))
    assert done.code == -9, done.output
    return folder / "whole", folder / "run"


def _parts(run: Path) -> list[str]:
    from perdure.state import StateStore

    state = StateStore(run / "state").load()
    names = {name.split("/")[0] for name in state.tensors} | (set(state.values) - {"names", "run"})
    return sorted(names | {f"run.{name}" for name in state.values["run"]})


HARMLESS = {
    "run.environment": "is compared, not used",
    "run.stream_hash": "is compared, not used",
    "run.base_hash": "is compared, not used",
    "run.report": "is what undo puts back",
    "run.notes": "is empty here",
    "run.evaluation_seconds": "a time",
    "declared": "comes from the recipe",
    "previous": "no method here needs the old model",
    "run.baseline": "is None in a class-incremental stream",
    "run.router": "is replaced when the experience ends",
    "run.trainable": "is a maximum, found again at the next logged step",
}


def test_leaving_out_any_one_part_of_the_state_changes_the_end(killed, tmp_path, nursery):
    """Each part in turn is taken from a fresh run instead of from the checkpoint."""
    import shutil

    whole, run_folder = killed
    recipe = run_folder.parent / "tiny.yaml"
    unnoticed = []
    for part in _parts(run_folder):
        if part in HARMLESS:
            continue
        folder = tmp_path / part
        shutil.copytree(run_folder, folder / "run")
        _take_out(folder / "run", part, whole)
        done = nursery.run(folder, "run", str(recipe), "output_dir=run", "--no-progress")
        if done.code == 0 and tiny.differences(whole, folder / "run") == []:
            unnoticed.append(part)
    assert unnoticed == []


def _take_out(run: Path, part: str, whole: Path) -> None:
    from perdure.state import StateStore

    store = StateStore(run / "state")
    state, fresh = store.load(), StateStore(whole / "state").load(boundary=0)
    tensors = {name: t for name, t in state.tensors.items() if name.split("/")[0] != part}
    tensors |= {name: t for name, t in fresh.tensors.items() if name.split("/")[0] == part}
    values = dict(state.values)
    if part.startswith("run."):
        values["run"] = {**values["run"], part[4:]: fresh.values["run"][part[4:]]}
    elif part in values:
        values.pop(part)
        values |= {part: fresh.values[part]} if part in fresh.values else {}
    store.save(state.step, tensors, values, boundary=state.boundary)


def test_the_state_has_the_parts_that_the_loop_has(killed):
    assert {"optimizer", "rng", "generator", "replay", "router", "method", "head", "auxiliary", "probe"} <= set(
        _parts(killed[1])
    )
