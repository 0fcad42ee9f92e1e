"""Puts methods and heads together from settings and refuses what does not go together, before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .attachment import build_methods
from .config import ProtocolConfig
from .errors import BadInput
from .loading import derived_seed
from .methods import Method
from .protocol import check_drift, check_head, check_list
from .registry import HEADS, OBJECTIVES, Registry, explain
from .streams.rows import as_label

if TYPE_CHECKING:
    from .heads import Head
    from .objectives import Objective


def complete_methods(spec: Any) -> list[Method]:
    """Method objects of a `method` setting, ready to attach. A list in which no method adapts trains the whole model.

    Raises:
        BadInput: unknown name or setting, or two owners of the criterion or of the prediction.
    """
    methods = build_methods(spec)
    if not any(method.adapts or method.frozen_features for method in methods):
        methods = [*build_methods("finetune"), *methods]
    check_list(methods)
    return methods


def settings_of(value: Any, model: Any, name: str) -> Any:
    if isinstance(value, model):
        return value
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise BadInput(f"{name}: expected a mapping of settings, found {value!r}")
    try:
        return model(**(value or {}))
    except ValidationError as error:
        raise BadInput(explain(error, name, model)) from None


def as_labels(classes: Sequence[Any] | None) -> list[str] | None:
    """Class names as the labels of rows are: text."""
    names = dict.fromkeys(as_label(name, f"classes[{number}]") for number, name in enumerate(classes or ()))
    return list(names) or None


def caches_features(methods: Sequence[Method]) -> bool:
    """True if a head's features are computed once: none of the methods changes them or mixes other rows in."""
    return all(method.frozen_features and "rehearsal" not in method.needs for method in methods)


def check_combination(
    methods: list[Method],
    objective: Objective,
    head: Head | None,
    protocol: ProtocolConfig,
    classes: Sequence[str] | None,
) -> None:
    """Refuses settings that are each fine and do not fit together.

    Raises:
        BadInput: nothing would train, the classes are not declared where the mask needs them, or cached features would
            never see an augmentation.
    """
    check_head(methods, objective, head, protocol)
    if head is not None:
        check_drift(methods, head.name, head.config)
    if protocol.label_space == "declared" and not classes:
        raise BadInput("protocol.label_space: declared needs the classes in advance; give `classes`")
    idle = [method.name for method in methods if method.learns]
    if not objective.scores_classes and idle and not any(method.adapts for method in methods):
        raise BadInput(
            f"method: {', '.join(idle)} trains a head only, and objective {objective.name!r} has none of ours, so "
            "nothing would be learnt; use a method that adapts the model (finetune, lora, moram)"
        )
    if objective.needs_head and protocol.mask == "all" and not classes:
        raise BadInput("protocol.mask: all needs the classes in advance; give `classes` or use the mask seen")
    augment = getattr(objective.config, "augment", "none")
    if augment != "none" and objective.needs_head and caches_features(methods):
        raise BadInput(
            f"objective.{objective.name}.augment: is {augment}, but {' and '.join(method.name for method in methods)} "
            "computes the features once, of the images as they are; set it to none or use a method that trains them"
        )


def check_touched(methods: Sequence[Method]) -> None:
    """Raises BadInput where two attached methods overwrite one parameter: one would undo the other."""
    owners: dict[int, str] = {}
    for method in methods:
        for name, parameter in method.touched():
            other = owners.setdefault(id(parameter), method.name)
            if other != method.name:
                raise BadInput(f"method: {other} and {method.name} both overwrite {name}; keep one of them")


def check_routing(methods: Sequence[Method]) -> None:
    """Raises BadInput where two attached methods route at one site: their routings would be counted as one bank's."""
    owners: dict[str, str] = {}
    for method in methods:
        sites = {
            str(module.site)
            for kept in method.modules.values()
            for module in kept.modules()
            if getattr(module, "reports_routing", False)
        }
        for site in sorted(sites):
            other = owners.setdefault(site, method.name)
            if other != method.name:
                raise BadInput(
                    f"method: {other} and {method.name} both route at {site}, where routings are counted under one "
                    "name; give one of them other targets or layers, or keep one"
                )


def _one(registry: Registry, spec: Any, field: str) -> Any:
    pairs = registry.parse(spec, field)
    if len(pairs) > 1:
        raise BadInput(f"{field}: takes one {field}, found {', '.join(name for name, _ in pairs)}; keep one")
    ((name, config),) = pairs
    return registry.get(name)(config)


def choose_objective(spec: Any) -> Objective:
    """The objective that a setting names, or is."""
    from .objectives import Objective

    if isinstance(spec, Objective):
        return spec
    return _one(OBJECTIVES, spec, "objective")


def choose_head(spec: Any, objective: Objective) -> Head | None:
    """The head that a setting names, not built yet; None where the model's own head is used."""
    if objective.needs_head:
        return _one(HEADS, spec or objective.default_head, "head")
    if spec not in (None, "none"):
        raise BadInput(f"head: objective {objective.name!r} uses the model's own head; remove {spec!r}")
    return None


def build_heads(head: Head | None, methods: list[Method], width: int, seed: int) -> Head | None:
    """Builds the head for features of `width` and returns the auxiliary one, where there is one."""
    if head is None:
        return None
    head.build(width, derived_seed(seed, "head") % 2**31)
    return build_auxiliary_head(head, methods, width, seed)


def build_auxiliary_head(head: Head, methods: list[Method], width: int, seed: int) -> Head | None:
    """An adapter under a closed-form head is trained through a cosine head that is not used afterwards."""
    if not head.closed_form or all(method.frozen_features for method in methods):
        return None
    cosine = HEADS.get("cosine")
    auxiliary = cosine(cosine.Config())
    auxiliary.build(width, derived_seed(seed, "auxiliary") % 2**31)
    return auxiliary
