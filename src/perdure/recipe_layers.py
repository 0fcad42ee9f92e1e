"""Lays an arm and what the user typed over a recipe, and notes where each value comes from. Imports no torch."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from . import yamltext
from .errors import BadInput
from .presets import PRESETS
from .registry import HEADS, METHODS, OBJECTIVES, Registry

BLOCKS: dict[str, Registry] = {"method": METHODS, "head": HEADS, "objective": OBJECTIVES}
"""Keys whose value is a plug-in's name with its settings."""
DEFAULTS = {"method": "moram", "objective": "classification"}


def split_override(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise BadInput(f"{text!r}: expected key=value, such as training.learning_rate=1e-3")
    if not value.strip():
        raise BadInput(f"{key}: has no value; write {key}=null for none")
    return path, yamltext.load(value, key)


def _canonical(name: str) -> str:
    return METHODS.aliases.get(name, name)


def _arm_settings(arms: dict[str, Any], name: str) -> tuple[dict[str, Any], str] | None:
    for candidate in dict.fromkeys((name, _canonical(name))):
        if candidate in arms:
            settings = arms[candidate]
            if settings is not None and not isinstance(settings, dict):
                raise BadInput(f"arms.{candidate}: expected a mapping of settings, found {settings!r}")
            return copy.deepcopy(settings or {}), candidate
    if _canonical(name) in METHODS.names():
        return {"method": _canonical(name)}, _canonical(name)
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name].settings), name
    return None


def apply_arm(data: dict[str, Any], sources: dict[str, str], arms: dict[str, Any], name: str) -> str:
    """Lays an arm over the recipe and returns its name."""
    found = _arm_settings(arms, name)
    if found is None and "+" in name:
        method, _, head = name.rpartition("+")
        found = _arm_settings(arms, method)
        if found is not None:
            HEADS.get(head)
            found[0]["head"] = head
            found = found[0], name
    if found is None:
        known = sorted({*arms, *METHODS.names(), *PRESETS})
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise BadInput(f"method: {name!r} is neither an arm of the recipe nor a method; {hint}")
    settings, label = found
    for key, value in settings.items():
        if key == "note":
            continue
        if key == "training" and isinstance(value, dict):
            below = data.setdefault(key, {})
            if isinstance(below, dict):
                below.update(value)
        else:
            data[key] = value
            for path in [path for path in sources if path.startswith(f"{key}.")]:
                del sources[path]
        mark(sources, {key: value}, f"arm {label}")
    return label


def set_value(data: dict[str, Any], sources: dict[str, str], path: list[str], value: Any) -> None:
    """Sets one value; `method.er.budget` reaches into the method of that name."""
    dotted = ".".join(path)
    where: Any = data
    if len(path) > 1 and path[0] in BLOCKS:
        where, path = _block(data, path), path[2:] if len(path) > 2 else []
        if not path:
            if not isinstance(value, dict):
                raise BadInput(f"{dotted}: expected a mapping of settings, found {value!r}")
            where.update(value)
            mark(sources, _nest(dotted, value), "command line")
            return
    for number, part in enumerate(path[:-1]):
        below = where.get(part)
        if below is None:
            below = where[part] = {}
        if not isinstance(below, dict):
            raise BadInput(f"{dotted}: {'.'.join(path[: number + 1])} is {below!r}, which has no settings inside")
        where = below
    where[path[-1]] = value
    for known in [known for known in sources if known.startswith(f"{dotted}.")]:
        del sources[known]
    sources[dotted] = "command line"


def holds(data: dict[str, Any], path: list[str]) -> bool:
    """Whether `method.er.budget` finds the method er in `data`; True for what reaches into no plug-in."""
    if len(path) < 2 or path[0] not in BLOCKS:
        return True
    aliases, block = BLOCKS[path[0]].aliases, data.get(path[0])
    block = DEFAULTS.get(path[0]) if block is None else block
    names = [name for item in (block if isinstance(block, list) else [block]) for name in _names(item)]
    return aliases.get(path[1], path[1]) in [aliases.get(name, name) for name in names]


def _names(item: Any) -> list[str]:
    return [str(name) for name in item] if isinstance(item, dict) else [] if item is None else [str(item)]


def head_name(value: Any) -> str | None:
    """The head that a typed `head=...` names, whether or not with settings."""
    names = _names(value)
    return names[0] if len(names) == 1 else None


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _block(data: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The settings of one plug-in of a block, as a dict inside `data` that can be changed."""
    field, name = path[0], path[1]
    wanted = BLOCKS[field].aliases.get(name, name)
    block = data.get(field)
    if block is None and field != "head":
        block = DEFAULTS[field]
    items = block if isinstance(block, list) else [] if block is None else [block]
    normal: list[Any] = []
    for item in items:
        if isinstance(item, dict):
            normal += [{key: dict(value or {})} for key, value in item.items()]
        else:
            normal.append({item: {}})
    data[field] = normal if field == "method" else normal[0] if len(normal) == 1 else (normal or None)
    for item in normal:
        for key in item:
            if BLOCKS[field].aliases.get(str(key), key) == wanted:
                return item[key]
    names = ", ".join(str(key) for item in normal for key in item) or "none"
    raise BadInput(f"{field}.{name}: the recipe's {field} is {names}; add {field}={name} to change it")


def mark(sources: dict[str, str], value: Any, source: str, prefix: str = "") -> None:
    """Notes where every leaf comes from. List items that are plug-ins go by their name."""
    if isinstance(value, dict):
        if prefix:
            sources[prefix] = source
        for key, below in value.items():
            mark(sources, below, source, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and prefix in BLOCKS:
        for item in value:
            mark(sources, item if isinstance(item, dict) else {str(item): {}}, source, prefix)
    elif isinstance(value, str) and prefix in BLOCKS:
        sources[f"{prefix}.{BLOCKS[prefix].aliases.get(value, value)}"] = source
    else:
        sources[prefix] = source
