"""A stream for whoever chooses settings: the first experiences, their validation rows, and no test row. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ..data import Row, Rows
from ..errors import BadInput, ProtocolRefused
from .experience import Experience
from .rows import ImageRow
from .stream import Stream


class Withheld(Sequence):
    """Stands for test rows and holds none: only how many there are.

    Raises:
        ProtocolRefused: when one is read.
    """

    checked, labels = True, ()

    def __init__(self, count: int, name: str):
        self._count, self._name = count, name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: Any) -> NoReturn:
        raise ProtocolRefused(
            f"protocol.tuning: test rows of {self._name!r} were read while settings are chosen, which test rows may "
            "not decide; judge on validation rows (split='valid')"
        )


def row_key(row: Row) -> int:
    """A number that is equal for rows of equal content."""
    if isinstance(row, ImageRow):
        encoded = row.encoded()
        picture = row.image.tobytes() if encoded is None else encoded
        return hash((picture, *sorted((key, repr(value)) for key, value in row.fields.items())))
    return hash(tuple((key, _content(row[key])) for key in sorted(row)))


def _content(value: Any) -> int:
    return hash(value.tobytes() if hasattr(value, "tobytes") else repr(value))


def refuse_test_rows(experience: Experience) -> None:
    """Raises ProtocolRefused where validation rows, which decide something, are test rows too."""
    test = set(map(row_key, experience.test))
    shared = sum(row_key(row) in test for row in experience.valid) if test else 0
    if shared:
        raise ProtocolRefused(
            f"protocol.tuning: {shared} of the {len(experience.valid)} validation rows of {experience.name!r} are test "
            "rows too, and nothing may be decided on those; take them out (stream.validation draws from training rows)"
        )


def for_tuning(stream: Stream, experiences: int) -> Stream:
    """The first experiences of a stream with training and validation rows; later ones are not in it.

    Args:
        stream: what the settings are for. It is left as it is, its cursor too.
        experiences: how many; `last` is as in the whole stream.

    Raises:
        BadInput: the stream has fewer.
        ProtocolRefused: validation rows are test rows too.
    """
    if not 1 <= experiences <= (stream.length or experiences):
        raise BadInput(f"experiences: found {experiences}; the stream has {stream.length}, give 1 to {stream.length}")
    shown = []
    for index in range(experiences):
        whole = stream.experience(index)
        refuse_test_rows(whole)
        test: Rows = Withheld(len(whole.test), whole.name)
        shown.append(replace(whole, test=test, hash=whole.hash))
    # Classes that are only declared belong to what comes later; so does the end.
    made = Stream(shown, name=stream.name, scenario=stream.scenario, details=stream.details)
    made._experiences = shown
    return made
