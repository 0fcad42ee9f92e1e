"""Durable files: every change to the disk that a state makes goes through here, with one mapping of errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perdure.errors import BadInput, CannotWrite, DamagedState

CHUNK = 1 << 24
"""Bytes handed to the kernel (and to the hash) at once."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error a user sees when `path` cannot be written: what was found and the remedy."""
    if error.errno in _FULL:
        cause, remedy = (
            "the disk or quota is full",
            "free some space or choose another output_dir, then repeat the command",
        )
    elif error.errno == errno.EFBIG:
        cause, remedy = "the file is beyond the size limit", "raise the limit (ulimit -f) or choose another output_dir"
    elif error.errno in _FORBIDDEN:
        cause, remedy = "writing is not permitted", "change the permissions or choose another output_dir"
    else:
        cause, remedy = error.strerror or str(error), "check the disk or choose another output_dir"
    return CannotWrite(f"cannot write {path}: {cause} ({error}). What was saved before is untouched; {remedy}.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns every OSError of the block into `CannotWrite` about `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def write_all(descriptor: int, data: Any) -> None:
    """Writes all of a bytes-like object; the kernel may take less than it is given."""
    view = memoryview(data).cast("B")
    while len(view):
        count = os.write(descriptor, view[:CHUNK])
        if count <= 0:
            raise OSError(errno.ENOSPC, "the system took no bytes")
        view = view[count:]


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_LOCKS:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """Descriptor of a file that must not exist yet; synced and closed at the end of the block."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, *, exist_ok: bool = False) -> None:
    """Makes a folder, with its parents where `exist_ok`."""
    if exist_ok:
        os.makedirs(path, exist_ok=True)
    else:
        os.mkdir(path)


def rename(old: Path, new: Path) -> None:
    """Renames inside one folder and makes that durable."""
    os.rename(old, new)
    sync_folder(new.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder and what is in it, as far as the system lets us; the next opening tries again."""
    shutil.rmtree(folder, ignore_errors=True)


def hold_folder(folder: Path) -> int:
    """Marks a temporary folder as in use by a living process; the kernel lets go when the process ends.

    Returns a descriptor to close. A file system without locks is no error: the lock of the run guards there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
    return descriptor


def is_held(folder: Path) -> bool:
    """Whether a living process is still writing this temporary folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(descriptor)
    return False


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 file as a whole: readers see the old text or the new one, never a part.

    Raises:
        CannotWrite: the disk is full or the folder not writable; the old text stands.
    """
    path = Path(path)
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    with writing(path):
        try:
            os.makedirs(path.parent, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # left by a killed process of the same id
                os.unlink(temporary)
            with new_file(temporary) as descriptor:
                write_all(descriptor, text.encode("utf-8"))
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def append_line(path: Path, text: str, *, sync: bool = False) -> int:
    """Appends one UTF-8 line and returns the file's length in bytes after it, for `truncate`.

    Args:
        sync: also wait until the line is on the disk. Without it a killed process loses nothing, a power cut may.

    Raises:
        BadInput: `text` holds a line break.
        CannotWrite: the line did not fit; the file is as it was before.
    """
    if "\n" in text or "\r" in text:
        raise BadInput(f"append_line {path}: text holds a line break at character {_first_break(text)}; give one line")
    path = Path(path)
    with writing(path):
        os.makedirs(path.parent, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, text.encode("utf-8") + b"\n")
                if sync:
                    os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, before)  # no half line
                raise
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)


def _first_break(text: str) -> int:
    return min(i for i in (text.find("\n"), text.find("\r")) if i >= 0)


def truncate(path: Path, offset: int) -> None:
    """Cuts an append-only log back to a recorded length in bytes, so that a resumed run writes each line once.

    Raises:
        DamagedState: the file is missing or shorter than `offset`: lines that the state counts on are gone.
        CannotWrite: the file cannot be changed.
    """
    path = Path(path)
    if offset < 0:
        raise BadInput(f"truncate {path}: offset is {offset}; give a length in bytes, 0 or more")
    size = path.stat().st_size if path.exists() else 0
    if size < offset:
        raise DamagedState(
            f"{path} has {size} bytes, but the state was saved when it had {offset}: lines of this log are lost. "
            "Put the file back, or start again in another output_dir."
        )
    if size == offset:
        return
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
