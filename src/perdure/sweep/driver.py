"""Plans the trials of a sweep, runs those that are not done, and gathers what they found. Imports no torch."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..comparison import plan
from ..errors import BadInput, CannotWrite, PerdureError, ProtocolRefused
from ..processes import Finished, Job
from ..recipe import Recipe, safe
from ..streams import build_stream
from ..streams.guarded import FirstExperiences
from .space import Space, short
from .trials import FINAL, Plan, Trial, plan_arm, read_result, units_of, write_result
from .worker import BEGUN

if TYPE_CHECKING:
    from ..progress import Progress

Results = dict[str, dict[str, Any]]
"""`Trial.key` -> what its file says."""
JOBS = ".jobs"
"""Folder of what processes share and print, beside those of the arms, whose names begin with no dot."""
LAST_CHARS = 2000
"""Of a log, shown where a process could not start."""


class Runner(Protocol):
    """What runs jobs: `processes.Processes`."""

    @property
    def number(self) -> int:
        """Jobs at a time."""
        ...

    def run(self, jobs: Sequence[Job], finished: Finished, tick: Callable[[], None]) -> None: ...


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every trial was checked; nothing has run yet.

    Attributes:
        recipe: what is swept, with what was typed over it. space: what is searched. plans: one for each arm.
        positions: of the experiences that are learnt. rows: hash of their training and validation rows.
        length: number of experiences of the stream.
        unjudged: names of those without validation rows.
        folder: where the trials' files lie.
        imports: Python files that register plug-ins.
    """

    recipe: Recipe
    space: Space
    plans: list[Plan]
    positions: tuple[int, ...]
    rows: str
    length: int
    folder: Path
    unjudged: list[str] = field(default_factory=list)
    imports: tuple[str, ...] = ()

    @property
    def trials(self) -> list[Trial]:
        return [trial for each in self.plans for trial in each.trials]


def plan_sweep(
    recipe: Recipe,
    space: Space,
    arms: Sequence[str] | None = None,
    *,
    experiences: int = 3,
    first: int = 0,
    folder: str | Path | None = None,
    imports: Sequence[str] = (),
) -> Sweep:
    """Everything that can be refused is refused here, before work starts.

    Args:
        recipe: what is swept; what the user typed over it holds for every trial.
        space: settings with their values.
        arms: arms of the recipe, methods, or either with `+head`; all arms when None, the recipe's own method where it
            has no arms.
        experiences: how many are learnt. first: position of the first of them.
        folder: of the trials; `runs/<recipe>/sweep` when None.
        imports: Python files that register plug-ins, for the processes.

    Raises:
        BadInput: an arm, a value or a number of experiences does not fit, or there are no validation rows.
        ProtocolRefused: a value needs what the protocol does not grant.
    """
    if experiences < 1 or first < 0:
        raise BadInput(f"--experiences {experiences}, --first {first}: learn at least 1, counted from 0")
    folder = Path("runs") / safe(recipe.name) / "sweep" if folder is None else Path(folder).expanduser()
    names: list[str | None] = list(recipe.arms) if arms is None else list(arms)
    if names:
        plan(recipe, [str(name) for name in names], (recipe.seed,), folder, option="--arms")
    stream = build_stream(recipe.stream, recipe.seed)
    if stream.length is None or first + experiences > stream.length:
        end = "is unbounded" if stream.length is None else f"has {stream.length} experiences"
        raise BadInput(f"--first {first} --experiences {experiences}: stream {stream.name!r} {end}; ask for fewer")
    positions = tuple(range(first, first + experiences))
    seen = FirstExperiences(stream, positions)
    unjudged = [each.name for each in seen if not len(each.valid)]
    if len(unjudged) == experiences:
        raise BadInput(
            f"stream: none of the experiences {', '.join(unjudged)} has validation rows, on which trials are judged; "
            "set stream.validation=0.1, or give the source validation rows"
        )
    points = space.points()
    plans = [plan_arm(recipe, name, space, points, positions, seen.hash) for name in names or [None]]
    for name in space.settings:
        if not name.startswith("training.") and all(name in each.without_effect for each in plans):
            raise BadInput(f"--grid {name}: {plans[0].without_effect[name]}, nor has another; name an arm that has it")
    if not any(each.trials for each in plans):
        reasons = "; ".join(f"{short(name)}: {why}" for name, why in plans[0].without_effect.items())
        raise BadInput(f"--grid: nothing of it has an effect in {', '.join(p.arm for p in plans)} ({reasons})")
    return Sweep(recipe, space, plans, positions, seen.hash, stream.length, folder, unjudged, tuple(imports))


# ---- running
def run_sweep(sweep: Sweep, runner: Runner, progress: Progress) -> Results:
    """Runs the trials that have not ended and returns what all of them found.

    A trial that failed is written down with its reason and stops no other. Trials that ended before are taken as they
    are; those that failed for want of memory or by a defect are tried again.

    Returns:
        `Trial.key` -> its result (`state`, and `loss` and `score` or the `reason`).

    Raises:
        ProtocolRefused: a trial touched what tuning may not see.
        CannotWrite: another sweep is at work in the folder, or the disk is full.
        PerdureError: a process could not start.
    """
    from ..state import RunLock

    with RunLock(sweep.folder), progress:
        results = {trial.key: read_result(trial, sweep.folder) for trial in sweep.trials}
        waiting = [trial for trial in sweep.trials if (results[trial.key] or {}).get("state") not in FINAL]
        for trial in waiting:  # of those that failed: nobody shall take the old end for the new one
            trial.path(sweep.folder).unlink(missing_ok=True)
        for claim in (sweep.folder / JOBS).glob("*.claim"):  # of a call that was killed
            claim.unlink()
        if len(waiting) < len(sweep.trials):
            progress.message(f"{len(sweep.trials) - len(waiting)} of {len(sweep.trials)} trials ended before")
        work = _Work(sweep, waiting, progress)
        if waiting:
            runner.run(work.jobs(runner.number), work.finished, work.tick)
        work.tick()
        found = {trial.key: read_result(trial, sweep.folder) for trial in sweep.trials}
        if all((result or {}).get("state") == "done" for result in found.values()):  # else the logs say more
            shutil.rmtree(sweep.folder / JOBS, ignore_errors=True)
    missing = [trial.words for trial in sweep.trials if found[trial.key] is None]
    if missing:
        raise PerdureError(f"sweep: {len(missing)} trials have no result, the first is {missing[0]}; run it again")
    return {key: result for key, result in found.items() if result is not None}


class _Work:
    """The trials of one call and the processes that share them."""

    def __init__(self, sweep: Sweep, waiting: Sequence[Trial], progress: Progress):
        self._sweep, self._progress = sweep, progress
        self._waiting, self._total = list(waiting), len(waiting)
        self._units = units_of(waiting)
        self._jobs = 0
        progress.start("trials", self._total)

    def jobs(self, number: int) -> list[Job]:
        """As many processes as run at a time; each takes the next free trials until there are none."""
        return [self._job() for _ in range(min(number, len(self._units)))]

    def _job(self) -> Job:
        from ..report.build import write_json

        self._jobs += 1
        folder = self._sweep.folder / JOBS
        order = folder / "order.json"
        if self._jobs == 1:
            units = [
                {"claim": f"{number}.claim", "trials": [trial.to_json() for trial in unit]}
                for number, unit in enumerate(self._units)
            ]
            write_json(order, {"folder": str(self._sweep.folder), "imports": list(self._sweep.imports), "units": units})
        name = f"process-{self._jobs}"
        return Job(name, ("-m", "perdure.sweep.worker", str(order)), folder / f"{name}.log")

    def tick(self) -> None:
        """Tells of trials that have ended since."""
        for trial in self._waiting:
            result = read_result(trial, self._sweep.folder)
            if result is None:
                continue
            self._waiting = [each for each in self._waiting if each is not trial]
            told = f"loss {result['loss']:.4f}" if "loss" in result else f"{result['state']}: {result['reason']}"
            done = self._total - len(self._waiting)
            self._progress.message(f"{time.strftime('%H:%M:%S')} [{done}/{self._total}] {trial.words}: {told}")
            self._progress.step(done, self._total)

    def finished(self, job: Job, code: int) -> list[Job]:
        """The trial that a process died at has failed; another process takes what is left."""
        if code == 0:
            return []
        log = job.log.read_text(encoding="utf-8", errors="replace") if job.log.exists() else ""
        begun = [line.partition(" ")[2] for line in log.splitlines() if line.startswith(f"{BEGUN} ")]
        if not begun or code > 0:  # a trial's own errors are caught
            kind = {each.exit_code: each for each in (BadInput, ProtocolRefused, CannotWrite)}.get(code, PerdureError)
            raise kind(f"sweep: a process ended with {_ending(code)}, {job.log} says: {_last(log)}")
        for number, unit in enumerate(self._units):
            if begun[-1] not in [trial.key for trial in unit]:
                continue
            for trial in unit:
                if trial.key == begun[-1] and read_result(trial, self._sweep.folder) is None:
                    write_result(trial, self._sweep.folder, "failed", reason=f"the process ended with {_ending(code)}")
            (job.log.parent / f"{number}.claim").unlink(missing_ok=True)  # what else is in it
        self.tick()
        return [self._job()] if self._waiting else []


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _last(log: str) -> str:
    """The error that a process ended with, else the end of what it printed."""
    return log.rpartition("perdure: ")[2][-LAST_CHARS:].strip()


# ---- the table
def read_table(path: Path) -> dict[str, Any]:
    """A results table: arm -> `best`, `trials` and what was searched; empty where there is none.

    Raises:
        BadInput: the file is no such table.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, dict) and "trials" in v for v in found.values()):
        raise BadInput(f"{path}: is no results table of a sweep; name another with --table, or move it away")
    return found
