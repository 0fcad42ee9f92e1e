"""Runs rows of the ledger again and compares the figures.

`python -m benchmarks.ledger_check` takes the three cheapest rows and one seed of each; `--rows N`, `--seeds N`,
`--recipe NAME` and `--method ARM` say which; `--draw TEXT` draws by lot instead, such as with the date. A row is the
recipe's arm at the row's own seeds. All seeds again must lie within the row's interval; some of them within the
interval for that many new runs. Where the row holds figures by seed, each is compared with its own: exactly if it was
made by this commit on a processor of this name with as many threads, else the difference is shown. Rows without an
interval are held against TOLERANCE.

Rows that cannot be run again, because their recipe, arm or model is no longer here, are told with the reason. Ends with
exit code 1 if a row does not reproduce, or if none could be run at all.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perdure.errors import PerdureError
from perdure.evaluation.ledger import latest, read
from perdure.models import model_name
from perdure.recipe import Recipe, load_recipe, recipe_names
from perdure.run_folder import read_report

LEDGER = Path("results/ledger.jsonl")
FIGURES = ("average_accuracy", "forgetting", "learning_accuracy")
TOLERANCE = 0.02
"""Of accuracies, and as a share of perplexities, where a row has no interval."""
EXACT = 1e-9

Row = Mapping[str, Any]
Runner = Callable[[Row, Recipe, int], dict[str, Any]]


# ---- which rows
def recipe_of(row: Row) -> Recipe | str:
    """The recipe of a row with its arm, or why there is none."""
    name, *typed = row.get("run") or [row["recipe"]]
    if name not in {each for full in recipe_names() for each in (full, full.rsplit("/", 1)[-1])} | _files(name):
        return "no recipe of that name is here: it was renamed or is of older settings"
    try:
        whole = load_recipe(name, typed, compared=True)
        if row["method"] not in whole.arms and not row.get("run"):
            return f"recipe {whole.name} has no such arm any more"
        recipe = whole.with_arm(row["method"])
    except PerdureError as error:
        return f"its recipe is refused: {error}"
    if whole.name != row["recipe"]:
        return f"the row says {row['recipe']}, the recipe is called {whole.name}"
    model, head = model_name(recipe.model), next(iter(recipe.head or {}), None)
    if model != row["model"]:
        return f"the row has model {row['model']}, the recipe {model}"
    if head != row["head"]:
        return f"the row has head {row['head']}, the recipe {head}"
    if "/" in model and not Path(model).is_dir():
        return f"the model {model} is not here"
    return recipe


def _files(name: str) -> set[str]:
    return {name} if name.endswith((".yaml", ".yml")) and Path(name).is_file() else set()


def choose(rows: Sequence[Row], count: int, draw: str | None) -> list[Row]:
    """The cheapest rows, or as many drawn by lot."""
    if draw is not None:
        return random.Random(draw).sample(list(rows), min(count, len(rows)))
    return sorted(rows, key=_seconds)[:count]


def _seconds(row: Row) -> float:
    cost = row["cost"].get("seconds", {}).get("mean")
    return math.inf if cost is None else cost


# ---- the comparison
@dataclass
class Finding:
    """One figure of a row: what was recorded, what came out, and whether that is the same result."""

    figure: str
    recorded: str
    found: float
    judged: str
    good: bool


@dataclass
class Check:
    row: Row
    seeds: list[int]
    findings: list[Finding] = field(default_factory=list)
    failure: str = ""

    @property
    def good(self) -> bool:
        return not self.failure and bool(self.findings) and all(each.good for each in self.findings)


def band(figure: Mapping[str, Any], recorded_seeds: int, new_seeds: int) -> tuple[float, float] | None:
    """Where the mean of `new_seeds` runs should lie; None without an interval.

    The interval itself where every seed is run again. For k new runs of a figure with the interval mean ± t s / √n the
    95 % prediction interval is mean ± t s √(1/k + 1/n).
    """
    if figure["low"] is None or figure["high"] is None:
        return None
    half = (figure["high"] - figure["low"]) / 2
    if new_seeds < recorded_seeds:
        half *= math.sqrt(recorded_seeds / new_seeds + 1)
    return figure["mean"] - half, figure["mean"] + half


def judge(row: Row, figure: str, found: Sequence[float], seeds: Sequence[int], same_place: bool) -> Finding | None:
    """Compares the figure of new runs, one for each seed, with the row; None where the row has not got it."""
    entry = row["metrics"].get(figure)
    if entry is None or entry["mean"] is None:
        return None
    mean = math.fsum(found) / len(found)
    own = row.get("values", {}).get(figure)
    then = [own[row["seeds"].index(seed)] for seed in seeds] if own else []
    if then and None not in then:
        difference = max(abs(a - b) for a, b in zip(found, then, strict=True))
        recorded = ", ".join(f"{value:.4f}" for value in then)
        if same_place:
            told = "equal" if difference <= EXACT else f"differs by {difference:.2g} on the same commit and machine"
            return Finding(figure, recorded, mean, told, difference <= EXACT)
        room = TOLERANCE * (abs(mean) if entry["mean"] > 1 else 1)
        within = band(entry, len(row["seeds"]), len(seeds))
        good = difference <= room or (within is not None and within[0] <= mean <= within[1])
        return Finding(figure, recorded, mean, f"by seed within {difference:.2g}", good)
    within = band(entry, len(row["seeds"]), len(seeds))
    if within is None:
        room = TOLERANCE * (abs(entry["mean"]) if entry["mean"] > 1 else 1)
        return Finding(figure, f"{entry['mean']:.4f}", mean, f"tolerance {room:.2g}", abs(mean - entry["mean"]) <= room)
    low, high = within
    # A figure that no seed moves has an interval of no width.
    slack = 1e-6 * max(1.0, abs(entry["mean"]))
    return Finding(
        figure, f"{entry['mean']:.4f}", mean, f"{low:.4f} to {high:.4f}", low - slack <= mean <= high + slack
    )


def check(row: Row, recipe: Recipe, count: int, run: Runner) -> Check:
    """Runs a row again at its first `count` seeds."""
    done = Check(row, row["seeds"][:count])
    try:
        reports = [run(row, recipe, seed) for seed in done.seeds]
    except RuntimeError as error:
        done.failure = str(error)
        return done
    environments = [report.get("environment") or {} for report in reports]
    same = all(each.get("commit") == row["commit"] and _machine(each) == row["hardware"] for each in environments)
    for name in FIGURES:
        found = [report["metrics"].get(name) for report in reports]
        finding = None if None in found else judge(row, name, found, done.seeds, same)
        if finding is not None:
            done.findings.append(finding)
    return done


def _machine(environment: Mapping[str, Any]) -> str:
    threads = environment.get("threads")
    return f"{environment.get('cpu')}, {threads} thread{'s' if threads != 1 else ''} a run"


def run_again(row: Row, recipe: Recipe, seed: int) -> dict[str, Any]:
    """One run in a process and a folder of its own, with the threads that the row names."""
    name, *typed = row.get("run") or [row["recipe"]]
    threads = re.search(r"(\d+) threads? a run", row["hardware"])
    variables = {**os.environ, "OMP_NUM_THREADS": threads.group(1) if threads else "1"}
    with tempfile.TemporaryDirectory(prefix="ledger-check-") as folder:
        target = Path(folder) / "run"
        command = [
            sys.executable, "-m", "perdure", "run", name, *typed, f"method={row['method']}", f"seed={seed}",
            f"output_dir={target}", "--no-progress",
        ]  # fmt: skip
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        report = read_report(target)
    if ended.returncode or report is None:
        raise RuntimeError(f"exit {ended.returncode}: {(ended.stderr.strip().splitlines() or ['no message'])[-1]}")
    return report


# ---- the table
def table(checks: Sequence[Check]) -> list[str]:
    lines = ["| recipe | method | seeds | figure | recorded | now | expected | |", "|---|---|---|---|---|--:|---|---|"]
    for each in checks:
        start = f"| {each.row['recipe']} | {each.row['method']} | {', '.join(map(str, each.seeds))} |"
        if each.failure:
            lines.append(f"{start} – | – | – | {each.failure} | FAILED |")
        for one in each.findings:
            verdict = "ok" if one.good else "DIFFERS"
            lines.append(f"{start} {one.figure} | {one.recorded} | {one.found:.4f} | {one.judged} | {verdict} |")
    return lines


def main(arguments: Sequence[str] | None = None, run: Runner = run_again) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3, help="how many rows")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of each")
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--method", default=None)
    parser.add_argument("--draw", default=None, help="draw rows by lot with this text as its seed, such as a date")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    options = parser.parse_args(arguments)
    rows = [
        row for row in latest(read(options.ledger))
        if options.recipe in (None, row["recipe"]) and options.method in (None, row["method"])
    ]  # fmt: skip
    known = [(row, recipe_of(row)) for row in rows]
    gone = [(row, reason) for row, reason in known if isinstance(reason, str)]
    recipes = {id(row): recipe for row, recipe in known if isinstance(recipe, Recipe)}
    chosen = choose([row for row in rows if id(row) in recipes], options.rows, options.draw)
    print(f"{len(rows)} rows, {len(gone)} of them not re-runnable, {len(chosen)} run again")
    for row, reason in gone:
        print(f"not re-runnable: {row['recipe']}, {row['method']}: {reason}")
    checks = []
    for row in chosen:
        checks.append(check(row, recipes[id(row)], options.seeds, run))
        print(f"{row['recipe']}, {row['method']}: {'reproduced' if checks[-1].good else 'NOT REPRODUCED'}", flush=True)
    print("\n".join(["", *table(checks)]))
    return 0 if checks and all(each.good for each in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
