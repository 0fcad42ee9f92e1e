"""Runs the arms of a recipe over seeds, each in its own folder, and compares what is finished. Imports no torch."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import BadInput, ForgotTooMuch
from .recipe import Recipe, run_folder, safe

COMPARISON_FILE, PAGE_FILE, REPORT_FILE = "comparison.json", "report.html", "report.json"


def plan(
    recipe: Recipe, arms: Sequence[str] | None, seeds: Sequence[int], output_dir: str | Path | None = None
) -> dict[str, list[Recipe]]:
    """Every run of a comparison, checked before the first one starts.

    Args:
        recipe: what is compared; what the user typed over it holds for every arm.
        arms: names of its arms, of methods, or of either with `+head`; all arms of the recipe when None.
        seeds: a run is made for each.
        output_dir: `<output_dir>/<arm>/seed-<seed>` is a run's folder; `runs/<recipe>` when None.

    Returns:
        arm -> its runs' recipes, in the order of the seeds.

    Raises:
        BadInput: no arm, no seed, one of them twice, or a setting that does not fit; names the arm.
    """
    names = list(recipe.arms) if arms is None else list(arms)
    if not names:
        raise BadInput(f"methods: recipe {recipe.name} has no arms; name some with --methods a,b")
    if not seeds:
        raise BadInput("seeds: is empty; give at least one")
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"seeds: {', '.join(map(str, seeds))} holds one twice; each seed counts once")
    root = comparison_folder(recipe, output_dir)
    runs: dict[str, list[Recipe]] = {}
    for name in names:
        try:
            first = recipe.with_arm(name, seed=seeds[0])
        except BadInput as error:
            raise BadInput(f"arm {name}: {error}") from None
        if first.label in runs:
            raise BadInput(f"methods: {name} and another name the same arm {first.label}; keep one")
        runs[first.label] = []
        for seed in seeds:
            run = recipe.with_arm(name, seed=seed)
            runs[first.label].append(run.model_copy(update={"output_dir": run_folder(root, run).as_posix()}))
    return runs


def comparison_folder(recipe: Recipe, output_dir: str | Path | None = None) -> Path:
    """Where a comparison lies: `output_dir`, or the folder above the runs that `perdure run` makes."""
    return Path(output_dir).expanduser() if output_dir is not None else Path("runs") / safe(recipe.name)


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
    """Runs what is not finished yet, then writes `comparison.json` and `report.html`.

    Finished runs are reused and unfinished ones go on where they stopped; a folder of another recipe is refused.

    Args:
        recipe, arms, seeds, output_dir: as in `plan`.
        reference: the arm that differences are taken to, paired by seed; the first arm when None.
        progress: whether runs show progress bars.
        say: takes one line before each run.

    Returns:
        The comparison and the path of its page.

    Raises:
        BadInput: as `plan`, or an unknown reference.
        CannotWrite: a folder is locked by another run, full or not writable.
    """
    runs = plan(recipe, arms, seeds, output_dir)
    known = list(runs)
    reference = known[0] if reference is None else reference
    if reference not in runs:
        raise BadInput(f"reference: {reference!r} is not compared; arms: {', '.join(known)}")
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in known}
    total, number = len(known) * len(seeds), 0
    for position in range(len(seeds)):  # seed by seed, so that an early end still leaves whole pairs
        for name in known:
            number += 1
            reports[name].append(_run(runs[name][position], f"{number}/{total}", progress, say))
    root = comparison_folder(recipe, output_dir)
    paths = {name: [str(run.folder.relative_to(root)) for run in members] for name, members in runs.items()}
    notes = {name: note for name in known if (note := _note(recipe, name))}
    return write_comparison(root, reports, recipe.name, reference, paths, recipe.tuning or None, notes)


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
    """Builds the comparison of finished runs and writes its JSON and its page into `root`."""
    from .evaluation.compare import build_comparison
    from .report import build
    from .report.html import render_comparison

    comparison = build_comparison(reports, recipe=name, reference=reference, paths=paths, tuning=tuning, notes=notes)
    build.write_json(root / COMPARISON_FILE, comparison)
    page = root / PAGE_FILE
    build.write_text(page, render_comparison(comparison, [report for arm in reports.values() for report in arm]))
    return comparison, page


# ---- pages of what lies on disk
def rebuild(folders: Sequence[str | Path], output_dir: str | Path | None = None) -> list[Path]:
    """Rebuilds report.html of runs and of comparisons; of several runs also a page that compares them.

    Args:
        folders: run folders, or folders of a comparison.
        output_dir: where the page of several runs goes; the folder above all of them when None.

    Returns:
        The pages, the last being the one that covers the most.

    Raises:
        BadInput: a folder holds no report, or the runs do not belong into one comparison.
    """
    if not folders:
        raise BadInput("report: name at least one run folder")
    pages: list[Path] = []
    runs: list[tuple[Path, dict[str, Any]]] = []
    for each in folders:
        folder = Path(each)
        if (folder / COMPARISON_FILE).is_file():
            pages.append(_rebuild_comparison(folder, pages))
        else:
            runs.append((folder, _rebuild_run(folder, pages)))
    if len(runs) > 1:
        pages.append(_compare_runs(runs, output_dir))
    return pages


def _rebuild_run(folder: Path, pages: list[Path]) -> dict[str, Any]:
    from .report import build
    from .report.html import render_run

    if not (folder / REPORT_FILE).is_file():
        raise BadInput(f"report: {folder} holds no {REPORT_FILE}; name the folder of a run")
    report = build.read_report(folder / REPORT_FILE)
    build.write_text(folder / PAGE_FILE, render_run(report))
    pages.append(folder / PAGE_FILE)
    return report


def _rebuild_comparison(folder: Path, pages: list[Path]) -> Path:
    from .report import build

    old = build.read_comparison(folder / COMPARISON_FILE)
    reports: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, list[str]] = {}
    for row in old["rows"]:
        paths[row["arm"]] = [old["runs"][number] for number in row["runs"]]
        reports[row["arm"]] = [_rebuild_run(folder / path, pages) for path in paths[row["arm"]]]
    notes = {row["arm"]: row["note"] for row in old["rows"] if row["note"]}
    return write_comparison(folder, reports, old["recipe"], old["reference"], paths, old.get("tuning"), notes)[1]


def _compare_runs(runs: Sequence[tuple[Path, dict[str, Any]]], output_dir: str | Path | None) -> Path:
    above = Path(os.path.commonpath([folder.resolve() for folder, _ in runs]))
    root = Path(output_dir) if output_dir is not None else above
    if (root / REPORT_FILE).is_file():
        raise BadInput(f"report: {root} is itself a run, its page would be written over; give --output-dir")
    reports: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, list[str]] = {}
    arms: dict[str, Any] = {}
    for folder, report in runs:
        # Two arms may share a short name, but not all settings of method and head.
        settings = (report["details"].get("method"), report["head"], report["training"])
        label, number = report["method"], 2
        while arms.setdefault(label, settings) != settings:
            label, number = f"{report['method']} ({number})", number + 1
        reports.setdefault(label, []).append(report)
        paths.setdefault(label, []).append(os.path.relpath(folder.resolve(), root.resolve()))
    names = dict.fromkeys(report["name"] for _, report in runs)
    return write_comparison(root, reports, ", ".join(names), None, paths)[1]


# ---- in words
def verdict(comparison: Mapping[str, Any], arm: str, against: str) -> str | None:
    """One plain sentence on where an arm stands against another; None where either was not compared.

    Points are hundredths of accuracy; of perplexity its own unit. A single seed is said to be an illustration.
    """
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
    if comparison["metric"] == "accuracy":
        gap, unit = f"{abs(mine - theirs) * 100:.1f} points", "average accuracy"
        told = (
            f"{mine * 100:.1f} against {theirs * 100:.1f} %, forgetting {lost * 100:.1f} against {lost_there * 100:.1f}"
        )
    else:
        gap, unit = f"{abs(mine - theirs):.2f}", "average perplexity"
        told = f"{mine:.2f} against {theirs:.2f}, forgetting {lost:.2f} against {lost_there:.2f}"
    judged = "" if mine == theirs else f" ({'better' if better else 'worse'})"
    where = f"{word} {against}" if mine == theirs else f"{gap} {word} {against}"
    seeds = min(len(rows[each]["seeds"]) for each in (arm, against))
    proof = "; one seed, an illustration" if seeds == 1 else f"; {seeds} seeds"
    if seeds > 1 and _overlap(*(rows[each]["metrics"]["average_accuracy"] for each in (arm, against))):
        proof += ", whose intervals overlap: not settled"
    return f"{arm} is {where} in {unit}{judged}: {told}{proof}."


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    bounds = [one.get("low"), one.get("high"), other.get("low"), other.get("high")]
    if any(bound is None for bound in bounds):
        return True
    return one["low"] <= other["high"] and other["low"] <= one["high"]
