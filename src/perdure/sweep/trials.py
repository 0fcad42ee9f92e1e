"""The trials of a sweep: what each trains, and the file that keeps what it found. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import yamltext
from ..errors import BadInput, PerdureError
from ..recipe import Recipe, identity, make_recipe, safe
from ..registry import METHODS
from .space import Space, short, without_effect

SCHEMA = 1
FINAL = ("done", "not finite")
"""States after which a trial is not repeated: the same settings would end the same way."""


@dataclass(frozen=True)
class Trial:
    """One arm with one point of the space.

    Attributes:
        arm: its label.
        values: dotted name -> value of the settings that count in this arm.
        recipe: the arm with these values.
        positions: of the experiences that it learns.
        rows: hash of their training and validation rows.
    """

    arm: str
    values: Mapping[str, Any]
    recipe: Recipe
    positions: tuple[int, ...]
    rows: str

    @functools.cached_property
    def digest(self) -> str:
        """Hex sha256 of all that decides what the trial finds."""
        found = [SCHEMA, identity(self.recipe), list(self.positions), self.rows]
        return hashlib.sha256(json.dumps(found, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Names the trial among those of a sweep."""
        return f"{safe(self.arm)}/{self.digest[:24]}"

    @property
    def words(self) -> str:
        return f"{self.arm} {told(self.values)}"

    def path(self, folder: Path) -> Path:
        return folder / f"{self.key}.json"

    def to_json(self) -> dict[str, Any]:
        return {
            "arm": self.arm, "values": dict(self.values), "recipe": {"name": self.recipe.name, **identity(self.recipe)},
            "positions": list(self.positions), "rows": self.rows,
        }  # fmt: skip

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Trial:
        recipe = make_recipe(kept["recipe"])
        return cls(kept["arm"], kept["values"], recipe, tuple(kept["positions"]), kept["rows"])


def told(values: Mapping[str, Any]) -> str:
    """Settings in words: `learning_rate 1e-3, method.moram.rank 8`."""
    return ", ".join(f"{short(name)} {yamltext.inline(value, short=True)}" for name, value in values.items())


def typed_over(recipe: Recipe) -> list[str]:
    """What the user typed over the recipe, as overrides."""
    return [f"{'.'.join(path)}={yamltext.inline(value)}" for path, value in recipe.typed]


@dataclass(frozen=True)
class Plan:
    """The trials of one arm.

    Attributes:
        trials: the different ones, in the order of the points that ask for them.
        without_effect: settings that change nothing in this arm, with the reason.
    """

    arm: str
    trials: list[Trial]
    without_effect: dict[str, str]


def plan_arm(
    recipe: Recipe, name: str | None, space: Space, points: Sequence[dict[str, Any]], positions: tuple[int, ...],
    rows: str,
) -> Plan:  # fmt: skip
    """Trials of an arm, each checked as a recipe. Points that differ only in what has no effect are one trial.

    Args:
        recipe: what is swept. name: one of its arms or a method; None for the recipe's own method.
        points: those of `space`.

    Raises:
        BadInput, ProtocolRefused: a value does not fit; names arm and setting.
    """
    base = recipe.with_arm(name)
    idle = without_effect(base, space)
    trials: dict[str, Trial] = {}
    for point in points:
        values = {key: value for key, value in point.items() if key not in idle}
        typed = [f"{key}={yamltext.inline(value)}" for key, value in values.items()]
        try:
            complete = recipe.with_arm(name, typed=typed)
        except PerdureError as error:
            raise type(error)(f"arm {base.label}, {told(values)}: {error}") from None
        trial = Trial(base.label, values, complete, positions, rows)
        trials.setdefault(trial.digest, trial)
    return Plan(base.label, list(trials.values()) if len(idle) < len(space.settings) else [], idle)


def pretraining_of(recipe: Recipe) -> str | None:
    """What decides the state after an arm's pretraining, or None where trials of other rates do not share it: without
    pretraining, without a rate of its own for it, or where a head trains beside it.
    """
    configs = [config for _, config in METHODS.parse(recipe.method, "method")]
    own = next((each for config in configs if (each := getattr(config, "pretrain", None)) is not None), None)
    if own is None or own.learning_rate is None or recipe.head is not None or recipe.protocol.boundaries != "train":
        return None
    settings = identity(recipe)
    settings["training"] = {key: value for key, value in settings["training"].items() if key != "learning_rate"}
    return json.dumps(settings, sort_keys=True)


def units_of(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that one process should train one after another, since they share a pretraining; others are alone."""
    units: dict[str, list[Trial]] = {}
    for trial in trials:
        shared = pretraining_of(trial.recipe)
        units.setdefault(trial.key if shared is None else f"{trial.arm} {shared}", []).append(trial)
    return list(units.values())


def read_result(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """What a trial's file says, or None where it has not ended.

    Raises:
        BadInput: the file is not one of ours.
    """
    path = trial.path(folder)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("digest") != trial.digest or "state" not in found:
        raise BadInput(f"{path}: is not the result of a trial; delete it and run the sweep again")
    return found


def write_result(trial: Trial, folder: Path, state: str, **facts: Any) -> None:
    """Writes a trial's end: as a whole or not at all.

    Args:
        state: "done", "not finite" or "failed".
        facts: `loss` and `score`, or the `reason`.

    Raises:
        CannotWrite: the disk is full or the folder not writable.
    """
    from ..report.build import write_json

    kept = {"schema": SCHEMA, "digest": trial.digest, "state": state, **trial.to_json(), **facts}
    write_json(trial.path(folder), kept)
