"""Runs the arms of a recipe over seeds, each in its own folder, and compares what is finished. Imports no torch."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import ProtocolConfig, TrainingConfig
from .errors import BadInput, ForgotTooMuch, PerdureError
from .recipe import BLOCKS, PAGE_FILE, RECIPE_FILE, REPORT_FILE, Recipe, holds, run_folder, safe, source_of

COMPARISON_FILE, CSV_FILE, LATEX_FILE = "comparison.json", "comparison.csv", "comparison.tex"


def plan(
    recipe: Recipe,
    arms: Sequence[str] | None,
    seeds: Sequence[int],
    output_dir: str | Path | None = None,
    option: str = "--methods",
) -> dict[str, list[Recipe]]:
    """Every run of a comparison, checked before the first one starts.

    Args:
        recipe: what is compared; what the user typed over it holds for every arm.
        arms: names of its arms, of methods, or of either with `+head`; all arms of the recipe when None.
        seeds: a run is made for each.
        output_dir: `<output_dir>/<arm>/seed-<seed>` is a run's folder; `runs/<recipe>` when None.
        option: how the user names arms, for messages.

    Returns:
        arm -> its runs' recipes, in the order of the seeds.

    Raises:
        BadInput: no arm, no seed, one of them twice, or a setting that does not fit; names the arm. What was typed
            in vain is one too: a whole `method`, an `output_dir`, a setting of a method that no arm has.
        ProtocolRefused: an arm needs what the protocol does not grant; names the arm.
    """
    names = list(recipe.arms) if arms is None else list(arms)
    if not names:
        raise BadInput(f"methods: recipe {recipe.name} has no arms; name some with {option} a,b")
    if not seeds:
        raise BadInput("seeds: is empty; give at least one")
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"seeds: {', '.join(map(str, seeds))} holds one twice; each seed counts once")
    _refuse_what_arms_replace(recipe, option)
    root = comparison_folder(recipe, output_dir)
    runs: dict[str, list[Recipe]] = {}
    for name in names:
        try:
            first = recipe.with_arm(name, seed=seeds[0])
        except PerdureError as error:
            raise type(error)(f"arm {name}: {error}") from None
        if first.label in runs:
            raise BadInput(f"methods: {name} and another name the same arm {first.label}; keep one")
        runs[first.label] = []
        for seed in seeds:
            run = recipe.with_arm(name, seed=seed)
            runs[first.label].append(run.model_copy(update={"output_dir": run_folder(root, run).as_posix()}))
    _refuse_settings_of_no_arm(recipe, {label: members[0] for label, members in runs.items()}, option)
    return runs


def _refuse_what_arms_replace(recipe: Recipe, option: str) -> None:
    for path, value in recipe.typed:
        if path == ["method"]:
            raise BadInput(
                f"method: {value!r} was typed, but every arm of a comparison brings its own; choose arms with "
                f"{option}, or type a setting inside one, such as method.moram.rank=4"
            )
        if path == ["output_dir"]:
            raise BadInput(f"output_dir: is the folder of one run; a comparison of many takes --output-dir {value}")


def _refuse_settings_of_no_arm(recipe: Recipe, arms: Mapping[str, Recipe], option: str) -> None:
    for path, _ in recipe.typed:
        if len(path) > 1 and path[0] in BLOCKS:
            BLOCKS[path[0]].get(path[1])
            if not any(holds({path[0]: getattr(arm, path[0])}, path) for arm in arms.values()):
                raise BadInput(
                    f"{'.'.join(path)}: no arm has the {path[0]} {path[1]}; arms: {', '.join(arms)}; add one with "
                    f"{option}"
                )


def comparison_folder(recipe: Recipe, output_dir: str | Path | None = None) -> Path:
    """Where a comparison lies: `output_dir`, or the folder above the runs that `perdure run` makes.

    Raises:
        BadInput: the recipe names the folder of one run, and `output_dir` is None.
    """
    if output_dir is not None:
        return Path(output_dir).expanduser()
    if source_of(recipe, "output_dir") != "default":
        raise BadInput(
            f"output_dir: the recipe sets {recipe.output_dir}, the folder of one run; give the comparison its own "
            "with --output-dir, or take the line out of the recipe"
        )
    return Path("runs") / safe(recipe.name)


def compare(
    recipe: Recipe,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    reference: str | None = None,
    output_dir: str | Path | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Runs what is not finished yet, then writes `comparison.json`, its tables (CSV, LaTeX) and `report.html`.

    Finished runs are reused and unfinished ones go on where they stopped; a folder of another recipe is refused. A run
    that forgot more than the recipe allows is compared like any other; `forgot_too_much` tells of it.

    Args:
        recipe, arms, seeds, output_dir: as in `plan`.
        reference: the arm that differences are taken to, paired by seed; the first arm when None.
        progress: whether runs show progress bars.
        say: takes one line before each run.

    Returns:
        The comparison and the path of its page.

    Raises:
        BadInput: as `plan`, an unknown reference, or a folder that holds a page of something else.
        CannotWrite: a folder is locked by another run, full or not writable.
    """
    runs = plan(recipe, arms, seeds, output_dir)
    known = list(runs)
    reference = known[0] if reference is None else reference
    if reference not in runs:
        raise BadInput(f"reference: {reference!r} is not compared; arms: {', '.join(known)}")
    root = comparison_folder(recipe, output_dir)
    _refuse_other_pages(root)
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in known}
    total, number = len(known) * len(seeds), 0
    for position in range(len(seeds)):  # seed by seed, so that an early end still leaves whole pairs
        for name in known:
            number += 1
            reports[name].append(_run(runs[name][position], f"{number}/{total}", progress, say))
    paths = {name: [str(run.folder.relative_to(root)) for run in members] for name, members in runs.items()}
    notes = {name: note for name in known if (note := _note(recipe, name))}
    return write_comparison(root, reports, recipe.name, reference, paths, recipe.tuning or None, notes)


def _refuse_other_pages(root: Path) -> None:
    """A comparison's page replaces no other page than its own older one."""
    for name in (REPORT_FILE, RECIPE_FILE):
        if is_file(root / name):
            raise BadInput(f"output_dir: {root} is the folder of a run (it holds {name}); give another --output-dir")
    if is_file(root / PAGE_FILE) and not is_file(root / COMPARISON_FILE):
        raise BadInput(
            f"output_dir: {root} holds a {PAGE_FILE} that is no comparison's, and it would be written over; "
            "give another --output-dir"
        )


def is_file(path: Path) -> bool:
    """Whether there is a file; BadInput where we may not look."""
    try:
        return path.is_file()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; check the name and its permissions") from None


def _run(recipe: Recipe, place: str, progress: bool, say: Callable[[str], None] | None) -> dict[str, Any]:
    from . import run as runner

    before = runner.read_report(recipe.folder)
    if say is not None:
        state = "new" if before is None else "finished before" if before["status"] == "complete" else "goes on"
        say(f"[{place}] {recipe.label}, seed {recipe.seed}: {state}")
    try:
        report: Any = runner.run_recipe(recipe, progress=progress)
    except ForgotTooMuch as error:  # the run is whole; beside the others it shows how much
        report = runner.read_report(recipe.folder)
        if say is not None:
            say(str(error))
    _free_memory()
    return report


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _note(recipe: Recipe, name: str) -> str | None:
    arm = recipe.arms.get(name)
    return arm.note if arm is not None else None


def write_comparison(
    root: Path,
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
    name: str,
    reference: str | None,
    paths: Mapping[str, Sequence[str]],
    tuning: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Builds the comparison of finished runs and writes its JSON, CSV, LaTeX and page into `root`.

    Settings of the protocol that are younger than a run count with their defaults, as they did when it ran.
    """
    from .evaluation.compare import build_comparison
    from .report import build
    from .report.html import render_comparison
    from .report.tables import comparison_csv, comparison_latex

    defaults = ProtocolConfig.model_validate({}).model_dump(mode="json")
    reports = {  # the matrix of another tool has no protocol that is known
        arm: [
            {**report, "protocol": (defaults if report["protocol"] else {}) | report["protocol"]} for report in members
        ]
        for arm, members in reports.items()
    }
    comparison = build_comparison(reports, recipe=name, reference=reference, paths=paths, tuning=tuning, notes=notes)
    build.write_json(root / COMPARISON_FILE, comparison)
    build.write_text(root / CSV_FILE, comparison_csv(comparison))
    build.write_text(root / LATEX_FILE, comparison_latex(comparison))
    page = root / PAGE_FILE
    build.write_text(page, render_comparison(comparison, [report for arm in reports.values() for report in arm]))
    return comparison, page


# ---- pages of what lies on disk
def rebuild(
    folders: Sequence[str | Path], output_dir: str | Path | None = None, reference: str | None = None
) -> list[Path]:
    """Rebuilds report.html of runs and of comparisons; of several runs also a page that compares them.

    Args:
        folders: run folders, or folders of a comparison.
        output_dir: where the page of several runs goes; the folder above all of them when None. Where that holds a
            comparison of these very runs, it is rebuilt with its arms, notes and reference.
        reference: the arm that differences are taken to; that of before, or the first arm, when None.

    Returns:
        The pages, the last being the one that covers the most.

    Raises:
        BadInput: a folder holds no report, the runs do not belong into one comparison, its page would replace that
            of other runs, or the reference is no arm.
    """
    if not folders:
        raise BadInput("report: name at least one run folder")
    comparisons = [Path(each) for each in folders if is_file(Path(each) / COMPARISON_FILE)]
    runs = [(Path(each), _read_run(Path(each))) for each in folders if Path(each) not in comparisons]
    root = None
    if len(runs) > 1:
        root = _root_of([folder for folder, _ in runs], output_dir)
        if output_dir is None and is_file(root / COMPARISON_FILE):
            comparisons, runs, root = [*comparisons, root], [], None
    pages: list[Path] = []
    for folder in comparisons:
        pages.append(_rebuild_comparison(folder, pages, reference))
    for folder, report in runs:
        pages.append(write_run(folder, report))
    if root is not None:
        pages.append(_compare_runs(runs, root, reference))
    return pages


def _read_run(folder: Path) -> dict[str, Any]:
    from .report import build

    if not is_file(folder / REPORT_FILE):
        raise BadInput(f"report: {folder} holds no {REPORT_FILE}; name the folder of a run")
    return build.read_report(folder / REPORT_FILE)


def write_run(folder: Path, report: Mapping[str, Any], *, everything: bool = False) -> Path:
    """Writes the page of a run, and with `everything` its report.json too; returns the page's path."""
    from .report import build
    from .report.html import render_run

    if everything:
        build.write_json(folder / REPORT_FILE, report)
    render_run(report, folder / PAGE_FILE)
    return folder / PAGE_FILE


def _root_of(folders: Sequence[Path], output_dir: str | Path | None) -> Path:
    """Where the page that compares runs goes; refused where it would replace another page."""
    above = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    root = Path(output_dir) if output_dir is not None else above
    if is_file(root / REPORT_FILE):
        raise BadInput(f"report: {root} is itself a run, its page would be written over; give --output-dir")
    taken = any(is_file(root / name) for name in (COMPARISON_FILE, PAGE_FILE))
    if output_dir is None and taken and _runs_of(root) != {folder.resolve() for folder in folders}:
        raise BadInput(
            f"report: {root} holds a page of something other than these {len(folders)} runs, and it would be written "
            "over; give --output-dir"
        )
    return root


def _runs_of(root: Path) -> set[Path]:
    """The folders that the comparison in `root` is about; none where there is no comparison."""
    from .report import build

    if not is_file(root / COMPARISON_FILE):
        return set()
    return {(root / run).resolve() for run in build.read_comparison(root / COMPARISON_FILE)["runs"]}


def _rebuild_comparison(folder: Path, pages: list[Path], reference: str | None) -> Path:
    from .report import build

    old = build.read_comparison(folder / COMPARISON_FILE)
    reports: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, list[str]] = {}
    for row in old["rows"]:
        paths[row["arm"]] = [old["runs"][number] for number in row["runs"]]
        reports[row["arm"]] = [_read_run(folder / path) for path in paths[row["arm"]]]
        pages += [write_run(folder / path, r) for path, r in zip(paths[row["arm"]], reports[row["arm"]], strict=True)]
    notes = {row["arm"]: row["note"] for row in old["rows"] if row["note"]}
    return write_comparison(
        folder, reports, old["recipe"], reference or old["reference"], paths, old.get("tuning"), notes
    )[1]


def _compare_runs(runs: Sequence[tuple[Path, dict[str, Any]]], root: Path, reference: str | None) -> Path:
    reports: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, list[str]] = {}
    arms: dict[str, Any] = {}
    for folder, report in runs:
        # Two arms may share a name, but not all that was set.
        settings, name = _settings(report), report["details"].get("arm") or report["method"]
        label, number = name, 2
        while arms.setdefault(label, settings) != settings:
            label, number = f"{name} ({number})", number + 1
        reports.setdefault(label, []).append(report)
        paths.setdefault(label, []).append(os.path.relpath(folder.resolve(), root.resolve()))
    names = dict.fromkeys(report["name"] for _, report in runs)
    return write_comparison(root, reports, ", ".join(names), reference, paths)[1]


def _settings(report: Mapping[str, Any]) -> list[Any]:
    """All that must be equal in the runs of one arm. Settings younger than a run count with their defaults."""
    details = report["details"]
    methods = [{one["name"]: one.get("config")} for one in details.get("method") or []]
    plugins = [("method", methods), ("head", details.get("head")), ("objective", details.get("objective"))]
    training = {**TrainingConfig.model_validate({}).model_dump(mode="json"), **report["training"]}
    labels = [report[key] for key in ("method", "head", "model", "objective")]
    return [*labels, training, *(_completed(field, spec) for field, spec in plugins)]


def _completed(field: str, spec: Any) -> Any:
    try:
        pairs = BLOCKS[field].parse(spec, field)
    except (BadInput, KeyError, TypeError):  # empty, or a plug-in that is not here: as it was written down
        return spec
    return [{name: config.model_dump(mode="json")} for name, config in pairs]


# ---- in words
def verdict(comparison: Mapping[str, Any], arm: str, against: str) -> str | None:
    """One plain sentence on where an arm stands against another; None where either was not compared.

    Points are hundredths of accuracy; of perplexity its own unit. Judged by the differences within each seed: an
    interval that contains 0 settles nothing, fewer than 3 seeds are an illustration.
    """
    from .report import words

    rows = {row["arm"]: row for row in comparison["rows"]}
    if arm not in rows or against not in rows:
        return None
    figures = []
    for name in ("average_accuracy", "forgetting"):
        pair = [rows[each]["metrics"].get(name, {}).get("mean") for each in (arm, against)]
        if any(value is None for value in pair):
            return None
        figures.append(pair)
    (mine, theirs), (lost, lost_there) = figures
    better = mine > theirs if comparison["higher_is_better"] else mine < theirs
    word = "equal to" if mine == theirs else "above" if mine > theirs else "below"
    if words.percent(comparison["metric"]):
        gap = f"{abs(mine - theirs) * 100:.1f} points"
        told = (
            f"{mine * 100:.1f} against {theirs * 100:.1f} %, forgetting {lost * 100:.1f} against {lost_there * 100:.1f}"
        )
    else:
        gap = f"{abs(mine - theirs):.2f}"
        told = f"{mine:.2f} against {theirs:.2f}, forgetting {lost:.2f} against {lost_there:.2f}"
    judged = "" if mine == theirs else f" ({'better' if better else 'worse'})"
    where = f"{word} {against}" if mine == theirs else f"{gap} {word} {against}"
    proof = _proof(rows[arm], rows[against], comparison)
    return f"{arm} is {where} in average {comparison['metric']}{judged}: {told}{proof}."


def _proof(mine: Mapping[str, Any], theirs: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """What the seeds prove, by the differences within each seed: arms share rows and order there, not across seeds."""
    from .evaluation.compare import CLAIM_SEEDS, paired_difference
    from .report import words

    one, other = (_by_seed(row, "average_accuracy") for row in (mine, theirs))
    pair = paired_difference(one, other, comparison["higher_is_better"])
    seeds = pair["pairs"] if pair else min(len(mine["seeds"]), len(theirs["seeds"]))
    if pair is None or seeds < CLAIM_SEEDS:
        return f"; {'one seed' if seeds == 1 else f'{seeds} seeds'}, an illustration"
    metric = comparison["metric"]
    low, high = (words.signed("average_accuracy", pair[end], metric) for end in ("low", "high"))
    found = f"; {seeds} seeds, 95 % interval of the paired difference {low} to {high}"
    return f"{found}, which contains 0: not settled" if pair["low"] <= 0 <= pair["high"] else found


def _by_seed(row: Mapping[str, Any], figure: str) -> dict[int, float | None]:
    """Empty where the comparison comes from a version that did not write them down."""
    return dict(zip(row["seeds"], row.get("values", {}).get(figure, ()), strict=False))


def forgot_too_much(comparison: Mapping[str, Any]) -> str | None:
    """Which runs forgot more than `protocol.max_forgetting` allows; None where there is no such run or limit."""
    limit = comparison["protocol"].get("max_forgetting")
    if limit is None:
        return None
    found = [
        f"{row['arm']}, seed {seed}: {lost:.4f}"
        for row in comparison["rows"]
        for seed, lost in _by_seed(row, "forgetting").items()
        if lost is not None and lost > limit
    ]
    told = "; ".join(found)
    return (
        f"protocol.max_forgetting allows {limit}, forgetting is beyond it in {told}; all runs are kept"
        if found
        else None
    )
