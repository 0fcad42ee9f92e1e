"""Puts methods and heads together from settings and refuses what does not go together, before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .attachment import build_methods
from .config import ProtocolConfig
from .errors import BadInput
from .loading import derived_seed
from .methods import Method
from .protocol import check_list
from .registry import HEADS, explain

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
    try:
        return model(**(value or {}))
    except ValidationError as error:
        raise BadInput(explain(error, name, model)) from None


def check_combination(
    methods: list[Method], objective: Objective, protocol: ProtocolConfig, classes: Sequence[str] | None
) -> None:
    """Refuses settings that are each fine and do not fit together.

    Raises:
        BadInput: nothing would train, or the classes are not declared where the mask needs them.
    """
    idle = [method.name for method in methods if method.learns]
    if not objective.needs_head and idle and not any(method.adapts for method in methods):
        raise BadInput(
            f"method: {', '.join(idle)} trains a head only, and objective {objective.name!r} has none of ours, so "
            "nothing would be learnt; use a method that adapts the model (finetune, lora, moram)"
        )
    if objective.needs_head and protocol.mask == "all" and not classes:
        raise BadInput("protocol.mask: all needs the classes in advance; give `classes` or use the mask seen")


def build_head(spec: Any, objective: Objective, width: int, seed: int) -> Head | None:
    """The head that a setting names ("cosine" by default), or None where the model's own head is used."""
    if not objective.needs_head:
        if spec not in (None, "none"):
            raise BadInput(f"head: objective {objective.name!r} uses the model's own head; remove {spec!r}")
        return None
    ((name, config),) = HEADS.parse(spec or "cosine", "head")
    head = HEADS.get(name)(config)
    head.build(width, derived_seed(seed, "head") % 2**31)
    return head


def build_auxiliary_head(head: Head | None, methods: list[Method], width: int, seed: int) -> Head | None:
    """An adapter under a closed-form head is trained through a cosine head that is not used afterwards."""
    if head is None or not head.closed_form or all(method.frozen_features for method in methods):
        return None
    cosine = HEADS.get("cosine")
    auxiliary = cosine(cosine.Config())
    auxiliary.build(width, derived_seed(seed, "auxiliary") % 2**31)
    return auxiliary
