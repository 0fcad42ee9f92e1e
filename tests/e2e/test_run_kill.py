"""Runs killed by signal 9 at seeded points, and the same command again: the end is that of a run left alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from perdure.registry import METHODS
from perdure.state import StateStore

from . import tiny
from .nursery import Done, Nursery, point

STEPLESS = ("linear_probe+ridge", "linear_probe+slda", "frozen-lm")
"""Arms without gradients, which save at boundaries alone."""


def saves_of(arm: str) -> int:
    """Checkpoints of a whole run: the start, step 3 of each experience, each experience's end."""
    experiences = 2 if arm.endswith("-lm") else 3
    return 1 + experiences * (1 if arm in STEPLESS else 2)


class Runs:
    """The uninterrupted run of each arm, made once."""

    def __init__(self, root: Path, nursery: Nursery):
        self.root, self.nursery = root, nursery

    def whole(self, arm: str) -> Path:
        if not (self.root / arm / "run").exists():
            self.recipe(arm)
            self.again(arm, self.root / arm)
        return self.root / arm / "run"

    def recipe(self, arm: str) -> Path:
        folder = self.root / arm
        if not (folder / "tiny.yaml").exists():
            folder.mkdir()
            tiny.write_arm(folder, arm)
        return folder / "tiny.yaml"

    def again(self, arm: str, folder: Path, *points: dict[str, Any], code: int = 0) -> Done:
        """The same command in `folder`, which ends with `code`."""
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
def test_the_whole_run_learns_to_its_last_experience(arm: str, runs: Runs):
    """Without this, equal ends below could be ends at which nothing had happened."""
    store = StateStore(runs.whole(arm) / "state")
    *_, last, end = store.boundaries()
    before, after = store.load(boundary=last).tensors, store.load(boundary=end).tensors
    learnt = [name for name in after if name.startswith(("method/", "head/", "auxiliary/"))]
    moved = [name for name in learnt if name not in before or not tiny.same_bytes(before[name], after[name])]
    assert bool(moved) == (arm != "frozen-lm") and len(tiny.report(runs.whole(arm))["matrix"]) == end


def steps_of(arm: str) -> list[int]:
    """Steps that follow one which no checkpoint holds; an arm without gradients has none.

    Step 3 of each experience's 5 is saved, and each experience's end; `joint` takes 15 steps in the last experience.
    """
    if arm in STEPLESS:
        return []
    if arm == "joint":
        return [2, 5, 8, 11, 14]
    return [2, 5, 7, 10] if arm.endswith("-lm") else [2, 5, 7, 10, 12, 15]


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_killed_in_the_middle_of_a_step_and_once_more(arm: str, runs: Runs, tmp_path: Path):
    draw = random.Random(f"step/{arm}")
    steps = steps_of(arm)
    if not steps:
        runs.again(arm, tmp_path, point("evaluate", draw.randint(2, 4)), code=-9)
    else:
        runs.again(arm, tmp_path, point("update", draw.choice(steps)), code=-9)
        assert runs.again(arm, tmp_path, point("update", 1), code=-9).code == -9
    runs.again(arm, tmp_path)
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_killed_between_the_files_of_a_save_then_during_growth(arm: str, runs: Runs, tmp_path: Path):
    draw = random.Random(f"save/{arm}")
    runs.again(arm, tmp_path, point("document", draw.randint(2, 3 if arm == "joint" else saves_of(arm) - 1)), code=-9)
    leftovers = [path.name for path in (tmp_path / "run" / "state").iterdir() if path.name.startswith(".saving-")]
    assert len(leftovers) == 1
    runs.again(arm, tmp_path, point("growth"), code=-9)
    runs.again(arm, tmp_path)
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_killed_before_the_rename_of_a_save_and_the_newest_checkpoint_damaged(arm: str, runs: Runs, tmp_path: Path):
    draw = random.Random(f"rename/{arm}")
    runs.again(arm, tmp_path, point("rename", draw.randint(3, saves_of(arm))), code=-9)
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
    runs.again(arm, tmp_path, point("evaluate", draw.randint(3, 6)), code=-9)
    runs.again(arm, tmp_path)
    assert tiny.differences(runs.whole(arm), tmp_path / "run") == []
