"""A process of a sweep: `python -m perdure.sweep.worker FILE` trains trials until the file lists none that is free.

Several may share a file: each claims what it takes. What a trial finds lies in its own file. A trial that fails is
written down as failed and the next one begins; one that reaches for what tuning may not see ends the process with the
exit code of `ProtocolRefused`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import INTERRUPTED, NonFiniteLoss, PerdureError, ProtocolRefused
from ..registry import import_file
from .trials import Trial, read_result, write_result

BEGUN = "begun"
"""First word of the line that is printed before a trial; the second is its key."""


def work(order: Path) -> None:
    """Trains trials of `order`: JSON with `folder`, `imports` and `units`: the `trials` that belong to one process and
    the name of the file that `claim`s them.

    Raises:
        ProtocolRefused: a trial touched what tuning may not see.
        CannotWrite: a result cannot be written.
    """
    from ..streams import build_stream
    from ..streams.guarded import FirstExperiences

    listed = json.loads(order.read_text(encoding="utf-8"))
    for each in listed["imports"]:
        import_file(each)
    folder, stream, begun, watch = Path(listed["folder"]), None, {}, _Watch()
    for unit in listed["units"]:
        watch()  # before the claim, which nobody would take back
        try:
            (order.parent / unit["claim"]).touch(exist_ok=False)
        except FileExistsError:
            continue
        for trial in map(Trial.from_json, unit["trials"]):
            if read_result(trial, folder) is not None:
                continue
            print(BEGUN, trial.key, flush=True)
            if stream is None:  # the same for all trials
                stream = FirstExperiences(build_stream(trial.recipe.stream, trial.recipe.seed), trial.positions)
            state, facts = _attempt(trial, stream, begun, watch)
            write_result(trial, folder, state, **facts)
            _free_memory()


def _attempt(trial: Trial, stream: Any, begun: dict[str, Any], watch: _Watch) -> tuple[str, dict[str, Any]]:
    from .training import train_trial

    try:
        return "done", train_trial(trial.recipe, stream, begun, watch)
    except ProtocolRefused:
        raise
    except NonFiniteLoss as error:
        return "not finite", {"reason": str(error)}
    except Exception as error:  # out of memory, a value that a model refuses, a defect of a plug-in
        traceback.print_exc()
        lines = str(error).splitlines()
        return "failed", {"reason": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"}


class _Watch:
    """Called before a trial and after every step: ends the process once the sweep that started it is gone."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    def __call__(self, *_: Any) -> None:
        if os.getppid() != self._parent:
            print("the sweep that started this process is gone", flush=True)
            sys.exit(INTERRUPTED)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str]) -> None:
    try:
        work(Path(arguments[0]))
    except PerdureError as error:
        print(f"perdure: {error}", flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
