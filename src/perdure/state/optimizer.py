"""Optimizer state by parameter name: an optimizer rebuilt over grown or other parameters takes over what fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from perdure.errors import BadInput, DamagedState

Names = Mapping[int, str] | Iterable[tuple[str, Tensor]]
_PREFIX = "optimizer."
_NO_OPTION = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})
"""Keys of a group that are its parameters, or choose an implementation and not a result."""


def optimizer_state(optimizer: Any, names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Moments, step counters and group options of an optimizer, by parameter name.

    Args:
        optimizer: a torch optimizer, or a wrapper that holds it as `.optimizer`.
        names: `{id(parameter): name}` or pairs such as `model.named_parameters()`.

    Returns:
        tensors `optimizer.<parameter>.<key>`, and JSON values that say what belongs to which parameter.

    Raises:
        BadInput: a parameter without a name, a name used twice, or state that is neither tensor nor number.
    """
    inner = _unwrap(optimizer)
    named = _named(inner, names)
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    groups = []
    for group in inner.param_groups:
        own = [named[id(p)] for p in group["params"]]
        options = {key: _option(key, value) for key, value in group.items() if key not in _NO_OPTION}
        groups.append({"parameters": own, "options": options})
        for name, parameter in zip(own, group["params"], strict=True):
            kept, plain = {}, {}
            for key, value in inner.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    kept[key] = f"{_PREFIX}{name}.{key}"
                    tensors[kept[key]] = value.detach()
                elif value is None or isinstance(value, (bool, int, float, str)):
                    plain[key] = value
                else:
                    raise BadInput(f"optimizer state {key!r} of {name} is {type(value).__name__}; cannot be stored")
            parameters[name] = {"shape": list(parameter.shape), "tensors": kept, "values": plain}
    return tensors, {"optimizer": type(inner).__name__, "parameters": parameters, "groups": groups}


def load_optimizer_state(
    optimizer: Any, names: Names, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> list[str]:
    """Puts back what `optimizer_state` returned, wherever name and shape agree; group options too.

    A group takes the options of the saved group with the same `name`, else of the one it shares most parameters with,
    else of the one in its place when the number of groups is the same.

    Returns:
        names of parameters whose state starts fresh, because the saved run had none of that name and shape.

    Raises:
        BadInput: the optimizer is of another kind, or a parameter has no name.
        DamagedState: a tensor that the values name is missing.
    """
    inner = _unwrap(optimizer)
    if type(inner).__name__ != values["optimizer"]:
        raise BadInput(
            f"the state is of optimizer {values['optimizer']}, the run has {type(inner).__name__}; "
            "resume with the optimizer that the run was started with"
        )
    named = _named(inner, names)
    saved, fresh = values["parameters"], []
    for index, group in enumerate(inner.param_groups):
        own = [named[id(p)] for p in group["params"]]
        _load_options(group, _matching(group, own, index, len(inner.param_groups), values["groups"]))
        for name, parameter in zip(own, group["params"], strict=True):
            entry = saved.get(name)
            if entry is None or entry["shape"] != list(parameter.shape):
                fresh.append(name)
                continue
            state = dict(entry["values"])
            for key, label in entry["tensors"].items():
                if label not in tensors:
                    raise DamagedState(f"the state has no tensor {label!r}, which its optimizer entry names")
                state[key] = _placed(key, tensors[label], parameter, group)
            if state:
                inner.state[parameter] = state
            else:
                inner.state.pop(parameter, None)
    return fresh


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise BadInput(f"{type(optimizer).__name__} is no torch optimizer and holds none")
        optimizer = inner
    return optimizer


def _named(optimizer: torch.optim.Optimizer, names: Names) -> dict[int, str]:
    """`{id: name}` of the optimizer's own parameters, checked to be complete and unique."""
    table: dict[int, str] = {}
    if isinstance(names, Mapping):
        table.update(cast(Mapping[int, str], names))
    else:
        for name, parameter in names:
            table.setdefault(id(parameter), name)  # a tied parameter keeps its first name
    own: dict[int, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in table:
                shape = list(parameter.shape)
                raise BadInput(
                    f"optimizer group {index}, parameter {place} of shape {shape} has no name; add it to names"
                )
            own[id(parameter)] = table[id(parameter)]
    if len(set(own.values())) < len(own):
        twice = sorted(name for name in set(own.values()) if list(own.values()).count(name) > 1)
        raise BadInput(f"optimizer: several parameters are named {', '.join(twice)}; names must be unique")
    return own


def _option(key: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, tuple):
        return [_option(key, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise BadInput(f"optimizer group option {key!r} is {type(value).__name__}; cannot be stored")


def _load_options(group: dict[str, Any], saved: Mapping[str, Any] | None) -> None:
    for key, value in (saved or {}).items():
        present = group.get(key)
        if isinstance(present, Tensor):
            present.fill_(value)
        elif isinstance(present, tuple):
            group[key] = tuple(
                old.fill_(new) if isinstance(old, Tensor) else new for old, new in zip(present, value, strict=True)
            )
        else:
            group[key] = value


def _matching(
    group: Mapping[str, Any], own: list[str], index: int, count: int, saved: list[dict[str, Any]]
) -> Mapping[str, Any] | None:
    if "name" in group:
        for other in saved:
            if other["options"].get("name") == group["name"]:
                return other["options"]
    shared = [len(set(own) & set(other["parameters"])) for other in saved]
    if shared and max(shared) > 0:
        return saved[shared.index(max(shared))]["options"]
    return saved[index]["options"] if count == len(saved) else None


def _placed(key: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A copy where torch expects it: moments beside the parameter, step counters on the CPU unless a kernel counts."""
    if key != "step":
        return value.detach().to(device=parameter.device, copy=True)
    if group.get("fused"):
        return value.detach().to(device=parameter.device, dtype=torch.float32, copy=True)
    if group.get("capturable"):
        return value.detach().to(device=parameter.device, copy=True)
    return value.detach().to(device="cpu", copy=True)
