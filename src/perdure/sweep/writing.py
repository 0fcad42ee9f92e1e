"""Writes what a sweep chose into a recipe file that the user owns. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import yamltext
from ..errors import BadInput
from ..recipe import RECIPES, find_recipe, identity, make_recipe
from ..recipe_layers import BLOCKS
from ..yamledit import edited
from .driver import Sweep
from .trials import Trial, told, typed_over

OURS = ("grid", "trials", "random", "equal", "on", "arms", "without_effect", "failed")
"""Keys of a recipe's tuning block that a sweep writes; others stay."""


def target_of(recipe: str | Path, copy_to: str | Path | None) -> tuple[Path, str]:
    """The file that will be written and its present text, which is that of the recipe.

    Args:
        recipe: name or path, as typed.
        copy_to: a new file, which takes a copy; needed for a recipe of the package.

    Raises:
        BadInput: the recipe is the package's and no copy is named, or the copy is there already.
    """
    path = find_recipe(recipe).resolve()
    text = path.read_bytes().decode("utf-8")
    if copy_to is None and path.is_relative_to(RECIPES.resolve()):
        raise BadInput(f"--write: {recipe} belongs to the package; name a file of your own with --copy my.yaml")
    if copy_to is not None:
        copied = Path(copy_to).expanduser()
        if copied.suffix not in (".yaml", ".yml"):
            raise BadInput(f"--copy: {copied} is no name of a recipe; end it with .yaml")
        if copied.exists():
            raise BadInput(f"--copy: {copied} is there already; name a new file, or sweep it with --write alone")
        path = copied
    return path, text


def new_text(path: Path, text: str, sweep: Sweep, best: Mapping[str, Trial], tuning: Mapping[str, Any]) -> str:
    """The file with the chosen values of each arm and the new `tuning` block.

    Args:
        path, text: as `target_of` gives them.
        best: arm -> the trial that won.
        tuning: the new block; keys of the old one that are not a sweep's stay.

    Raises:
        BadInput: an arm does not stand in the file, or it cannot be changed line by line, or would not mean the trials
            that won.
    """
    data = yamltext.load(text, f"recipe {path.name}")
    wanted, whole = copy.deepcopy(data), [plan.arm for plan in sweep.plans] == [sweep.recipe.label]
    for arm, trial in best.items():
        settings = wanted
        if data.get("arms") or not whole:
            if arm not in (data.get("arms") or {}):
                raise BadInput(
                    f"--write: {arm} is no arm of the recipe; add it under `arms` first, or leave --write out"
                )
            settings = wanted["arms"][arm] = wanted["arms"][arm] or {}
        for name, value in trial.values.items():
            _set(settings, wanted, name.split("."), value, f"arm {arm}")
    old = {key: value for key, value in (wanted.get("tuning") or {}).items() if key not in OURS or key in tuning}
    wanted["tuning"] = {**old, **tuning}
    changed = edited(text, wanted, f"recipe {path.name}")
    _check(sweep, wanted, path, best)
    return changed


def _set(settings: dict[str, Any], whole: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    field = path[0]
    if field not in BLOCKS:
        settings[field] = {**(settings.get(field) or {}), path[1]: value}
        return
    spec = settings.get(field)
    if spec is None:  # the arm has the recipe's own
        spec = copy.deepcopy(whole.get(field))
    settings[field] = _with(spec, field, path[1], path[2:], value, where)


def _with(spec: Any, field: str, name: str, rest: list[str], value: Any, where: str) -> Any:
    """A method or head as it is written (name, mapping or list) with one setting changed."""
    aliases = BLOCKS[field].aliases
    wanted = aliases.get(name, name)
    if isinstance(spec, list):
        for number, item in enumerate(spec):
            names = [item] if isinstance(item, str) else list(item)
            if any(aliases.get(each, each) == wanted for each in names):
                return [*spec[:number], _with(item, field, name, rest, value, where), *spec[number + 1 :]]
    elif isinstance(spec, dict):
        for key, inner in spec.items():
            if aliases.get(key, key) == wanted:
                return {**spec, key: _nested(inner, rest, value)}
    elif isinstance(spec, str) and aliases.get(spec, spec) == wanted:
        return {spec: _nested(None, rest, value)}
    raise BadInput(
        f"--write: {where} has no {field} {name} written out that could take {'.'.join(rest)}; write it there, then "
        "repeat the command: finished trials are kept"
    )


def _nested(settings: Any, rest: list[str], value: Any) -> dict[str, Any]:
    settings = dict(settings or {})
    settings[rest[0]] = value if len(rest) == 1 else _nested(settings.get(rest[0]), rest[1:], value)
    return settings


def _check(sweep: Sweep, wanted: dict[str, Any], path: Path, best: Mapping[str, Trial]) -> None:
    """Each arm of the new file, with what was typed over it, is the trial that won."""
    typed = typed_over(sweep.recipe)
    new = make_recipe({"name": path.stem, **wanted})
    for arm, trial in best.items():
        found = new.with_arm(arm if new.arms else None, typed=typed)
        if identity(found) != identity(trial.recipe):
            raise BadInput(
                f"--write: {path} would not give what {arm} was tried with ({told(trial.values)}); write it by hand"
            )
