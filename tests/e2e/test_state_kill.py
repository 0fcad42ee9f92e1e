"""A process that saves in a loop is killed by signal 9; the store always opens with the newest complete state."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.state import State, StateStore

# One process pays for the import and forks a child per kill. Orders are JSON lines on stdin: folder, first step, and
# where to kill: after some seconds from the first finished save, or at one numbered call that changes the disk.
NURSERY = """
import json, os, select, signal, sys, time
from pathlib import Path
import torch
from perdure.state import StateStore, files
torch.set_num_threads(1)

class DeadlyOS:
    calls = 0
    def __init__(self, kill_at):
        self.kill_at = kill_at
    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "mkdir", "makedirs", "rename", "close"):
            return real
        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.kill_at:
                if name == "write":  # half of it reaches the disk
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call

def content(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(40, 50, generator=generator), "count": torch.tensor(step)}
    return tensors, {"step": step, "rows": list(range(step % 7))}

def child(order, pipe):
    store = StateStore(Path(order["folder"]), keep_boundaries=2)
    step = order["first"]
    while True:
        if step == order["first"] + 3 and order["kill_at"]:
            files.os = DeadlyOS(order["kill_at"])
        tensors, values = content(step)
        store.save(step, tensors, values, boundary=step // 3 if step % 3 == 0 else None)
        os.write(pipe, step.to_bytes(4, "little"))
        step += 1
        if order["kill_at"] and step > order["first"] + 3:
            os._exit(0)

for line in sys.stdin:
    order = json.loads(line)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(order, write)
        finally:
            os._exit(1)
    os.close(write)
    if order["seconds"] is not None:
        select.select([read], [], [])
        time.sleep(order["seconds"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    told = b""
    while chunk := os.read(read, 1 << 16):
        told += chunk
    os.close(read)
    last = int.from_bytes(told[-4:], "little") if told else None
    print(json.dumps({"last": last, "status": os.waitstatus_to_exitcode(status)}), flush=True)
"""


class Nursery:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, folder: Path, first: int, *, seconds: float | None = None, kill_at: int = 0) -> dict[str, Any]:
        """Lets a child save from step `first` on and be killed; tells the last save that it saw return."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"folder": str(folder), "first": first, "seconds": seconds, "kill_at": kill_at}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.process.communicate()


def assert_complete(state: State) -> None:
    generator = torch.Generator().manual_seed(state.step)
    expected = {"w": torch.randn(40, 50, generator=generator), "count": torch.tensor(state.step)}
    assert state.tensors.keys() == expected.keys()
    assert all(torch.equal(state.tensors[name], expected[name]) for name in expected)
    assert state.values == {"step": state.step, "rows": list(range(state.step % 7))}


def opened(folder: Path) -> State:
    """Opens as a resumed run does: nothing may be found damaged, nothing half may be left."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = StateStore(folder, keep_boundaries=2)
        state = store.load()
        for entry in store.entries():
            assert_complete(store.load(step=entry.step))
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "damaged"))]
    return state


def test_killed_at_seeded_moments_the_newest_complete_state_is_there(tmp_path: Path, nursery: Nursery) -> None:
    moments = random.Random(20)
    first, inside = 0, 0
    for _ in range(14):
        told = nursery.run(tmp_path, first, seconds=moments.uniform(0, 0.04))
        assert told["status"] == -9
        inside += bool([path for path in tmp_path.iterdir() if path.name.startswith(".")])
        state = opened(tmp_path)
        assert state.step in (told["last"], told["last"] + 1)  # the kill may fall between the rename and the telling
        first = state.step + 1
    assert first > 14
    print(f"{inside} of 14 kills left a folder half written or half removed; {first} saves")


def test_killed_at_every_call_that_changes_the_disk(tmp_path: Path, nursery: Nursery) -> None:
    kill_at, landed, leftovers = 0, set(), 0
    while True:
        kill_at += 1
        folder = tmp_path / str(kill_at)
        told = nursery.run(folder, 1, kill_at=kill_at)
        if told["status"] == 0:  # the save needs fewer calls than that
            break
        assert told["status"] == -9 and told["last"] == 3
        leftovers += bool([path for path in folder.iterdir() if path.name.startswith(".")])
        state = opened(folder)
        assert state.step in (3, 4)
        landed.add(state.step)
        again = nursery.run(folder, state.step + 1, seconds=0.0)  # and the run goes on
        assert opened(folder).step >= again["last"] > state.step
        assert kill_at < 200
    assert landed == {3, 4} and leftovers > 5 and kill_at > 15
