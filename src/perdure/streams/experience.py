"""One portion of a stream. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..data import Rows
from ..errors import BadInput
from .rows import as_rows, hash_rows, labels_of


@dataclass(frozen=True)
class Experience:
    """Rows that are learnt together, with the rows that test and tune what was learnt.

    Attributes:
        index: position in the stream, from 0.
        name: what reports call it.
        train, test, valid: rows (`perdure.data.Row`); labels become text. Validation rows never come from test rows.
        classes: labels that training rows of this experience bring: in a class-incremental stream these are new ones,
            elsewhere they may come again. Taken from the training rows where not given.
        task: task id, in task- and domain-incremental streams; the protocol says whether a method sees it.
        last: True for the last experience of a bounded stream.
        hash: sha256 over the rows in order and their splits; computed where not given.

    Raises:
        BadInput: there are no training rows, or a row is no mapping.
    """

    index: int
    name: str
    train: Rows
    test: Rows = ()
    valid: Rows = ()
    classes: tuple[str, ...] = ()
    task: int | None = None
    last: bool = False
    hash: str = ""

    def __post_init__(self) -> None:
        where = f"experience {self.index} ({self.name!r})"
        for split in ("train", "test", "valid"):
            rows = as_rows(getattr(self, split), f"{where}, {split} rows")
            object.__setattr__(self, split, rows)
        if not len(self.train):
            raise BadInput(f"{where} is empty: it has no training rows; remove it or give it rows")
        if not self.classes:
            object.__setattr__(self, "classes", tuple(labels_of(self.train)))
        else:
            object.__setattr__(self, "classes", tuple(str(label) for label in self.classes))
        if not self.hash:
            object.__setattr__(self, "hash", hash_rows(self.train, self.valid, self.test, f"{where}, "))

    def with_rows(self, **splits: Rows) -> Experience:
        """A copy with other `train`, `test` or `valid` rows and its own hash; the classes stay."""
        return replace(self, hash="", **splits)

    def describe(self) -> dict[str, Any]:
        """JSON-able summary: no rows, only counts."""
        return {
            "index": self.index,
            "name": self.name,
            "classes": list(self.classes),
            "task": self.task,
            "rows": {"train": len(self.train), "valid": len(self.valid), "test": len(self.test)},
            "hash": self.hash,
        }
