"""Puts methods and heads together from settings and refuses what does not go together, before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .config import ProtocolConfig, TrainingConfig
from .errors import BadInput, ProtocolRefused
from .loading import derived_seed
from .methods import Method
from .registry import HEADS, METHODS, explain

if TYPE_CHECKING:
    from .heads import Head
    from .objectives import Objective


def build_methods(spec: Any) -> list[Method]:
    """Method objects of a `method` setting, ready to attach. A list in which no method adapts trains the whole model.

    Raises:
        BadInput: unknown name or setting, or two owners of the criterion or of the prediction.
    """
    if isinstance(spec, Method):
        spec = [spec]
    methods = []
    for item in spec if isinstance(spec, (list, tuple)) else [spec]:
        if isinstance(item, Method):
            methods.append(item)
        else:
            methods += [METHODS.get(name)(config) for name, config in METHODS.parse(item, "method")]
    if not any(method.adapts or method.frozen_features for method in methods):
        methods.insert(0, METHODS.get("finetune")(METHODS.get("finetune").Config()))
    for what in ("criterion", "predict"):
        owners = [method.name for method in methods if getattr(method, what) is not None]
        if len(owners) > 1:
            raise BadInput(f"method: {' and '.join(owners)} both own the {what}; keep one of them")
    return methods


def settings_of(value: Any, model: Any, name: str) -> Any:
    if isinstance(value, model):
        return value
    try:
        return model(**(value or {}))
    except ValidationError as error:
        raise BadInput(explain(error, name, model)) from None


def check_protocol(methods: list[Method], protocol: ProtocolConfig, training: TrainingConfig) -> None:
    """Refuses methods that need more than the protocol grants.

    Raises:
        ProtocolRefused: names the method, what it needs and how to grant it.
    """
    for method in methods:
        if "task_id" in method.needs and protocol.task_id == "none":
            raise ProtocolRefused(f"method {method.name!r} needs the task id; set protocol.task_id: train or test")
        if "boundaries" in method.needs and protocol.boundaries == "none":
            raise ProtocolRefused(f"method {method.name!r} needs boundaries; set protocol.boundaries: train")
        wanted = method.requires_rehearsal()
        if wanted > protocol.rehearsal:
            raise ProtocolRefused(
                f"method {method.name!r} stores {wanted} samples, the protocol grants {protocol.rehearsal}; "
                f"set protocol.rehearsal: {wanted} or a smaller budget"
            )
    if protocol.passes is not None and training.epochs > protocol.passes:
        raise ProtocolRefused(
            f"training.epochs is {training.epochs}, the protocol grants {protocol.passes} pass(es); "
            "lower training.epochs or raise protocol.passes"
        )


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
