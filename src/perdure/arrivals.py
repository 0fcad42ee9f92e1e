"""Rows that arrive one call at a time and are on disk before they are learnt. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput
from .streams import Experience, Spool

if TYPE_CHECKING:
    from .loop import Loop

_NAME = "arrival-"


def arrival(number: int, rows: list[Any]) -> Experience:
    return Experience(index=number, name=f"{_NAME}{number}", train=rows)  # type: ignore[arg-type]


def learn_spooled(learner: Loop, rows: list[Any], folder: str | Path) -> None:
    """Learns what the folder holds beyond the learner's state, then `rows`, which are written there first.

    Raises:
        BadInput: the folder belongs to another learner, or the rows do not fit; they are then not kept.
        CannotWrite: another process is in a call on the folder; or see `Spool`.
        DamagedState: see `Spool`.
    """
    from .state import RunLock

    with RunLock(Path(folder)):
        _learn_spooled(learner, rows, Spool(folder))


def _learn_spooled(learner: Loop, rows: list[Any], spool: Spool) -> None:
    spool.discard()  # rows of a call that was cut off while it wrote them
    for left in _unlearnt(learner, spool):
        learner.learn(left)
    if not rows:
        return
    number = learner.position.experience
    stored = replace(spool.add(arrival(number, rows)), index=number)
    try:
        learner.learn(stored)
    except BadInput:
        if learner.position.phase != "train":  # refused before its first step: it would be refused for ever
            spool.retract()
        raise


def _unlearnt(learner: Loop, spool: Spool) -> Iterator[Experience]:
    for index in range(len(spool)):
        experience, position = spool.experience(index), learner.position.experience
        number = experience.name.removeprefix(_NAME)
        if number == experience.name or not number.isdigit():
            raise BadInput(f"partial_fit.spool: {spool.path} holds {experience.name!r}, no arrival; use another folder")
        if int(number) > position:
            raise BadInput(
                f"partial_fit.spool: {spool.path} goes on with arrival {number}, this learner has learnt {position}; "
                "load the state that belongs to the folder, or use another folder"
            )
        if int(number) == position:
            yield replace(experience, index=position)
