"""What a sweep found, arm by arm: as JSON, in a terminal, and as a recipe's `tuning` block. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..recipe import Recipe
from .driver import Results, Sweep
from .space import Range, short
from .trials import Plan, Trial, told, typed_over

if TYPE_CHECKING:
    from rich.table import Table

MARGIN = 0.05
"""Part of a range, on either side, that counts as its edge."""
SAME = ("grid", "random", "points", "experiences", "seed", "rows", "typed")
"""What two arms must share to have had the same chance."""


def table_of(sweep: Sweep, results: Results) -> dict[str, dict[str, Any]]:
    """The results table of a sweep: one entry for each arm.

    Each entry: `best` (a row of `trials`, or None), `trials` (a row for each different trial: every setting of the
    grid, null where it has no effect; `experiences`, `loss`, `score`, or `failed` with the reason), `grid`, `points`
    (what every arm was given), `random`, `experiences`, `seed`, `rows` (hash of what was seen), `metric`, `typed` (what
    was typed over the recipe), `without_effect`, `edge` (settings whose best value ends their grid).

    Raises:
        BadInput: trials were made with different weights.
    """
    _refuse_other_weights(sweep, results)
    shared = {
        "grid": sweep.space.declared(), "random": _random(sweep), "points": len(sweep.space.points()),
        "experiences": list(sweep.positions), "seed": sweep.recipe.seed, "rows": sweep.rows,
        "typed": typed_over(sweep.recipe),
    }  # fmt: skip
    return {each.arm: {**_entry(sweep, each, results), **shared} for each in sweep.plans}


def _entry(sweep: Sweep, plan: Plan, results: Results) -> dict[str, Any]:
    rows, metric = [], None
    for trial in plan.trials:
        result = results[trial.key]
        row = {short(name): trial.values.get(name) for name in sweep.space.settings}
        row["experiences"] = list(sweep.positions)
        if result["state"] == "done":
            metric = result["metric"]
            row |= {"loss": result["loss"], "score": result["score"], "seconds": round(result["seconds"], 2)}
        else:
            row["failed"] = result["reason"]
        rows.append(row)
    best = min((row for row in rows if "loss" in row), key=_loss, default=None)
    return {
        "best": best, "trials": rows, "metric": metric,
        "without_effect": {short(name): why for name, why in plan.without_effect.items()},
        "edge": [] if best is None else [short(name) for name in _edges(sweep, best)],
    }  # fmt: skip


def _loss(found: Mapping[str, Any]) -> float:
    return found["loss"]


def best_trials(sweep: Sweep, results: Results) -> dict[str, Trial]:
    """arm -> its trial of lowest loss; without the arms that have none."""
    found = {}
    for plan in sweep.plans:
        done = [trial for trial in plan.trials if results[trial.key]["state"] == "done"]
        if done:
            found[plan.arm] = min(done, key=lambda trial: _loss(results[trial.key]))
    return found


def _edges(sweep: Sweep, best: Mapping[str, Any]) -> list[str]:
    found = []
    for name, among in sweep.space.settings.items():
        value = best[short(name)]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if isinstance(among, Range):
            if among.at_edge(value, MARGIN):
                found.append(name)
        elif len(numbers := [each for each in among if isinstance(each, (int, float))]) > 1:
            found += [name] if value in (min(numbers), max(numbers)) else []
    return found


def _random(sweep: Sweep) -> dict[str, int] | None:
    return None if sweep.space.draws is None else {"points": sweep.space.draws, "seed": sweep.space.seed}


def _refuse_other_weights(sweep: Sweep, results: Results) -> None:
    found: dict[str, str] = {}
    for trial in sweep.trials:
        base = results[trial.key].get("base")
        if base is not None:
            found.setdefault(base, str(trial.path(sweep.folder)))
    if len(found) > 1:
        raise BadInput(
            f"model: trials began with different weights ({' and '.join(list(found.values())[:2])}); the model changed "
            f"since. Delete the older files below {sweep.folder}, and the same command makes them anew"
        )


# ---- in words
def warnings_of(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines about best values at an edge, failed trials and settings without effect."""
    lines = []
    for arm, entry in table.items():
        for name in entry["edge"]:
            words = told({name: entry["best"][name]})
            lines.append(f"{arm}: the best {words} lies on the edge of its grid; a value beyond may be better")
        failed = [row for row in entry["trials"] if "failed" in row]
        if failed:
            lines.append(
                f"{arm}: {len(failed)} of {len(entry['trials'])} trials failed, the first: {failed[0]['failed']}"
            )
        for name, why in entry["without_effect"].items():
            lines.append(f"{arm}: {name} has no effect, {why}")
    return lines


def shown(table: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """One row for each arm. Losses of arms with different heads are not on one scale."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
    made.add_column("arm", overflow="fold")
    made.add_column("trials", justify="right")
    made.add_column("best", overflow="fold")
    made.add_column("validation loss", justify="right")
    made.add_column("score", justify="right")
    for arm, entry in table.items():
        best, count = entry["best"], len(entry["trials"])
        trials = f"{count}" if count == entry["points"] else f"{count} of {entry['points']}"
        if best is None:
            made.add_row(escape(arm), trials, "all failed" if count else "nothing to tune", "", "")
            continue
        names = [name for name in entry["grid"] if best[name] is not None]
        words = told({name: best[name] for name in names})
        made.add_row(escape(arm), trials, escape(words), f"{best['loss']:.4f}", f"{best['score']:.4f}")
    return made


def tuning_of(recipe: Recipe, own_seed: int, table: Mapping[str, Mapping[str, Any]], sweep: Sweep) -> dict[str, Any]:
    """The recipe's `tuning` block after a sweep: grid, trials, on what they were judged, and whether all were equal.

    Args:
        recipe: with all its arms. own_seed: the one that the recipe's file has.
        table: all arms that were swept, in this call or before.
        sweep: this call.
    """
    mine = table[sweep.plans[0].arm]
    alike = [arm for arm, entry in table.items() if all(entry.get(key) == mine[key] for key in SAME)]
    arms = list(recipe.arms) or [sweep.plans[0].arm]
    block: dict[str, Any] = {"grid": mine["grid"], "trials": mine["points"]}
    if mine["random"]:
        block["random"] = mine["random"]
    block |= {"equal": set(arms) <= set(alike), "on": _on(own_seed, sweep)}
    if not block["equal"]:
        block["arms"] = [arm for arm in arms if arm in alike]
    idle = {arm: list(table[arm]["without_effect"]) for arm in alike if table[arm]["without_effect"]}
    failed = {arm: count for arm in alike if (count := sum("failed" in row for row in table[arm]["trials"]))}
    return block | ({"without_effect": idle} if idle else {}) | ({"failed": failed} if failed else {})


def _on(own_seed: int, sweep: Sweep) -> str:
    first, last = sweep.positions[0] + 1, sweep.positions[-1] + 1
    number = (
        "experience 1" if last == 1 else f"experiences {first} to {last}" if last > first else f"experience {first}"
    )
    whole = ", which are all" if len(sweep.positions) == sweep.length else ""
    head = "" if sweep.recipe.head is None else " of the head that predicts"
    text = f"lowest validation loss{head} after {number} of {sweep.length}{whole}, mean over their validation rows"
    if sweep.unjudged:
        text += f" ({', '.join(sweep.unjudged)} without any)"
    text += f", seed {sweep.recipe.seed}"
    if sweep.recipe.seed != own_seed:
        text += f" (the recipe has {own_seed})"
    typed = [each for each in typed_over(sweep.recipe) if not each.startswith("seed=")]
    return text + (f"; typed over the recipe: {', '.join(typed)}" if typed else "")
