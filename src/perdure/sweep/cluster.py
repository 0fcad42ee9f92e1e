"""Runs the processes of a sweep on a Ray cluster that is there already (extra `ray`). Imports ray when it runs.

A process is one Ray task, which waits for a plain Python process as on one machine. Trials are told and results are
read through the folder of the sweep, which all nodes must therefore see under the same path.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..processes import ONE_THREAD, PATIENCE, PAUSE, Finished, Job, nothing

HANDED_ON = ("PYTHONPATH", "PERDURE_", "HF_", "TRANSFORMERS_", "TOKENIZERS_")
"""Beginnings of the names of environment variables that a process gets as they are here; all others are its node's."""
KILLED = -9
"""Exit code of a process whose node or worker died."""

ANSWERS_WITHIN = 10.0
"""Seconds that the head node has to answer."""


@dataclass(frozen=True)
class Ray:
    """Runs jobs as tasks of a Ray cluster, `number` at a time.

    Attributes:
        address: `auto` for the cluster of this machine or of RAY_ADDRESS, or `host:port` of its head node.
        number: jobs at a time. gpus: GPUs, or the part of one, that Ray sets aside for each.
    """

    address: str
    number: int
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not self.gpus >= 0.0:
            raise BadInput(f"--ray-gpus {self.gpus}: is 0 for none, a part of a GPU such as 0.5, or a whole number")
        try:
            import ray  # noqa: F401  # said before work starts
        except ImportError:
            raise BadInput(f"--ray {self.address}: needs ray; run: pip install 'perdure[ray]'") from None

    def run(self, jobs: Sequence[Job], finished: Finished, tick: Callable[[], None] = nothing) -> None:
        """As `Processes.run`; a job waits where the cluster has no free processor.

        Raises:
            BadInput: no cluster answers, it can never grant what a process asks for, or a node lacks perdure or does
                not see the folder.
        """
        ray = self._connected()
        try:
            self._run(ray, jobs, finished, tick)
        finally:
            ray.shutdown()

    def _run(self, ray: Any, jobs: Sequence[Job], finished: Finished, tick: Callable[[], None]) -> None:
        remote = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0)(run_job)
        environment = {key: value for key, value in os.environ.items() if key.startswith(HANDED_ON)}
        waiting, running = deque(jobs), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < self.number:
                    job = waiting.popleft()
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    task = remote.remote(job.arguments, str(job.log), str(Path.cwd()), environment)
                    running[task] = job
                ended, _ = ray.wait(list(running), num_returns=1, timeout=PAUSE)
                tick()
                for task in ended:
                    waiting.extend(finished(running.pop(task), self._code(ray, task)))
        except BaseException:  # Ctrl-C too: the tasks end their processes
            for task in running:
                ray.cancel(task, force=False)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)
            raise

    def _connected(self) -> Any:
        import ray

        address = os.environ.get("RAY_ADDRESS", self.address) if self.address == "auto" else self.address
        try:
            if address != "auto":  # ray itself asks a dead address for minutes
                socket.create_connection(_host_and_port(address), ANSWERS_WITHIN).close()
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"--ray {self.address}: no cluster answers ({_first_line(error)}); start one with `ray start --head`, "
                "or leave --ray out"
            ) from None
        has = ray.cluster_resources()
        for name, wanted in (("CPU", 1.0), ("GPU", self.gpus)):
            if has.get(name, 0.0) < wanted:
                ray.shutdown()
                raise BadInput(
                    f"--ray {self.address}: a process asks for {wanted:g} {name}, the whole cluster has "
                    f"{has.get(name, 0.0):g}; set --ray-gpus, or add a node"
                )
        return ray

    def _code(self, ray: Any, task: Any) -> int:
        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise BadInput(f"--ray {self.address}: {_first_line(error.cause or error)}") from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
            return KILLED


def run_job(arguments: Sequence[str], log: str, folder: str, environment: dict[str, str]) -> int:
    """On a node: runs the interpreter in `folder` with `arguments`, its output into `log`; returns its exit code.

    Raises:
        FileNotFoundError: the node does not see the folder.
    """
    if not Path(folder).is_dir() or not (Path(folder) / log).parent.is_dir():
        raise FileNotFoundError(
            f"node {socket.gethostname()} does not see {(Path(folder) / log).parent}; start the sweep in a folder that "
            "all nodes share, and let --output-dir lie in it"
        )
    with (Path(folder) / log).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
            env={**os.environ, **environment, **ONE_THREAD},
        )  # fmt: skip
        try:
            while process.poll() is None:  # a cancellation is no signal: it would not end a wait for the process
                time.sleep(PAUSE)
            return process.returncode
        finally:  # cancelled
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(PATIENCE / 2)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{address!r} is not auto or HOST:PORT")
    return host, int(port)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
