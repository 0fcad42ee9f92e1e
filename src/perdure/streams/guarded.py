"""The part of a stream that tuning may see: training and validation rows of its first experiences. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ..errors import ProtocolRefused
from .experience import Experience
from .rows import hash_rows, row_key
from .stream import Stream


class Withheld(Sequence):
    """Rows that cannot be read, counted or compared.

    Raises:
        ProtocolRefused: on every use.
    """

    checked = True  # for `as_rows`, which would look inside

    def __init__(self, what: str):
        self._what = what

    def _refuse(self, *_: Any) -> NoReturn:
        raise ProtocolRefused(
            f"protocol.tuning: {self._what}: tuning may not see them; it learns training rows and is judged on "
            "validation rows of the first experiences"
        )

    __len__ = __getitem__ = __iter__ = __contains__ = __reversed__ = __eq__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]
    index = count = _refuse

    @property
    def labels(self) -> NoReturn:
        self._refuse()


def refuse_test_rows(experience: Experience) -> None:
    """Raises ProtocolRefused where validation rows, which decide something, are test rows too."""
    test = set(map(row_key, experience.test))
    shared = sum(row_key(row) in test for row in experience.valid) if test else 0
    if shared:
        raise ProtocolRefused(
            f"protocol.tuning: {shared} of the {len(experience.valid)} validation rows of {experience.name!r} are test "
            "rows too, and nothing may be decided on those; take them out (stream.validation draws from training rows)"
        )


class FirstExperiences:
    """The experiences of a stream at some positions, as if it ended with the last of them.

    Their test rows are withheld, and no other experience can be had. Names of classes that the whole stream declares
    stay known, for protocols that declare them.

    Args:
        stream: a bounded one.
        positions: of the experiences that may be seen, in their order.

    Attributes:
        hash: sha256 over training and validation rows of what may be seen.

    Raises:
        IndexError: the stream ends before.
        ProtocolRefused: validation rows are test rows too.
    """

    def __init__(self, stream: Stream, positions: Sequence[int]):
        self.name, self.classes, self.positions = stream.name, stream.classes, tuple(positions)
        self._kept: dict[int, Experience] = {}
        for position in positions:
            whole = stream.experience(position)
            refuse_test_rows(whole)
            where = f"experience {position} ({whole.name!r})"
            seen = hash_rows(whole.train, whole.valid, (), f"{where}, ")
            test = Withheld(f"test rows of {where}")
            self._kept[position] = replace(whole, test=test, hash=seen, last=position == self.positions[-1])
        self.hash = hashlib.sha256("\n".join(each.hash for each in self._kept.values()).encode()).hexdigest()

    def experience(self, index: int) -> Experience:
        """The experience at `index` of the whole stream.

        Raises:
            ProtocolRefused: it is none of those that may be seen.
        """
        if index not in self._kept:
            allowed = ", ".join(map(str, self.positions))
            raise ProtocolRefused(
                f"protocol.tuning: experience {index} of stream {self.name!r}: tuning may not see it, but {allowed} "
                "alone"
            )
        return self._kept[index]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self._kept.values())
