"""One warm process that runs the real command line in forked children, and ends them where a test says.

As a script it reads orders (JSON lines) from standard input: `arguments` of the command, `folder` to work in, `at`: a
list of points. A point names a `where` of `POINTS`, a `number` (the n-th time that it is reached) and a `how`:
kill (signal 9), interrupt (Ctrl-C), twice (Ctrl-C two times), full (no byte fits on the disk from there on).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import perdure

POINTS = ("update", "document", "rename", "growth", "evaluate", "steps")


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (-9 where it was killed) and all that it printed."""

    code: int
    output: str


SOURCE = str(Path(perdure.__file__).parents[1])
"""The code under test, in the children too: a checkout need not be the one that is installed."""


class Nursery:
    """The test's end: starts the process, gives orders, waits for each."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCE}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, folder: Path, *arguments: str, at: tuple[dict[str, Any], ...] = ()) -> Done:
        """Runs `perdure ARGUMENTS` in `folder`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"arguments": list(arguments), "folder": str(folder), "at": list(at)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the nursery itself died; its standard error says why"
        return Done(**json.loads(line))

    def close(self) -> None:
        self.process.communicate()


def point(where: str, number: int = 1, how: str = "kill") -> dict[str, Any]:
    assert where in POINTS
    return {"where": where, "number": number, "how": how}


# ---- in the child
def strike(how: str) -> None:
    from perdure.state import files

    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how in ("interrupt", "twice"):
        for _ in range(2 if how == "twice" else 1):
            os.kill(os.getpid(), signal.SIGINT)
    else:

        def full(descriptor: int, data: Any) -> None:
            half = memoryview(data).cast("B")
            os.write(descriptor, half[: len(half) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        files.write_all = full


def count(number: int, how: str, before: bool, applies: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """A wrapper that strikes at the `number`-th call, before or after the call itself."""
    seen = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            mine = applies(*arguments)
            seen[0] += mine
            now = mine and seen[0] == number
            if now and before:
                strike(how)
            result = real(*arguments, **options)
            if now and not before:
                strike(how)
            return result

        return call

    return wrap


def arm(where: str, number: int, how: str) -> None:
    from perdure import loop, optim
    from perdure.learner import Learner
    from perdure.memory import AtomBank
    from perdure.methods import Method
    from perdure.registry import METHODS
    from perdure.state import files

    if where == "update":  # the optimizer has stepped, the method has not put back what must not move
        optim.Optimization.step = count(number, how, before=False)(optim.Optimization.step)
    elif where == "document":  # the tensors stand, the document that names them does not
        files.new_file = count(number, how, True, lambda path: path.name == "state.json")(files.new_file)
    elif where == "rename":  # both files stand, under a name that does not count
        files.rename = count(number, how, True, lambda old, new: old.name.startswith(".saving-"))(files.rename)
    elif where == "evaluate":
        Learner._evaluate_one = count(number, how, before=False)(Learner._evaluate_one)
    elif where == "steps":  # between the steps, where a run looks whether it shall stop
        loop.Loop._step = count(number, how, before=False)(loop.Loop._step)
    else:
        wrap = count(number, how, before=False)
        AtomBank.grow = count(4 * number, how, before=False)(AtomBank.grow)  # some layers have grown, others not
        for cls in {Method, *(METHODS.get(name) for name in METHODS.names())}:
            if "before_experience" in cls.__dict__ and cls.name != "moram":
                cls.before_experience = wrap(cls.before_experience)


def child(order: dict[str, Any], output: int) -> int:
    from perdure.cli import main

    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.chdir(order["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in order["at"]:
        arm(**each)
    try:
        main(order["arguments"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    import transformers

    from perdure import comparison, run
    from perdure.models import load_model
    from perdure.registry import HEADS, METHODS, OBJECTIVES
    from perdure.report import build, html, terminal
    from perdure.state import environment

    del transformers, comparison, run, build, html, terminal  # only to be warm
    for registry in (METHODS, HEADS, OBJECTIVES):
        registry.names()
    load_model({"scratch": {"family": "bert", "layers": 1, "width": 8, "heads": 1}})
    environment()  # asks git once for all children
    for line in sys.stdin:
        order = json.loads(line)
        path = Path(order["folder"]) / ".output"
        with open(path, "w+b") as output:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = child(order, output.fileno())
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            text = output.read().decode("utf-8", "replace")
        path.unlink()
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "output": text}), flush=True)


if __name__ == "__main__":
    serve()
