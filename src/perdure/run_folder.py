"""What lies in the folder of a run, and who may write there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import yamltext
from .errors import BadInput, PerdureError
from .progress import Progress
from .recipe import PAGE_FILE, RECIPE_FILE, REPORT_FILE, Recipe, identity, load_recipe, recipe_hash
from .state import RunLock, StateStore, StateWarning, files, truncate
from .streams import PathSource, StreamConfig, build_stream
from .streams.sources_named import full_name

STATE_FOLDER, LOSSES_FILE, LOCK_FILE = "state", "losses.jsonl", ".lock"


def read_report(folder: str | Path) -> dict[str, Any] | None:
    """report.json of a run folder, or None where there is none.

    Raises:
        BadInput: the file is not a report.
        CannotWrite: the folder is closed to us.
    """
    from .report import build

    path = Path(folder) / REPORT_FILE
    with files.writing(path):
        if not path.is_file():
            return None
        path.open("rb").close()  # one that we may not read is none to delete
    try:
        return build.read_report(path)
    except BadInput as error:
        raise BadInput(f"{error}; delete the file and run `perdure run` again") from None


def undo(folder: str | Path, to: int | None = None) -> int:
    """Takes a run back to before an experience: states, losses and report are again what they were then.

    Args:
        folder: the run.
        to: index of the experience to return to before; the last one learnt when absent.

    Returns:
        Index of the experience that a new `perdure run` learns next.

    Raises:
        BadInput: the folder is no run, nothing was learnt, or no state from that boundary was kept.
        CannotWrite: the run is at work just now.
    """
    folder = Path(folder)
    if not (folder / STATE_FOLDER).is_dir():
        raise BadInput(f"{folder}: is not a run folder (it has no state); give the folder of a `perdure run`")
    with RunLock(folder), told(Progress().warn):
        store = StateStore(folder / STATE_FOLDER)
        kept = store.boundaries()
        if to is None:
            position = store.load().values["position"]
            # In the middle of an experience it is that one which is taken back, at a boundary the one before.
            begun = position["phase"] == "train" and position["step"] > 0
            to = int(position["experience"]) - (0 if begun else 1)
            if to < 0:
                raise BadInput(f"{folder}: nothing was learnt yet, so there is nothing to undo")
        if to not in kept:
            listed = ", ".join(map(str, kept)) or "none"
            raise BadInput(f"--to {to}: no state from before experience {to} was kept; kept: {listed}")
        # In this order a kill anywhere leaves a run that goes on from its newest state: no report says "complete" once
        # a state is gone, and no state counts on losses that are gone.
        then = store.load(boundary=to).values["run"]
        _put_report_back(folder, then)
        (folder / PAGE_FILE).unlink(missing_ok=True)
        store.rollback(boundary=to)
        if (folder / LOSSES_FILE).exists():
            truncate(folder / LOSSES_FILE, then["losses_bytes"])
    return to


def _put_report_back(folder: Path, then: dict[str, Any]) -> None:
    report = then.get("report")
    if report is None:  # before the first experience there was none
        (folder / REPORT_FILE).unlink(missing_ok=True)
        return
    from .config import ProbeConfig
    from .probing import Probing
    from .report.build import write_json
    from .run_report import read_losses

    curves: dict[str, Any] = {
        "loss": read_losses(folder / LOSSES_FILE, then["losses_bytes"]),
        "stored_bytes": (then.get("accounts") or {}).get("stored", []),
    }
    if then.get("probing") is not None:
        probing = Probing(ProbeConfig(**report["protocol"]["probe"]))
        probing.load_state_dict(then["probing"])
        curves["probe"] = probing.curves()
    write_json(folder / REPORT_FILE, {**report, "curves": curves})


def refuse_foreign_folder(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds anything but a run of this very recipe.

    The old recipe is read as one of today: settings that it does not name take their defaults, which is what they
    were when it ran.

    Raises:
        BadInput: names what is there and the first setting that differs.
        CannotWrite: the folder is closed to us.
    """
    path = folder / RECIPE_FILE
    with files.writing(folder):
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"output_dir: {folder} is a file; give a folder")
        begun = path.is_file()
        ours = [name for name in (REPORT_FILE, PAGE_FILE, LOSSES_FILE, STATE_FOLDER) if (folder / name).exists()]
    if not begun:
        if ours:
            raise BadInput(
                f"output_dir: {folder} holds {' and '.join(ours)} but no {RECIPE_FILE}, so it is no run of this "
                "recipe, and a run would write over it; give another output_dir"
            )
        return
    try:
        then = load_recipe(path)
    except PerdureError as error:
        raise BadInput(
            f"output_dir: {folder} holds a run whose {RECIPE_FILE} this version cannot read ({error}); give another "
            "output_dir"
        ) from None
    if recipe_hash(then) == recipe_hash(recipe):
        _refuse_changed_files(folder, recipe)
        return
    old, new = (yamltext.dump(identity(each)).splitlines() for each in (then, recipe))
    first = next((f"{a.strip()!r} there, {b.strip()!r} now" for a, b in zip(old, new, strict=False) if a != b), None)
    raise BadInput(
        f"output_dir: {folder} holds a run of another recipe ({first or 'another length'}); give another output_dir, "
        "or the old settings to go on with it"
    )


def _refuse_changed_files(folder: Path, recipe: Recipe) -> None:
    """A finished run is given back without its data; where these are single files, they must still be the same."""
    report = read_report(folder)
    if report is None or report["status"] != "complete" or not _from_files(recipe.stream):
        return
    then, now = (report["details"].get("stream") or {}).get("hash"), build_stream(recipe.stream, recipe.seed).hash
    if then not in (None, now):
        raise BadInput(
            f"stream: its hash was {then[:12]} in the finished run in {folder} and is {now[:12]} now; its files "
            "changed, so this would be another run. Restore them or give another output_dir"
        )


def _from_files(stream: StreamConfig) -> bool:
    """Whether all sources are files of the user's own that are still there. Folders of images take long to read."""
    paths: list[str] = []
    for source in stream.sources:
        if isinstance(source, PathSource):
            paths += [path for path in (source.path, source.test, source.valid) if path is not None]
        elif isinstance(source, str) and source != "stdlib" and full_name(source) is None:
            paths.append(source)
        else:
            return False
    return all(Path(path).is_file() for path in paths)


def leave_no_trace(folder: Path, missing: list[Path]) -> None:
    """Takes away what a run that was refused before its first step had written."""
    files.remove_folder(folder / STATE_FOLDER)
    for name in (RECIPE_FILE, LOSSES_FILE, LOCK_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in missing:
        with suppress(OSError):  # not empty: somebody else's
            path.rmdir()


@contextmanager
def told(say: Callable[[str], None]) -> Iterator[None]:
    """Hands warnings about states to `say`, so that a person reads the sentence and not where it came from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StateWarning)
        try:
            yield
        finally:
            for each in caught:
                say(str(each.message))
