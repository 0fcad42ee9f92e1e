"""Keeps what cannot be read twice: rows are on disk before they are learnt. Imports no torch.

One file of records, each a line `length sha256 payload\\n` (length of the payload in bytes, first 16 hex digits of its
sha256, payload in JSON). A record is a row or the mark that closes an experience. A line that a crash tore is found by
its length and checksum and cut off when the file is opened; damage before the last closed experience is an error.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Row
from ..errors import BadInput, CannotWrite, DamagedState
from .experience import Experience
from .rows import ImageRow, as_row, as_rows, hash_rows, labels_of, sort_labels
from .stream import Stream, as_experience

SCHEMA = 1
FILE = "spool.jsonl"
_SPLITS = ("train", "valid", "test")
_END: Any = object()  # of the items; None may be one of them, and is refused


# ---- one record
def frame(payload: bytes) -> bytes:
    """Adds length and checksum to a payload without line ends."""
    return b"%d %s %s\n" % (len(payload), hashlib.sha256(payload).hexdigest()[:16].encode(), payload)


def unframe(line: bytes) -> bytes | None:
    """The payload of a line, or None if the line is torn or altered."""
    parts = line.split(b" ", 2)
    if len(parts) != 3 or not line.endswith(b"\n") or not parts[0].isdigit():
        return None
    payload = parts[2][:-1]
    good = len(payload) == int(parts[0]) and hashlib.sha256(payload).hexdigest()[:16].encode() == parts[1]
    return payload if good else None


def encode_value(value: Any, where: str) -> Any:
    """A value as JSON; arrays, bytes and images in base64.

    Raises:
        BadInput: the value is of a type that cannot be stored without pickle.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    if hasattr(value, "dtype") and value.dtype.kind in "biufc":
        data = base64.b64encode(value.tobytes()).decode()
        return {"$array": {"dtype": value.dtype.str, "shape": list(value.shape), "data": data}}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"$map": {key: encode_value(item, where) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [encode_value(item, where) for item in value]
    raise BadInput(
        f"{where}: a value of type {type(value).__name__} cannot be spooled; "
        "use text, numbers, bytes, NumPy arrays, lists or mappings with text keys"
    )


def decode_value(value: Any) -> Any:
    """The inverse of `encode_value`; tuples come back as lists."""
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    if "$array" in value:
        import numpy as np

        spec = value["$array"]
        flat = np.frombuffer(base64.b64decode(spec["data"]), dtype=np.dtype(spec["dtype"]))
        return flat.reshape(spec["shape"]).copy()
    return {key: decode_value(item) for key, item in value["$map"].items()}


def encode_row(row: Row, where: str) -> dict[str, Any]:
    if isinstance(row, ImageRow):
        encoded = row.encoded()
        row = {**row.fields, "image": row.image if encoded is None else encoded}
    try:
        return {str(key): encode_value(value, f"{where}, field {key!r}") for key, value in row.items()}
    except RecursionError:
        raise BadInput(f"{where}: lists or mappings are nested too deeply; flatten them or leave them out") from None


def decode_row(record: Mapping[str, Any], where: str) -> Row:
    return as_row({key: decode_value(value) for key, value in record.items()}, where)


# ---- the file
class SpooledRows(Sequence[Row]):
    """Rows of one split, read from the spool each time; only their places are in memory."""

    checked = True

    def __init__(self, path: Path, places: array[int], labels: tuple[str, ...], where: str):
        self._path, self.places, self.labels, self._where = path, places, labels, where

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self.places[index]
        with self._path.open("rb") as file:
            file.seek(place)
            payload = unframe(file.readline())
        if payload is None:
            raise DamagedState(
                f"{self._where}, row {index}: {self._path} changed since it was opened; restore the file"
            )
        return decode_row(json.loads(payload)["row"], f"{self._where}, row {index}")


class Spool:
    """An append-only store of experiences in a folder; what was closed is there again after a crash.

    Args:
        folder: created if absent; holds one file, `spool.jsonl`.

    Attributes:
        dropped: bytes of a torn last record that were cut off when the file was opened.

    Raises:
        DamagedState: a record before the last closed experience is damaged, or the schema is unknown.
        CannotWrite: the folder cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self.dropped = 0
        self._experiences: list[Experience] = []
        self._pending: dict[str, array[int]] = _no_places()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(
                f"spool folder {self.folder}: {error.strerror}; choose a folder that can be written"
            ) from None
        if self._size():
            self._scan()
        if not self._size():
            self._write([{"schema": SCHEMA}])
            _sync_folder(self.folder)

    def __len__(self) -> int:
        return len(self._experiences)

    @property
    def pending(self) -> int:
        """Training rows on disk that no experience holds yet."""
        return len(self._pending["train"])

    def experience(self, index: int) -> Experience:
        """A closed experience; its rows are read from disk when they are used."""
        return self._experiences[index]

    def append(self, row: Row, split: str = "train") -> None:
        """Writes one row; `close` makes an experience of the rows since the last one."""
        where = f"spool, experience {len(self)}, {split} row {len(self._pending[split])}"
        place = self._write([{"split": split, "row": encode_row(as_row(row, where), where)}], sync=False)[0]
        self._pending[split].append(place)

    def close(self, name: str | None = None, classes: Sequence[str] = (), task: int | None = None) -> Experience:
        """Makes the rows since the last call an experience; it is on disk when this returns.

        Raises:
            BadInput: there is no training row.
        """
        index = len(self)
        name = name if name is not None else f"experience {index}"
        if not self.pending:
            raise BadInput(f"experience {index} ({name!r}) is empty: it has no training rows; append rows first")
        splits = {split: self._rows(split, self._pending[split], index) for split in _SPLITS}
        mark = {
            "name": name,
            "classes": [str(label) for label in classes] or labels_of(splits["train"]),
            "task": task,
            "counts": {split: len(rows) for split, rows in splits.items()},
            "labels": {split: list(rows.labels) for split, rows in splits.items()},
            "hash": hash_rows(splits["train"], splits["valid"], splits["test"]),
        }
        self._write([{"experience": mark}])
        return self._close(mark)

    def add(self, experience: Experience) -> Experience:
        """Writes a whole experience and returns it as it will be read again. Rows appended before stay out of it.

        Raises:
            BadInput: rows are pending; close them first.
        """
        if self.pending:
            raise BadInput(f"spool {self.path}: {self.pending} rows are pending; call close() or discard() first")
        try:
            for split in _SPLITS:
                for row in getattr(experience, split):
                    self.append(row, split)
        except BaseException:
            self.discard()
            raise
        return self.close(experience.name, experience.classes, experience.task)

    def discard(self) -> int:
        """Cuts off rows that no experience holds; returns how many training rows that were."""
        places = [place for split in _SPLITS for place in self._pending[split]]
        count = self.pending
        if places:
            self._cut(min(places))
        self._pending = _no_places()
        return count

    def retract(self) -> None:
        """Cuts the experience closed last off again, as if it had never come.

        Raises:
            BadInput: rows are pending, or there is no experience.
        """
        if self.pending or not self._experiences:
            raise BadInput(f"spool {self.path}: {self.pending} rows are pending, {len(self)} experiences are closed")
        last = self._experiences.pop()
        self._cut(min(place for split in _SPLITS for place in getattr(last, split).places))

    # ---- inside
    def _rows(self, split: str, places: array[int], index: int, labels: Sequence[str] | None = None) -> SpooledRows:
        where = f"spooled experience {index}, {split}"
        if labels is None:
            labels = sort_labels(r["label"] for r in SpooledRows(self.path, places, (), where) if "label" in r)
        return SpooledRows(self.path, places, tuple(labels), where)

    def _close(self, mark: Mapping[str, Any]) -> Experience:
        index = len(self)
        splits = {s: self._rows(s, self._pending[s], index, mark["labels"][s]) for s in _SPLITS}
        experience = Experience(
            index,
            mark["name"],
            splits["train"],
            splits["test"],
            splits["valid"],
            classes=tuple(mark["classes"]),
            task=mark["task"],
            hash=mark["hash"],
        )
        self._experiences.append(experience)
        self._pending = _no_places()
        return experience

    def _write(self, records: Sequence[Mapping[str, Any]], sync: bool = True) -> list[int]:
        data = [frame(json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()) for record in records]
        start = self._size()
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(data))
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            self._cut(start)  # a full disk leaves half a record
            raise CannotWrite(
                f"spool {self.path}: {error.strerror}; free space, then run the same command again"
            ) from None
        return [start + sum(map(len, data[:i])) for i in range(len(data))]

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _cut(self, size: int) -> None:
        if self._size() > size:
            with self.path.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())

    def _scan(self) -> None:
        end, number, bad = 0, 0, None
        with self.path.open("rb") as file:
            for line in file:
                number += 1
                payload = unframe(line)
                if payload is None:
                    bad = bad or (number, end)
                elif bad is None:
                    self._read_record(json.loads(payload), end, number)
                elif b'"experience"' in payload[:14]:
                    raise DamagedState(
                        f"spool {self.path}, line {bad[0]}: a record that a later experience needs is damaged; "
                        "restore the file from a copy, or remove it to draw the stream anew"
                    )
                end += len(line)
        if bad is not None:
            self.dropped = end - bad[1]
            self._cut(bad[1])

    def _read_record(self, record: Mapping[str, Any], place: int, number: int) -> None:
        if number == 1:
            if record.get("schema") != SCHEMA:
                raise DamagedState(f"spool {self.path}: schema {record.get('schema')!r} is unknown, expected {SCHEMA}")
        elif "split" in record:
            self._pending[record["split"]].append(place)
        else:
            mark, found = record.get("experience", {}), {split: len(self._pending[split]) for split in _SPLITS}
            if mark.get("counts") != found:
                raise DamagedState(
                    f"spool {self.path}, line {number}: this experience has {mark.get('counts')} rows, before it lie "
                    f"{found}; restore the file from a copy, or remove it to draw the stream anew"
                )
            self._close(mark)


def _no_places() -> dict[str, array[int]]:
    return {split: array("q") for split in _SPLITS}


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- the stream over it
class SpooledStream(Stream):
    """An unbounded stream from a source that can be read only once.

    Each experience is on disk before it is handed out. Opened again on the same folder, the stream first gives what the
    folder holds and then draws on.

    Args:
        items: an iterator or generator. Each item is an experience in one of the forms that `Stream.of` takes, or, with
            `rows_per_experience`, a single row.
        folder: where rows are kept.
        rows_per_experience: makes an experience of so many rows; the last may be shorter. Rows that were drawn but not
            yet handed out are kept over a crash.
        restarts: True if `items` begins anew in each process (a file reader, a seeded simulator): what the folder
            holds is then drawn again, compared by hash, and skipped. False if it goes on
            where the world is (a queue, a sensor).
        name, classes, details: as for `Stream`.

    Raises:
        BadInput: with `restarts`, the items differ from those on disk; or an item has none of the forms.
    """

    def __init__(
        self,
        items: Iterable[Any],
        folder: str | Path,
        *,
        rows_per_experience: int | None = None,
        restarts: bool = False,
        name: str = "stream",
        scenario: str = "unbounded",
        classes: Sequence[str] | None = None,
        details: Mapping[str, Any] | None = None,
    ):
        super().__init__((), name=name, scenario=scenario, classes=classes, details=details)
        if rows_per_experience is not None and rows_per_experience < 1:
            raise BadInput(f"rows_per_experience: {rows_per_experience} is not a positive number of rows")
        self._items: Iterator[Any] = iter(items)
        self._size = rows_per_experience
        self._ended = False
        self.spool = Spool(folder)
        if rows_per_experience is None or restarts:
            self.spool.discard()  # half an experience, or rows that will come again
        self._experiences = [self.spool.experience(i) for i in range(len(self.spool))]
        for experience in self._experiences:
            self._check_labels(experience)
        if restarts:
            self._skip()

    @property
    def length(self) -> int | None:
        """None until the source has ended."""
        return len(self._experiences) if self._ended else None

    def experience(self, index: int) -> Experience:
        while index >= len(self._experiences):
            if self._ended or not self._draw():
                raise IndexError(
                    f"stream {self.name!r} ended after {len(self._experiences)} experiences, there is no {index}"
                )
        return super().experience(index)

    def seek(self, index: int) -> None:
        if index > 0:
            try:
                self.experience(index - 1)
            except IndexError as error:
                raise BadInput(f"seek: {error}") from None
        super().seek(index)

    def _draw(self) -> bool:
        if self._size is None:
            item = next(self._items, _END)
            if item is _END:
                self._ended = True
                return False
            if isinstance(item, Mapping) and "train" not in item:
                raise BadInput(f"stream {self.name!r}: the items are single rows; set rows_per_experience")
            made = as_experience(item, len(self._experiences))
            self._check_labels(made)
            made = self.spool.add(made)
        else:
            while self.spool.pending < self._size and (row := next(self._items, _END)) is not _END:
                self._check_row(row)
                self.spool.append(row)
            if not self.spool.pending:
                self._ended = True
                return False
            made = self.spool.close()
        self._experiences.append(made)
        return True

    def _check_row(self, row: Any) -> None:
        where = f"stream {self.name!r}, experience {len(self._experiences)}, row {self.spool.pending}"
        checked = as_row(row, where)
        if self.classes is not None and "label" in checked and checked["label"] not in self.classes:
            raise BadInput(
                f"{where}: label {checked['label']!r} is outside the declared classes; correct it or declare it"
            )

    def _skip(self) -> None:
        for old in self._experiences:
            if self._size is None:
                item = next(self._items, _END)
                found = "" if item is _END else as_experience(item, old.index).hash
            else:
                rows = [row for _, row in zip(range(len(old.train)), self._items, strict=False)]
                found = hash_rows(as_rows(rows, old.name), (), ())
            if found != old.hash:
                raise BadInput(
                    f"stream {self.name!r}, experience {old.index}: the source gives other rows than the spool; "
                    "use another folder, or restarts=False for a source that does not begin anew"
                )
