"""A sequence of experiences with a cursor. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import Rows
from ..errors import BadInput
from .experience import Experience
from .rows import as_rows


class Stream:
    """Experiences in the order in which they are learnt.

    Iterating hands out the experience at the cursor and moves the cursor on, so that an interrupted loop goes on where
    it stopped: a second loop over a finished stream gets nothing until `seek(0)`.

    Args:
        experiences: in order; their `index` and `last` are set here.
        name: what reports call the stream.
        scenario: how it was made, e.g. "class_incremental".
        classes: every label that may occur, where that is known and declared; None where it is not.
        details: JSON-able facts for `describe`.

    Raises:
        BadInput: there is no experience, or a label is outside the declared classes.
    """

    def __init__(
        self,
        experiences: Sequence[Experience],
        *,
        name: str = "stream",
        scenario: str = "custom",
        classes: Sequence[str] | None = None,
        details: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.scenario = scenario
        self.classes = None if classes is None else tuple(str(label) for label in classes)
        self.details = dict(details or {})
        self.cursor = 0
        if not experiences and type(self) is Stream:
            raise BadInput(f"stream {name!r} has no experiences; give it at least one")
        end = len(experiences) - 1
        self._experiences = [
            e if (e.index, e.last) == (i, i == end) else replace(e, index=i, last=i == end)
            for i, e in enumerate(experiences)
        ]
        for experience in self._experiences:
            self._check_labels(experience)

    # ---- making one
    @classmethod
    def of(
        cls,
        items: Iterable[Any],
        *,
        name: str = "stream",
        scenario: str = "custom",
        classes: Sequence[str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Stream:
        """A stream from one's own Python objects.

        Args:
            items: one for each experience: an `Experience`, `(train, test)`, `(train, test, valid)`, a mapping with
                `train` and optionally `test`, `valid`, `name`, `classes`, `task`, or simply a list of rows.
            name, scenario, classes, details: as for `Stream`.

        Raises:
            BadInput: the items can be read only once, or one of them is none of the above.
        """
        if hasattr(items, "__next__"):
            raise BadInput(
                f"stream {name!r}: the experiences come from an iterator, which cannot be read again after a crash; "
                "pass a list, or use Stream.from_generator(items, folder)"
            )
        if isinstance(items, (str, bytes, Mapping)) or not (isinstance(items, Iterable) or hasattr(items, "__len__")):
            raise BadInput(f"stream {name!r}: expected a list of experiences, found {type(items).__name__}")
        made = [as_experience(item, i) for i, item in enumerate(items)]
        return cls(made, name=name, scenario=scenario, classes=classes, details=details)

    from_experiences = of

    @staticmethod
    def from_generator(items: Iterable[Any], folder: str | Path, **options: Any) -> Stream:
        """An unbounded stream: what the iterator gives is written to `folder` before it is handed out.

        See `perdure.streams.spool.SpooledStream` for the options.
        """
        from .spool import SpooledStream

        return SpooledStream(items, folder, **options)

    # ---- reading
    @property
    def length(self) -> int | None:
        """Number of experiences; None where there is no end in sight."""
        return len(self._experiences)

    def __len__(self) -> int:
        length = self.length
        if length is None:
            raise TypeError(f"stream {self.name!r} is unbounded and has no len(); see `length` and `cursor`")
        return length

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Experience]:
        while True:
            try:
                experience = self.experience(self.cursor)
            except IndexError:
                return
            self.cursor += 1
            yield experience

    def experience(self, index: int) -> Experience:
        """The experience at `index`; the cursor stays.

        Raises:
            IndexError: the stream ends before.
        """
        if not 0 <= index < len(self._experiences):
            raise IndexError(f"stream {self.name!r} has experiences 0 to {len(self._experiences) - 1}, not {index}")
        return self._experiences[index]

    def seek(self, index: int) -> None:
        """Puts the cursor before the experience at `index`; `length` itself is the end.

        Raises:
            BadInput: the stream has no such place.
        """
        if not 0 <= index <= len(self._experiences):
            raise BadInput(
                f"seek: {index} is outside stream {self.name!r}, whose cursor goes from 0 to {len(self._experiences)}"
            )
        self.cursor = index

    @property
    def seen(self) -> list[Experience]:
        """Experiences before the cursor: those handed out so far."""
        return [self.experience(i) for i in range(self.cursor)]

    @property
    def hash(self) -> str:
        """sha256 over the experiences' hashes in order; of an unbounded stream, over those drawn so far."""
        return hashlib.sha256("\n".join(e.hash for e in self._experiences).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """JSON-able summary for reports: names, classes, counts and hash, no rows."""
        known = [self.experience(i) for i in range(len(self._experiences))]
        return {
            "name": self.name,
            "scenario": self.scenario,
            "hash": self.hash,
            "length": self.length,
            "experiences": [e.name for e in known],
            "classes": [list(e.classes) for e in known],
            "declared_classes": None if self.classes is None else len(self.classes),
            "tasks": [e.task for e in known] if any(e.task is not None for e in known) else None,
            "rows": {
                "train": [len(e.train) for e in known],
                "valid": [len(e.valid) for e in known],
                "test": [len(e.test) for e in known],
            },
            **self.details,
        }

    def __repr__(self) -> str:
        size = "unbounded" if self.length is None else f"{self.length} experiences"
        return f"Stream({self.name!r}, {self.scenario}, {size}, cursor={self.cursor})"

    def _check_labels(self, experience: Experience) -> None:
        if self.classes is None:
            return
        declared = set(self.classes)
        for label in experience.classes:
            if label not in declared:
                raise BadInput(_undeclared(experience, "classes", label, self.classes))
        for split in ("train", "valid", "test"):
            for i, row in enumerate(getattr(experience, split)):
                if "label" in row and row["label"] not in declared:
                    raise BadInput(_undeclared(experience, f"{split} row {i}", row["label"], self.classes))


def _undeclared(experience: Experience, where: str, label: str, classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else "")
    return (
        f"experience {experience.index} ({experience.name!r}), {where}: label {label!r} is outside the declared "
        f"classes ({shown}); correct the label or declare it"
    )


def as_experience(item: Any, index: int) -> Experience:
    """Reads what `Stream.of` accepts for one experience."""
    name = f"experience {index}"
    if isinstance(item, Experience):
        return item if item.index == index else replace(item, index=index)
    if isinstance(item, Mapping):
        known = {"train", "test", "valid", "name", "classes", "task"}
        if "train" not in item or set(item) - known:
            found = sorted(map(str, item))
            raise BadInput(f"{name}: expected a mapping with train, test, valid, name, classes, task; found {found}")
        options = {"name": name, **item}
        return Experience(index=index, **{**options, "classes": tuple(options.get("classes", ()))})
    if isinstance(item, tuple) and 2 <= len(item) <= 3 and not isinstance(item[0], Mapping):
        return Experience(index, name, *item)
    if isinstance(item, (str, bytes)):
        raise BadInput(f"{name}: expected rows, found {type(item).__name__}; build_stream reads files by name or path")
    rows: Rows = as_rows(item, name)
    return Experience(index, name, rows)
