"""Runs jobs on a Ray cluster that already exists; the extra `ray`. Imports no torch, and ray only when it is used.

Each job is a task of one CPU that starts a process, as on one machine. So all nodes need the same Python environment
and one file system for the working folder, the data and what the jobs write.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BadInput, PerdureError
from .processes import ONE_THREAD, PAUSE, Finished, Job, nothing

HANDED_ON = ("PERDURE_", "HF_", "PYTHONPATH")
"""Beginnings of the variables that a node's process gets from here."""


def _process(arguments: tuple[str, ...], log: str, folder: str, variables: dict[str, str]) -> int:
    """On a node: one process to its end; its exit code, negative for a signal."""
    with open(log, "wb") as output:
        return subprocess.run(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
            env={**os.environ, **variables}, check=False,
        ).returncode  # fmt: skip


@dataclass(frozen=True)
class RayCluster:
    """Runs jobs on the cluster at `address`, `number` at a time; `auto` is the one that this machine belongs to."""

    address: str
    number: int

    def run(self, jobs: Sequence[Job], finished: Finished, tick: Callable[[], None] = nothing) -> None:
        """As `processes.Processes.run`. An error here, Ctrl-C too, ends the tasks that run.

        Raises:
            BadInput: ray is not installed, or no cluster answers.
            PerdureError: a node was lost with its task.
        """
        ray = _connected(self.address)
        # Never again by itself: a job that was lost is told of, and the caller decides.
        remote = ray.remote(num_cpus=1, max_retries=0)(_process)
        variables = {k: v for k, v in os.environ.items() if k.startswith(HANDED_ON)} | ONE_THREAD
        waiting, running = deque(jobs), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < self.number:
                    job = waiting.popleft()
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    running[remote.remote(job.arguments, str(job.log), os.getcwd(), variables)] = job
                time.sleep(PAUSE)
                tick()
                ended, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
                for reference in ended:
                    job = running.pop(reference)
                    waiting.extend(finished(job, _code(ray, reference, job)))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            ray.shutdown()


def _connected(address: str) -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput('--ray: ray is not installed; run: pip install "perdure[ray]", or leave --ray out') from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadInput(f"--ray {address}: no cluster answers there ({error}); start one, or leave --ray out") from None
    return ray


def _code(ray: Any, reference: Any, job: Job) -> int:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise PerdureError(f"--ray: job {job.name} was lost ({reason}); run the command again, it goes on") from None
