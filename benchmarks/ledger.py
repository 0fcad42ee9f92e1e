"""Fills the ledger: every arm of a recipe over seeds, in several one-thread processes, then one comparison.

`python -m benchmarks.ledger clinc150 --seeds 3 --processes 2`. Finished runs under runs/<recipe>/ are reused and
unfinished ones go on, so the command may be stopped and repeated over days. Seed by seed, so that whole pairs stand
early.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from perdure.comparison import compare, plan
from perdure.evaluation.ledger import append, rows_from_comparison
from perdure.processes import Job, Processes
from perdure.recipe import load_recipe
from perdure.run import read_report

LEDGER = Path("results/ledger.jsonl")


def run_all(recipe: str, arms: list[str] | None, seeds: list[int], processes: int, overrides: list[str]) -> list[str]:
    """Runs what is not finished; returns the labels of runs that failed."""
    runs = plan(load_recipe(recipe, overrides), arms, seeds)
    waiting = [
        (label, members[position]) for position in range(len(seeds)) for label, members in runs.items()
        if (read_report(members[position].folder) or {}).get("status") != "complete"
    ]  # fmt: skip
    failed: list[str] = []

    def finished(job: Job, code: int) -> list[Job]:
        print(f"{time.strftime('%H:%M:%S')} {job.name}: exit {code}", flush=True)
        failed.extend([job.name] if code else [])
        return []

    jobs = [
        Job(
            f"{label} seed {member.seed}",
            ("-m", "perdure", "run", recipe, f"method={label}", f"seed={member.seed}", "--no-progress", *overrides),
            member.folder.parent / f"seed-{member.seed}.log",
        )
        for label, member in waiting
    ]
    Processes(processes).run(jobs, finished)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--arms", default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--reference", default=None)
    parser.add_argument("--note", default="", help="what every row should say, such as reduced sizes")
    parser.add_argument(
        "overrides", nargs="*", default=[], help="settings of the recipe; give the rows a name of their own with name="
    )
    options = parser.parse_intermixed_args()
    arms = options.arms.split(",") if options.arms else None
    if options.reference is not None and arms is not None and options.reference not in arms:
        parser.error(f"--reference {options.reference} is none of --arms {options.arms}")
    failed = run_all(options.recipe, arms, list(range(options.seeds)), options.processes, options.overrides)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see the logs beside their run folders")
    comparison, page = compare(
        load_recipe(options.recipe, options.overrides),
        arms,
        list(range(options.seeds)),
        options.reference,
        progress=False,
    )
    for line in comparison["warnings"]:
        print(f"warning: {line}", flush=True)
    for row in rows_from_comparison(comparison, note=options.note, run=[options.recipe, *options.overrides]):
        append(LEDGER, row)
    print(json.dumps({row["method"]: row["metrics"]["average_accuracy"] for row in comparison["rows"]}, indent=1))
    print(page)


if __name__ == "__main__":
    main()
