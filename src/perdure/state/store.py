"""Checkpoints in one folder: written aside and renamed, checksummed, pruned, and read back only when they are whole."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from perdure.errors import BadInput, DamagedState
from perdure.state import files, schema
from perdure.state.tensors import check_tensors, describe, write_tensors
from perdure.state.values import decode_values, dump, encode_values, seal, unseal

TENSORS, DOCUMENT = "tensors.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{10,})-(\d{6,})(?:-boundary-(\d{6,}))?")
_SAVING, _REMOVING, _DAMAGED = ".saving-", ".removing-", "damaged-"


class StateWarning(UserWarning):
    """A checkpoint was passed over, or something of a state could not be restored."""


class _Damage(Exception):
    """Why a checkpoint cannot be trusted."""


@dataclass(frozen=True)
class State:
    """One whole checkpoint, read into memory; nothing here refers to the file any more."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    step: int
    path: Path
    boundary: int | None = None
    size: int = 0
    """Bytes of the checkpoint on the disk."""


class Entry(NamedTuple):
    """One checkpoint by its name; sorts from the oldest save to the newest."""

    serial: int
    step: int
    boundary: int | None
    path: Path


class StateStore:
    """The checkpoints of one run.

    A checkpoint is the folder `step-<step>-<serial>[-boundary-<k>]`; `serial` counts saves, so that two saves at one
    step have an order. `boundary=k` marks the state after k experiences, before experience k has been learnt.

    Args:
        folder: made at the first save.
        limit: newest checkpoints kept, of either kind; at least 2, so that one damaged checkpoint costs no run.
        keep_boundaries: newest boundary states that are kept even when they are older; all when None.

    Opening removes what a killed save or removal left behind.
    """

    def __init__(self, folder: Path, limit: int = 2, keep_boundaries: int | None = None) -> None:
        if limit < 2:
            raise BadInput(f"save_total_limit is {limit}; at least 2 checkpoints must be kept, one may be damaged")
        if keep_boundaries is not None and keep_boundaries < 0:
            raise BadInput(f"keep_boundaries is {keep_boundaries}; give 0 or more, or nothing to keep all")
        self.folder = Path(folder)
        self.limit = limit
        self.keep_boundaries = keep_boundaries
        self._remove_leftovers()

    def entries(self) -> list[Entry]:
        """Checkpoints by their names, oldest save first; contents are not looked at."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                step, serial, boundary = match.groups()
                found.append(Entry(int(serial), int(step), None if boundary is None else int(boundary), path))
        return sorted(found, key=lambda entry: (entry.serial, entry.path.name))

    def __len__(self) -> int:
        return len(self.entries())

    def boundaries(self) -> list[int]:
        """Boundaries that `load(boundary=k)` can return to, in rising order."""
        return sorted({entry.boundary for entry in self.entries() if entry.boundary is not None})

    # writing

    def save(
        self, step: int, tensors: dict[str, Tensor], values: dict[str, Any], *, boundary: int | None = None
    ) -> Path:
        """Writes a checkpoint and returns its folder; older ones are pruned only when it is safely on the disk.

        Args:
            step: optimizer steps taken so far.
            tensors: any strides, shared memory, devices; stored bit for bit.
            values: JSON values; NaN and infinities are allowed.
            boundary: number of experiences learnt, where this is the state between two experiences.

        Raises:
            BadInput: naming the tensor or the path of the value that cannot be stored; nothing is written.
            CannotWrite: full disk or no permission; earlier checkpoints stand and no part of this one is left.
        """
        for name, number in (("step", step), ("boundary", boundary)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
                raise BadInput(f"{name} is {number!r}; give a whole number, 0 or more")
        if not isinstance(values, dict):
            raise BadInput(f"values is {type(values).__name__}; give a dict")
        check_tensors(tensors)
        encoded = encode_values(values)
        with files.writing(self.folder):
            files.make_folder(self.folder, exist_ok=True)
            serial = 1 + max((entry.serial for entry in self.entries()), default=0)
            final = self.folder / _name(step, serial, boundary)
            self._write(final, {"step": step, "serial": serial, "boundary": boundary}, tensors, encoded)
        self._prune()
        return final

    def _write(self, final: Path, head: dict[str, Any], tensors: dict[str, Tensor], encoded: dict[str, Any]) -> None:
        temporary = self.folder / f"{_SAVING}{final.name}"
        files.remove_folder(temporary)
        held: int | None = None
        try:
            files.make_folder(temporary)
            held = files.hold_folder(temporary)
            written = write_tensors(temporary / TENSORS, tensors)
            text = dump(
                {
                    "schema": schema.SCHEMA,
                    "perdure": _version(),
                    **head,
                    "files": {TENSORS: {"sha256": written.sha256, "bytes": written.bytes}},
                    "tensors": describe(tensors),
                    "values": encoded,
                }
            )
            with files.new_file(temporary / DOCUMENT) as descriptor:
                files.write_all(descriptor, seal(text))
            files.sync_folder(temporary)
            files.rename(temporary, final)
        except BaseException:
            files.remove_folder(temporary)
            raise
        finally:
            if held is not None:
                os.close(held)

    def _prune(self) -> None:
        entries = self.entries()
        kept = {entry.path for entry in entries[-self.limit :]}
        newest = {entry.boundary: entry for entry in entries if entry.boundary is not None}
        marked = sorted(newest.values())
        spare = 0 if self.keep_boundaries is None else max(0, len(marked) - self.keep_boundaries)
        kept |= {entry.path for entry in marked[spare:]}
        for entry in entries:
            if entry.path not in kept:
                self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        # renamed first: a removal that is cut short must not look like a damaged checkpoint
        doomed = self.folder / f"{_REMOVING}{entry.path.name}"
        try:
            files.remove_folder(doomed)
            files.rename(entry.path, doomed)
        except OSError as error:
            warnings.warn(f"the old checkpoint {entry.path} could not be removed: {error}", StateWarning, stacklevel=4)
            return
        files.remove_folder(doomed)

    def _remove_leftovers(self) -> None:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.startswith(_REMOVING) or (path.name.startswith(_SAVING) and not files.is_held(path)):
                files.remove_folder(path)

    # reading

    def load(self, step: int | None = None, boundary: int | None = None) -> State:
        """Reads the newest whole checkpoint, or the newest whole one with this step or boundary.

        A checkpoint with a wrong checksum, a missing file or bad JSON is named in a `StateWarning`, renamed to
        `damaged-...`, and the one before is tried.

        Raises:
            DamagedState: no checkpoint is whole, or one was written by a newer perdure (which is left in place).
            BadInput: there is no checkpoint with this step or boundary, or it may not be read.
        """
        return self._load(step, boundary)[1]

    def rollback(self, step: int | None = None, boundary: int | None = None) -> State:
        """Returns to a checkpoint for good: reads it as `load` does, then removes all that was saved after it."""
        entry, state = self._load(step, boundary)
        for later in reversed(self.entries()):  # newest first: cut short, what remains is still one history
            if later.serial > entry.serial:
                self._discard(later)
        return state

    def _load(self, step: int | None, boundary: int | None) -> tuple[Entry, State]:
        every = self.entries()
        wanted = "".join(f" with {n} {v}" for n, v in (("step", step), ("boundary", boundary)) if v is not None)
        chosen = [e for e in reversed(every) if step in (None, e.step) and boundary in (None, e.boundary)]
        if not chosen and every:
            raise BadInput(f"no checkpoint{wanted} in {self.folder}; there are {', '.join(e.path.name for e in every)}")
        reasons = []
        for entry in chosen:
            try:
                return entry, _read(entry)
            except _Damage as damage:
                reasons.append(f"{entry.path.name}: {damage}")
                aside = self._set_aside(entry)
                message = f"the checkpoint {entry.path} is damaged: {damage}. {aside} The one before is used, if any."
                warnings.warn(message, StateWarning, stacklevel=3)
        found = "; ".join(reasons) or "the folder holds none"
        raise DamagedState(
            f"no whole checkpoint{wanted} in {self.folder} ({found}). Start again in another output_dir."
        )

    def _set_aside(self, entry: Entry) -> str:
        target = self.folder / f"{_DAMAGED}{entry.path.name}"
        copies = 1
        while target.exists():
            copies += 1
            target = self.folder / f"{_DAMAGED}{entry.path.name}-{copies}"
        try:
            files.rename(entry.path, target)
        except OSError as error:  # a folder that may only be read can still be resumed from elsewhere
            return f"It could not be renamed ({error})."
        return f"It was renamed to {target.name}."


def _name(step: int, serial: int, boundary: int | None) -> str:
    return f"step-{step:010d}-{serial:06d}" + ("" if boundary is None else f"-boundary-{boundary:06d}")


def _version() -> str:
    try:
        return importlib.metadata.version("perdure")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read(entry: Entry) -> State:
    try:
        raw = (entry.path / DOCUMENT).read_bytes()
        document = _parse(raw)
        schema.check_schema(document["schema"])
        tensors = _read_tensors(entry.path / TENSORS, document)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _Damage(f"{Path(error.filename or entry.path).name} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise _Damage(f"the disk cannot read it ({error})") from error
        raise BadInput(f"cannot read the checkpoint {entry.path}: {error}; check its permissions") from error
    if (document["step"], document["serial"], document["boundary"]) != (entry.step, entry.serial, entry.boundary):
        raise _Damage(f"{DOCUMENT} belongs to step {document['step']}, save {document['serial']}, not to this folder")
    values, tensors = schema.migrate(decode_values(document["values"]), tensors, document["schema"])
    size = len(raw) + document["files"][TENSORS]["bytes"]
    return State(tensors, values, entry.step, entry.path, entry.boundary, size)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        return unseal(raw)
    except ValueError as error:
        raise _Damage(f"{DOCUMENT} {error}") from None


def _read_tensors(path: Path, document: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    expected = document["files"][TENSORS]
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != expected["bytes"]:
            raise _Damage(f"{TENSORS} has {size} bytes, {expected['bytes']} were written")
        if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
            raise _Damage(f"{TENSORS} does not match its sha256: its bytes changed after they were written")
    try:
        with safe_open(path, framework="pt") as stored:
            # cloned: what the library returns is a view of the file, which may be pruned or altered
            tensors = {name: stored.get_tensor(name).clone() for name in document["tensors"]}
    except SafetensorError as error:
        raise _Damage(f"{TENSORS} cannot be read ({error})") from error
    if describe(tensors) != document["tensors"]:
        raise _Damage(f"{TENSORS} and {DOCUMENT} name different dtypes or shapes")
    return tensors
