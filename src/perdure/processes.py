"""Runs commands of the Python interpreter side by side, each in a process with one thread. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Small tensors gain nothing from a second thread, and processes side by side lose by it."""
PAUSE = 0.5
"""Seconds between two looks at what runs."""
PATIENCE = 30.0
"""Seconds in which a process that was asked to end may still save what it holds."""


@dataclass(frozen=True)
class Job:
    """One process: what a person calls it, the interpreter's arguments, and the file that takes all it prints."""

    name: str
    arguments: tuple[str, ...]
    log: Path


Finished = Callable[[Job, int], Iterable[Job]]
"""Told of a job's end with its exit code (negative: the signal that ended it); returns jobs to run in addition."""


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """Runs jobs on this machine, `number` at a time."""

    number: int

    def run(self, jobs: Sequence[Job], finished: Finished, tick: Callable[[], None] = nothing) -> None:
        """Runs all jobs in their order, and those that `finished` adds; `tick` is called twice a second.

        Ctrl-C is handed on once to what runs, which may then save; any other error ends it. Both go on to the caller.
        """
        waiting, running = deque(jobs), dict[Job, subprocess.Popen[bytes]]()
        try:
            while waiting or running:
                while waiting and len(running) < self.number:
                    job = waiting.popleft()
                    running[job] = _start(job)
                time.sleep(PAUSE)
                tick()
                for job, process in list(running.items()):
                    code = process.poll()
                    if code is not None:
                        del running[job]
                        waiting.extend(finished(job, code))
        except KeyboardInterrupt:
            _end(running.values(), signal.SIGINT)
            raise
        except BaseException:
            _end(running.values(), signal.SIGTERM)
            raise


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **ONE_THREAD},
            process_group=0,  # the terminal's Ctrl-C reaches us alone; a second one would break off what is being saved
        )


def _end(running: Iterable[subprocess.Popen[bytes]], how: signal.Signals) -> None:
    running = list(running)
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
    until = time.monotonic() + PATIENCE
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:  # Ctrl-C again: no patience
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
