"""What a sweep searches: values or ranges of settings, and the points that every arm tries. Imports no torch."""

from __future__ import annotations

import difflib
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import yamltext
from ..config import TrainingConfig
from ..errors import BadInput
from ..recipe import Recipe, holds
from ..registry import HEADS, METHODS

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
WITHOUT_GRADIENT = ("bf16", "num_threads", "per_device_eval_batch_size")
"""Settings of training that count where nothing trains by gradient too."""


@dataclass(frozen=True)
class Range:
    """Draws between two numbers, ends included: of positive numbers evenly over their logarithms, else evenly."""

    low: int | float
    high: int | float

    def draw(self, generator: random.Random) -> int | float:
        """A whole number where both ends are; else three significant digits, which a recipe can hold."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        value = low + (high - low) * generator.random()
        value = math.exp(value) if self.low > 0 else value
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, max(self.low, round(value)))
        return min(float(self.high), max(float(self.low), float(f"{value:.2e}")))

    def at_edge(self, value: int | float, margin: float) -> bool:
        """Whether a value lies in the outer `margin` of the range, on its scale."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        place = (self._scaled(value) - low) / (high - low)
        return min(place, 1 - place) <= margin

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.low > 0 else value

    def __str__(self) -> str:
        return f"{yamltext.inline(self.low, short=True)}..{yamltext.inline(self.high, short=True)}"


@dataclass(frozen=True)
class Space:
    """Settings by dotted name, each with its values or its range.

    Attributes:
        settings: such as `training.learning_rate` -> [1e-4, 1e-3].
        draws: points that are drawn at random; every combination of the values where None.
        seed: of the draws; the n-th point is the same however many are drawn.
    """

    settings: Mapping[str, list[Any] | Range]
    draws: int | None = None
    seed: int = 0

    def points(self) -> list[dict[str, Any]]:
        """What every arm tries, in order: dotted name -> value."""
        if self.draws is None:
            values = [found for found in self.settings.values() if isinstance(found, list)]
            return [dict(zip(self.settings, each, strict=True)) for each in itertools.product(*values)]
        found = []
        for number in range(self.draws):
            point = {}
            for name, among in self.settings.items():
                generator = random.Random(f"{self.seed}/{number}/{name}")
                point[name] = among.draw(generator) if isinstance(among, Range) else generator.choice(among)
            found.append(point)
        return found

    def declared(self) -> dict[str, Any]:
        """The `grid` of a recipe's tuning block, which `space_of` reads back."""
        return {short(name): str(v) if isinstance(v, Range) else v for name, v in self.settings.items()}


def short(name: str) -> str:
    """How tables and recipes name a setting: those of training without their block."""
    return name.removeprefix("training.")


def space_of(recipe: Recipe, typed: Sequence[str], draws: int | None = None, seed: int = 0) -> Space:
    """The space that was typed, else the one that the recipe's `tuning.grid` declares.

    Args:
        typed: such as `learning_rate=1e-4,1e-3` or `method.moram.rank=2..64`.
        draws, seed: as in `Space`.

    Raises:
        BadInput: a name that cannot be swept, a value that is missing or comes twice, a range without `draws`.
    """
    if draws is not None and draws < 1:
        raise BadInput(f"--random: found {draws}; draw at least 1 point")
    settings: dict[str, list[Any] | Range] = {}
    for text in typed:
        name, equals, values = text.partition("=")
        if not equals:
            raise BadInput(f"--grid {text}: expected key=values, such as learning_rate=1e-4,1e-3")
        _add(settings, "--grid ", name.strip(), _listed(name, values))
    if not typed:
        grid = recipe.tuning.get("grid")
        if not isinstance(grid, Mapping) or not grid:
            raise BadInput(
                f"--grid: recipe {recipe.name} declares no tuning.grid; give one, such as "
                "--grid learning_rate=1e-4,1e-3 --grid head_learning_rate=1e-2,3e-2"
            )
        for name, values in grid.items():
            _add(settings, "tuning.grid.", str(name), _listed(str(name), values))
    if draws is None:
        for name, found in settings.items():
            if isinstance(found, Range):
                raise BadInput(f"--grid {short(name)}: {found} is a range; add --random N to draw N points from it")
    for path, _ in recipe.typed:
        if ".".join(path) in settings:
            raise BadInput(f"{'.'.join(path)}: is both typed and swept; keep one")
    return Space(settings, draws, seed)


def _listed(name: str, values: Any) -> list[Any] | Range:
    """`1e-4,1e-3` or `1e-4..1e-2`, or a list as a recipe holds it."""
    if isinstance(values, str):
        match = _RANGE.fullmatch(values.strip())
        if match:
            low, high = (yamltext.load(part, name) for part in match.groups())
            if not low < high:
                raise BadInput(f"--grid {name}: the range {values.strip()} is empty; write the lower end first")
            return Range(low, high)
        values = yamltext.load(f"[{values}]", f"--grid {name}")
    if not isinstance(values, list) or not values:
        raise BadInput(f"grid of {name}: found {values!r}; give values, such as 1e-4,1e-3")
    if any(value == other for value, other in itertools.combinations(values, 2)):
        raise BadInput(f"grid of {name}: a value stands twice in {values}; keep one")
    return values


def _add(settings: dict[str, Any], where: str, name: str, values: list[Any] | Range) -> None:
    fields = TrainingConfig.model_fields
    first, _, rest = name.partition(".")
    full = f"training.{name}" if name in fields else name
    if full in settings:
        raise BadInput(f"{where}{name}: is given twice; keep one")
    known = first == "training" and rest in fields or first in ("method", "head") and rest.count(".") >= 1
    if full == name and not known:
        near = difflib.get_close_matches(rest or name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "as the same stream, model and protocol serve every arm"
        raise BadInput(
            f"{where}{name}: cannot be swept; sweep settings of training, such as learning_rate, or of a plug-in, such "
            f"as method.moram.rank or head.ridge.features ({hint})"
        )
    settings[full] = values


# ---- which settings an arm has
def without_effect(arm: Recipe, space: Space) -> dict[str, str]:
    """Settings of the space that change nothing in an arm, each with the reason."""
    found = {}
    for name in space.settings:
        path = name.split(".")
        if path[0] != "training":
            if not holds({path[0]: getattr(arm, path[0])}, path):
                found[name] = f"the arm has no {path[0]} {path[1]}"
        elif reason := _idle(arm, path[1], space):
            found[name] = reason
    return found


def _idle(arm: Recipe, field: str, space: Space) -> str | None:
    methods = [METHODS.get(name) for name, _ in METHODS.parse(arm.method, "method")]
    host = any(method.adapts for method in methods) or not any(method.frozen_features for method in methods)
    head = None if arm.head is None else HEADS.get(HEADS.parse(arm.head, "head")[0][0])
    # A closed-form head over an adapter that trains has an auxiliary head, which trains too.
    trained_head = head is not None and not head.by_text and (not head.closed_form or host)
    if not host and not trained_head:
        return None if field in WITHOUT_GRADIENT else "nothing of the arm trains by gradient"
    if field == "head_learning_rate" and not trained_head:
        return "no head of the arm trains"
    own_rate = "training.head_learning_rate" in space.settings or arm.training.head_learning_rate is not None
    if field == "learning_rate" and not host and own_rate:
        return "only the head of the arm trains, at its own rate"
    return None
