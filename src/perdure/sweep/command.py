"""What `perdure sweep` does from what was typed to the last line it prints. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, PerdureError
from ..processes import Processes
from ..progress import Progress
from ..recipe import load_recipe
from ..report.build import write_json
from .cluster import Ray
from .driver import Runner, plan_sweep, read_table, run_sweep
from .space import space_of
from .table import best_trials, shown, table_of, tuning_of, warnings_of
from .writing import new_text, target_of

if TYPE_CHECKING:
    from rich.console import Console

TABLE_FILE = "sweep.json"


@dataclass(frozen=True)
class Request:
    """What was typed; names as on the command line."""

    recipe: str
    overrides: tuple[str, ...] = ()
    arms: list[str] | None = None
    experiences: int = 3
    first: int = 0
    grid: tuple[str, ...] = ()
    random: int | None = None
    search_seed: int = 0
    processes: int = 2
    ray: str | None = None
    ray_gpus: float = 0.0
    output_dir: str | None = None
    table: str | None = None
    write: bool = False
    copy: str | None = None
    imports: tuple[str, ...] = ()


def sweep(request: Request, console: Console, *, progress: bool = True, runner: Runner | None = None) -> Path:
    """Runs a sweep to its end and prints what it found.

    Args:
        request: what was typed.
        console: takes the table and the warnings.
        progress: whether a line is shown for each trial.
        runner: of the processes; on this machine, or the cluster that `request.ray` names, when None.

    Returns:
        The results table's path.

    Raises:
        BadInput, ProtocolRefused, CannotWrite: as `plan_sweep`, `run_sweep` and `new_text`.
        PerdureError: no trial of some arm came to an end; all else is written.
    """
    runner = runner or _runner(request)
    recipe = load_recipe(request.recipe, request.overrides, compared=True)
    space = space_of(recipe, request.grid, request.random, request.search_seed)
    if request.copy is not None and not request.write:
        raise BadInput(f"--copy {request.copy}: is for --write; add it, or leave --copy out")
    target = target_of(request.recipe, request.copy) if request.write else None
    if request.table is not None:
        read_table(Path(request.table).expanduser())  # a file of something else is refused before work starts
    planned = plan_sweep(
        recipe, space, request.arms, experiences=request.experiences, first=request.first, folder=request.output_dir,
        imports=request.imports,
    )  # fmt: skip
    if target is not None:  # what cannot be written is said now
        new_text(*target, planned, {each.arm: each.trials[0] for each in planned.plans if each.trials}, {})
    path = planned.folder / TABLE_FILE if request.table is None else Path(request.table).expanduser()
    results = run_sweep(planned, runner, Progress(enabled=progress))
    new = table_of(planned, results)
    table = read_table(path) | new
    write_json(path, table)
    title = f"{recipe.name}: experiences {', '.join(str(each + 1) for each in planned.positions)}, seed {recipe.seed}"
    console.print(shown(new, title))
    for line in warnings_of(new):
        console.print(line, markup=False)
    if target is not None:
        from ..state import atomic_write_text

        own = load_recipe(request.recipe)
        tuning = tuning_of(own, own.seed, table, planned)
        atomic_write_text(target[0], new_text(*target, planned, best_trials(planned, results), tuning))
        console.print(f"written into {target[0]}", markup=False)
    _refuse_arms_without_result(new, path)
    return path


def _runner(request: Request) -> Runner:
    if request.ray is not None:
        return Ray(request.ray, request.processes, request.ray_gpus)
    if request.ray_gpus:
        raise BadInput(f"--ray-gpus {request.ray_gpus:g}: is for --ray; name the cluster with it, or leave it out")
    return Processes(request.processes)


def _refuse_arms_without_result(table: dict[str, dict[str, Any]], path: Path) -> None:
    lost = [arm for arm, entry in table.items() if entry["trials"] and entry["best"] is None]
    if lost:
        reason = table[lost[0]]["trials"][0]["failed"]
        raise PerdureError(f"sweep: no trial of {', '.join(lost)} came to an end ({reason}); all others are in {path}")
