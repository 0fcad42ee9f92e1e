"""Runs killed by signal 9 at seeded points, and the same command again: the end is that of a run that was left alone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from perdure.registry import METHODS

from . import tiny
from .nursery import Nursery, point

# A checkpoint holds step 3 of each experience's 5 (`joint`: every third of its 15); these are in the middle of a step
# that follows one which no checkpoint holds.
UNSAVED = (2, 5)
COMMAND = ("run", "tiny.yaml", "output_dir=run", "--no-progress")


def command(folder: Path) -> tuple[str, ...]:
    return ("run", str(folder / "tiny.yaml"), "output_dir=run", "--no-progress")


class Runs:
    """The uninterrupted run of each arm, made once."""

    def __init__(self, root: Path, nursery: Nursery):
        self.root, self.nursery = root, nursery

    def whole(self, arm: str) -> Path:
        folder = self.root / arm
        if not (folder / "run").exists():
            self.recipe(arm)
            done = self.nursery.run(folder, *command(folder))
            assert done.code == 0, done.output
        return folder / "run"

    def recipe(self, arm: str) -> Path:
        folder = self.root / arm
        if not (folder / "tiny.yaml").exists():
            folder.mkdir()
            tiny.write_recipe(folder, *tiny.ARMS[arm])
        return folder / "tiny.yaml"

    def again(self, arm: str, folder: Path, *points, code: int = 0):
        """The same command in `folder`."""
        recipe = self.recipe(arm)
        done = self.nursery.run(folder, "run", str(recipe), "output_dir=run", "--no-progress", at=points)
        assert done.code == code, done.output
        return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Runs:
    return Runs(tmp_path_factory.mktemp("whole"), nursery)


def test_every_method_has_an_arm():
    methods = {name for spec, _ in tiny.ARMS.values() for name, _ in METHODS.parse(spec, "method")}
    assert methods == set(METHODS.names()), "add the new method to tests/e2e/tiny.py, so that it is killed too"


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_two_whole_runs_are_equal_and_learning_changes_something(arm: str, runs: Runs, tmp_path: Path):
    """Without this, equal ends could be ends at which nothing happened."""
    runs.again(arm, tmp_path)
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []
    first, last = (_boundary(tmp_path / "run", number) for number in (0, 3))
    assert any(name not in first or not tiny.same_bytes(first[name], last[name]) for name in last)


def _boundary(run: Path, number: int):
    from perdure.state import StateStore

    return StateStore(run / "state").load(boundary=number).tensors


def steps_of(arm: str) -> list[int]:
    """Numbers of steps that are worth a kill; an arm without gradients has none."""
    if arm == "linear_probe+ridge":
        return []
    return [2, 5, 8, 11, 14] if arm == "joint" else [2, 5, 7, 10, 12, 15]


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_killed_in_the_middle_of_a_step_and_once_more(arm: str, runs: Runs, tmp_path: Path):
    draw = random.Random(f"step/{arm}")
    steps = steps_of(arm)
    if not steps:
        runs.again(arm, tmp_path, point("evaluate", draw.randint(2, 6)), code=-9)
    else:
        runs.again(arm, tmp_path, point("update", draw.choice(steps)), code=-9)
        if (tmp_path / "run" / "report.json").exists():
            assert tiny.report(tmp_path / "run")["status"] == "running"
        # At most 2 steps of 15 are lost, so the second kill falls on a step that the first run had not begun or redoes.
        done = runs.nursery.run(
            tmp_path, "run", str(runs.recipe(arm)), "output_dir=run", "--no-progress", at=(point("update", 2),)
        )
        assert done.code in (-9, 0), done.output
    runs.again(arm, tmp_path)
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_killed_between_the_files_of_a_save_then_during_growth(arm: str, runs: Runs, tmp_path: Path):
    draw = random.Random(f"save/{arm}")
    saves = 4 if arm == "linear_probe+ridge" else 7
    runs.again(arm, tmp_path, point("document", draw.randint(2, saves - 1)), code=-9)
    leftovers = [path.name for path in (tmp_path / "run" / "state").iterdir() if path.name.startswith(".saving-")]
    assert len(leftovers) == 1
    runs.again(arm, tmp_path, point("growth", 1), code=-9 if arm in GROWING else 0)
    runs.again(arm, tmp_path)
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []


GROWING = {arm for arm in tiny.ARMS if "moram" in arm or arm == "joint"}
"""Arms whose method does something when an experience begins."""


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_killed_before_the_rename_of_a_save_and_the_newest_checkpoint_damaged(arm: str, runs: Runs, tmp_path: Path):
    draw = random.Random(f"rename/{arm}")
    saves = 4 if arm == "linear_probe+ridge" else 7
    runs.again(arm, tmp_path, point("rename", draw.randint(4, saves)), code=-9)
    newest = max((tmp_path / "run" / "state").glob("step-*"), key=lambda path: path.name.split("-")[2])
    tensors = newest / "tensors.safetensors"
    raw = bytearray(tensors.read_bytes())
    place = draw.randrange(len(raw))
    raw[place] ^= 1 << draw.randrange(8)
    tensors.write_bytes(raw)
    done = runs.again(arm, tmp_path)
    assert "warning:" in done.output and newest.name in done.output and "sha256" in done.output
    assert list((tmp_path / "run" / "state").glob(f"damaged-{newest.name}"))
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_killed_during_evaluation(arm: str, runs: Runs, tmp_path: Path):
    draw = random.Random(f"evaluate/{arm}")
    runs.again(arm, tmp_path, point("evaluate", draw.randint(2, 8)), code=-9)
    runs.again(arm, tmp_path)
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []
    shutil.rmtree(tmp_path / "run")
