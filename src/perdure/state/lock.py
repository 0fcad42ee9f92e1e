"""One run per folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from perdure.errors import CannotWrite
from perdure.state import files

GRACE = 5.0
"""Seconds in which the forked workers of a killed run must have let its lock go."""

_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """Keeps a second run out of `folder` while this process lives; a context manager.

    The kernel's lock on the file `.lock` decides; process id and host in it are for the message. The lock of a dead
    process is gone by itself. Where the file system has no locks, the recorded process id decides.

    Raises:
        CannotWrite: another run holds the folder; the message names its process id and host.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> RunLock:
        """Takes the lock or raises; does not wait."""
        if self._descriptor is not None:
            raise CannotWrite(f"{self.path.parent} is locked by this very process already; release it first")
        with files.writing(self.path):
            os.makedirs(self.path.parent, exist_ok=True)
            descriptor = self._open()
            try:
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                files.write_all(descriptor, json.dumps(owner).encode("ascii") + b"\n")
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        _held.add(self)
        return self

    def _open(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor)
                same = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
            except FileNotFoundError:
                same = False
            except BaseException:
                os.close(descriptor)
                raise
            if same:
                return descriptor
            os.close(descriptor)  # the file was removed between opening and locking: lock the new one

    def _lock(self, descriptor: int) -> None:
        until = time.monotonic() + GRACE
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = self.owner()
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    # A dead owner's forked worker lets go as soon as it is scheduled.
                    if self._alive(owner) or time.monotonic() > until:
                        raise self._refusal(owner) from error
                    time.sleep(0.05)
                    continue
                if error.errno not in files.NO_LOCKS:
                    raise
                if self._alive(owner):
                    raise self._refusal(owner) from error
                return None

    def _alive(self, owner: dict[str, Any]) -> bool:
        """Whether the recorded owner may still run."""
        pid = owner.get("pid")
        if not isinstance(pid, int) or pid <= 0:
            return False
        if owner.get("host") != socket.gethostname():
            return True  # cannot be known from here
        if pid == os.getpid():
            return any(lock.path.absolute() == self.path.absolute() for lock in _held)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def owner(self) -> dict[str, Any]:
        """What the lock file says: pid, host, since; empty when it says nothing."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _refusal(self, owner: dict[str, Any]) -> CannotWrite:
        who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
        since = f" since {owner['since']}" if "since" in owner else ""
        return CannotWrite(
            f"{self.path.parent} is in use by another run: {who}{since}. Wait for it, stop it, or choose another "
            f"folder (output_dir, spool); if that process is gone for certain, remove {self.path}."
        )

    def release(self) -> None:
        """Gives the folder free; harmless when not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(self)
        try:
            os.ftruncate(descriptor, 0)  # the file stays: removing it would let two runs lock two files
        finally:
            os.close(descriptor)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _drop_in_child() -> None:
    # a forked data worker must not keep the folder locked after its parent was killed
    for lock in list(_held):
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
