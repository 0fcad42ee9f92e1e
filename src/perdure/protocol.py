"""Checks methods against each other and against what the protocol grants, before any work starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import ProtocolConfig, TrainingConfig
from .errors import BadInput, ProtocolRefused
from .methods import Method
from .registry import METHODS


def check_list(methods: Sequence[Method]) -> None:
    """Raises BadInput where a method stands twice, or two own the criterion or the prediction or exclude each other."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"method: {name} stands {names.count(name)} times in the list; keep one")
    for what in ("criterion", "predict"):
        owners = [method.name for method in methods if getattr(method, what) is not None]
        if len(owners) > 1:
            raise BadInput(f"method: {' and '.join(owners)} both own the {what}; keep one of them")
    for method in methods:
        others = [other.name for other in methods if other.adapts and other is not method]
        if method.adapts_alone and others:
            raise BadInput(
                f"method: {method.name} takes its query from the frozen host, and {' and '.join(others)} would adapt "
                f"it too; keep {method.name} or {' and '.join(others)}"
            )
    keeping = [method.name for method in methods if "rehearsal" in method.needs]
    if len(keeping) > 1:
        raise BadInput(f"method: {' and '.join(keeping)} both fill the one replay buffer; keep one of them")
    pretrain = [method.name for method in methods if getattr(method.config, "pretrain", None) is not None]
    if len(pretrain) > 1:
        raise BadInput(f"method: {' and '.join(pretrain)} both pretrain the host; say it at one of them")


def check_head(methods: Sequence[Method], objective: Any, head: Any, protocol: ProtocolConfig) -> None:
    """Checks an objective (or its class) against its head (or the head's class), None where there is none.

    Raises:
        BadInput: the head and the objective, the protocol or the methods do not fit each other.
        ProtocolRefused: the head needs boundaries.
    """
    by_text = head is not None and head.by_text
    if objective.by_text != by_text and head is not None:
        fitting = (
            f"use head {objective.default_head}; for other heads on image features set "
            "objective: {classification: {tower: vision}}"
            if objective.by_text
            else "use objective image_text, or another head"
        )
        raise BadInput(f"head: {head.name} does not fit objective {objective.name!r}; {fitting}")
    if head is not None and head.needs_boundaries and protocol.boundaries == "none":
        raise ProtocolRefused(
            f"protocol.boundaries: is none, but head {head.name} needs them; set it to train or use another head"
        )
    if protocol.label_space == "declared" and not by_text:
        raise BadInput(
            "protocol.label_space: is declared, but only a head that knows classes by their names (class_text) can "
            "predict one that was never learnt; set it to seen"
        )
    if head is not None and by_text and protocol.mask == "all":
        raise BadInput(
            f"protocol.mask: is all, but in training head {head.name} scores the classes learnt; use current or seen"
        )
    idle = [method.name for method in methods if method.learns]
    if head is not None and by_text and idle and not any(method.adapts for method in methods):
        raise BadInput(
            f"method: {', '.join(idle)} trains a head only, and head {head.name} has nothing that trains; use frozen "
            "for the model as it is, or a method that adapts it (finetune, lora, moram)"
        )


def check_drift(methods: Sequence[Any], name: str, config: Any) -> None:
    """Checks what corrects the statistics of head `name` against the methods (or their classes).

    Raises:
        BadInput: the features never move, or there is no buffer to take rows from.
    """
    asked = [field for field in ("recentre", "refresh") if getattr(config, field, None)]
    if asked and not any(method.adapts for method in methods):
        raise BadInput(
            f"head.{name}.{asked[0]}: corrects for features that move, and those of "
            f"{' and '.join(method.name for method in methods)} never do; remove it"
        )
    if "refresh" in asked and not any("rehearsal" in method.needs for method in methods):
        raise BadInput(
            f"head.{name}.refresh: takes rows from the replay buffer, and no method fills one; add er to the list of "
            "methods, or use recentre"
        )


def check_granted(methods: Sequence[Method], protocol: ProtocolConfig, training: TrainingConfig) -> None:
    """Checks what the methods need and the training takes against what is granted; each message names the field.

    Raises:
        ProtocolRefused: it is more than is granted.
        BadInput: the schedule has no end to go to.
    """
    if protocol.boundaries == "none" and training.lr_scheduler != "constant":
        raise BadInput(
            f"training.lr_scheduler: is {training.lr_scheduler}, but with protocol.boundaries none training has no end "
            "that it could reach; set it to constant"
        )
    for method in methods:
        method.check_protocol(protocol)
        if "task_id" in method.needs and protocol.task_id == "none":
            raise ProtocolRefused(f"protocol.task_id: is none, but {method.name} needs it; set it to train or test")
        if "task_id_at_test" in method.needs and protocol.task_id != "test":
            raise ProtocolRefused(
                f"protocol.task_id: is {protocol.task_id}, but {method.name} with these settings needs it at test too; "
                "set it to test"
            )
        if {"boundaries", "old_model", "all_data"} & method.needs and protocol.boundaries == "none":
            raise ProtocolRefused(f"protocol.boundaries: is none, but {method.name} needs them; set it to train")
        if getattr(method.config, "pretrain", None) is not None and protocol.boundaries == "none":
            raise ProtocolRefused(
                f"protocol.boundaries: is none, but method.{method.name}.pretrain must know where the first experience "
                "ends; set it to train or remove pretrain"
            )
        pretrain = getattr(method.config, "pretrain", None)
        if protocol.passes is not None and pretrain is not None and (pretrain.epochs or 0) > protocol.passes:
            raise ProtocolRefused(
                f"method.{method.name}.pretrain.epochs: is {pretrain.epochs}, but the protocol grants "
                f"{protocol.passes} pass(es) over each experience; lower it or raise protocol.passes"
            )
        wanted = method.requires_rehearsal()
        if wanted > protocol.rehearsal:
            raise ProtocolRefused(
                f"protocol.rehearsal: grants {protocol.rehearsal} samples, but {method.name} stores {wanted}; "
                f"raise it to {wanted} or lower the method's budget"
            )
        if "all_data" in method.needs and method.status != "upper bound":
            raise ProtocolRefused(f"method: {method.name} needs all data at once, which only an upper bound may have")
    if protocol.passes is not None and training.most_epochs > protocol.passes:
        raise ProtocolRefused(
            f"training.epochs: is {training.epochs}, but the protocol grants {protocol.passes} pass(es) over each "
            "experience; lower it or raise protocol.passes"
        )


def check_methods(methods: Sequence[tuple[str, Any]], protocol: ProtocolConfig, training: TrainingConfig) -> None:
    """Checks methods, as `METHODS.parse` gives them, against each other and the protocol: `check_list`, then
    `check_granted`.
    """
    built = [METHODS.get(name)(config) for name, config in methods]
    check_list(built)
    check_granted(built, protocol, training)


def declared_classes(classes: Sequence[str] | None, protocol: ProtocolConfig) -> list[str] | None:
    """The classes of a stream where the protocol makes them known in advance; None where they come as they come."""
    known = protocol.mask == "all" or protocol.label_space == "declared"
    return list(classes) if classes and known else None
