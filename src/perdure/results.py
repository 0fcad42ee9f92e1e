"""What the ledger says of each method, kept in the package for `perdure methods NAME`. Imports no torch.

python -m perdure.results results/ledger.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EXTRACT = Path(__file__).with_name("_results.json")
FIGURES = ("average_accuracy", "forgetting")


def extract(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of every arm that a recipe of the package still has, with the plug-ins that the arm is made of."""
    from .evaluation.ledger import latest
    from .recipe import load_recipe, recipe_names

    recipes = {name.rsplit("/", 1)[-1]: load_recipe(name) for name in recipe_names()}
    found = []
    for row in latest(rows):
        recipe = recipes.get(row["recipe"])
        if recipe is None or row["method"] not in recipe.arms:
            continue
        arm = recipe.with_arm(row["method"])
        figures = {name: row["metrics"][name] for name in FIGURES if name in row["metrics"]}
        found.append(
            {
                "recipe": row["recipe"],
                "arm": row["method"],
                "head": row["head"],
                "seeds": len(row["seeds"]),
                "methods": [name for item in arm.method for name in item],
                "status": row["status"],
                **figures,
            }  # fmt: skip
        )
    return found


def lines_of(name: str) -> list[str]:
    """One line for every kept result of a method or head."""
    kept = json.loads(EXTRACT.read_text(encoding="utf-8")) if EXTRACT.exists() else []
    return [_line(row) for row in kept if name in row["methods"] or name == row["head"]]


def _line(row: Mapping[str, Any]) -> str:
    average = (row.get("average_accuracy") or {}).get("mean")
    scale, digits = (100.0, 1) if average is None or average <= 1 else (1.0, 2)  # perplexities start at 1
    words = [f"{name.partition('_')[0]} {_words(row.get(name), scale, digits)}" for name in FIGURES]
    seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
    return f"{row['recipe']}, {row['arm']}: {', '.join(words)} ({seeds}, {row['status']})"


def _words(figure: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    if not figure or figure["mean"] is None:
        return "–"
    text = f"{figure['mean'] * scale:.{digits}f}"
    if figure["low"] is not None and figure["high"] is not None:
        text += f" ± {(figure['high'] - figure['low']) / 2 * scale:.{digits}f}"
    return text


if __name__ == "__main__":
    from .evaluation.ledger import read

    made = extract(read(sys.argv[1]))
    EXTRACT.write_text("".join(["[\n", ",\n".join(json.dumps(row) for row in made), "\n]\n"]), encoding="utf-8")
