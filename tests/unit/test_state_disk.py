"""Full disks and other refusals at every call that changes the disk: nothing saved is lost, no half folder is left."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.errors import BadInput, CannotWrite, DamagedState
from perdure.state import State, StateStore, StateWarning, append_line, atomic_write_text, files, truncate


def content(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3) * step, "n": torch.tensor(step)}
    return tensors, {"cursor": {"experience": step, "row": 3}, "loss": [0.1 * step, math.nan]}


def save(store: StateStore, step: int, boundary: int | None = None) -> Path:
    return store.save(step, *content(step), boundary=boundary)


def assert_holds(state: State, step: int) -> None:
    tensors, values = content(step)
    assert state.step == step
    assert state.tensors.keys() == tensors.keys()
    assert all(torch.equal(state.tensors[name], tensors[name]) for name in tensors)
    assert repr(state.values) == repr(values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# a disk that refuses


class FaultyOS:
    """The os module, except that one call that changes the disk fails (or takes only some bytes first)."""

    CHANGING = ("open", "write", "fsync", "mkdir", "makedirs", "rename", "replace")

    def __init__(self, fail_at: int, code: int = errno.ENOSPC, short: bool = False) -> None:
        self.calls, self.fail_at, self.code, self.short = 0, fail_at, code, short
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._guard(name, real) if name in self.CHANGING else real

    def _guard(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if name == "write" and self.short and self.calls < self.fail_at:
                return real(arguments[0], arguments[1][:7])
            if self.calls == self.fail_at:
                self.failed = name
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("short", [False, True])
def test_a_disk_that_fills_at_any_call_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    stages, fail_at = set(), 0
    while True:
        fail_at += 1
        folder = tmp_path / str(fail_at)
        store = StateStore(folder)
        save(store, 1)
        save(store, 2)
        faulty = FaultyOS(fail_at, short=short)
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore", StateWarning)  # pruning may be what fails
            patched.setattr(files, "os", faulty)
            try:
                save(store, 3)
            except CannotWrite as error:
                assert error.exit_code == 73 and "full" in str(error) and "free some space" in str(error)
                assert faulty.failed is not None
                assert {1, 2} <= {entry.step for entry in store.entries()}  # nothing is pruned for a save that failed
        stages.add(faulty.failed)
        assert not [name for name in names(folder) if name.startswith(".saving")], (fail_at, faulty.failed)
        newest = StateStore(folder).load()
        assert newest.step == 3 or (newest.step == 2 and faulty.failed)
        assert_holds(newest, newest.step)
        assert_holds(StateStore(folder).load(step=2), 2)
        save(store, 4)  # and the store goes on
        assert_holds(store.load(), 4)
        if faulty.failed is None:
            break
        assert fail_at < 2000
    assert stages == {"open", "write", "fsync", "mkdir", "makedirs", "rename", None}


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.EACCES, "permissions"), (errno.EFBIG, "ulimit"), (errno.EIO, "check the disk")]
)
def test_other_refusals_have_their_own_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    monkeypatch.setattr(files, "os", FaultyOS(3, code))
    with pytest.raises(CannotWrite, match=remedy):
        save(StateStore(tmp_path), 1)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(CannotWrite, match="run"):
        save(StateStore(tmp_path / "run"), 1)


FILL = """
import sys, torch
from pathlib import Path
from perdure.errors import CannotWrite
from perdure.state import StateStore
if sys.argv[2] == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = StateStore(Path(sys.argv[1]))
store.save(1, {"w": torch.full((2_000,), 1.0)}, {"step": 1})
try:
    store.save(2, {"w": torch.full((200_000,), 2.0)}, {"step": 2})
except CannotWrite as error:
    print(error)
else:
    raise SystemExit("the disk took it")
assert [entry.step for entry in store.entries()] == [1]
assert len(list(Path(sys.argv[1]).iterdir())) == 1
state = StateStore(Path(sys.argv[1])).load()
assert state.values == {"step": 1} and torch.equal(state.tensors["w"], torch.full((2_000,), 1.0))
store.save(3, {"w": torch.full((2_000,), 3.0)}, {"step": 3})
assert store.load().step == 3
"""


def fill(command: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    assert "ulimit" in fill([sys.executable, "-c", FILL, str(tmp_path / "run"), "limit"])


def test_a_real_full_disk(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=256k none "$0" && exec "$@"'
    for space in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        prefix = [*space, "sh", "-c", mount, str(tmp_path)]
        try:
            permitted = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            permitted = False
        if permitted:
            assert "full" in fill([*prefix, sys.executable, "-c", FILL, str(tmp_path / "run"), "disk"])
            return
    pytest.skip("mounting a tmpfs is not permitted here")


# single files


def test_atomic_text_is_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "report.json"
    atomic_write_text(path, "old \u2713\n")
    fail_at, failed = 0, "first"
    while failed is not None:
        fail_at += 1
        faulty = FaultyOS(fail_at, short=True)
        with monkeypatch.context() as patched:
            patched.setattr(files, "os", faulty)
            try:
                atomic_write_text(path, "new\n" * 20)
            except CannotWrite as error:
                assert "report.json" in str(error)
        failed = faulty.failed
        assert path.read_text(encoding="utf-8") in ("old \u2713\n", "new\n" * 20)
        assert names(path.parent) == ["report.json"]
        assert failed is not None or path.read_text(encoding="utf-8") == "new\n" * 20
        atomic_write_text(path, "old \u2713\n")
    assert fail_at > 5


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    assert append_line(path, "\u00e9") == 3
    for fail_at in (2, 3, 4, 5):  # makedirs, open, then a write of 7 bytes, then the one that fails
        with monkeypatch.context() as patched:
            patched.setattr(files, "os", FaultyOS(fail_at, short=True))
            with pytest.raises(CannotWrite, match="log.jsonl"):
                append_line(path, "0123456789" * 4, sync=True)
        assert path.read_bytes() == b"\xc3\xa9\n"
    assert append_line(path, "b", sync=True) == 5
    with pytest.raises(BadInput, match="character 1"):
        append_line(path, "a\nb")


def test_a_log_is_cut_back_to_what_the_state_knows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    truncate(path, 0)
    assert not path.exists()
    known = append_line(path, "kept")
    append_line(path, "written after the last checkpoint")
    path.write_bytes(path.read_bytes() + b"half a li")
    truncate(path, known)
    truncate(path, known)
    assert path.read_text() == "kept\n"
    with pytest.raises(DamagedState, match=r"5 bytes.*had 6"):
        truncate(path, 6)
    with pytest.raises(BadInput, match="offset is -1"):
        truncate(path, -1)
