"""Who answers: of the atoms that texts of each experience select, how many did each experience write?

`python -m benchmarks.answers domains --arm moram` learns the stream with one arm, then counts, over all maps and
test rows of an experience, the selections with a weight above 0 by the write that owns the atom, and measures every
experience again while the newest writes are taken out one by one. If keys knew their experience, the largest share
would stand on the diagonal. Written to results/answers/<recipe>-<arm>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from perdure.learner import Learner
from perdure.memory import RouterLog
from perdure.models import load_model
from perdure.recipe import load_recipe
from perdure.registry import OBJECTIVES
from perdure.streams import build_stream


def shares(learner: Learner, rows: Any, writes: int) -> list[float]:
    """Share of the selections that went to the atoms of each write."""
    log = RouterLog()
    learner.observe(list(rows), log)
    counts = torch.zeros(writes, dtype=torch.float64)
    for name, memory in learner.methods[0].modules.items():
        usage = log.usage(name)
        counts.index_add_(0, memory.bank.owners[: usage.numel()], usage)  # type: ignore[union-attr,operator]
    return [round(share, 3) for share in (counts / counts.sum()).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--arm", default="moram")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, [f"seed={options.seed}"]).with_arm(options.arm)
    stream = build_stream(recipe.stream, recipe.seed)
    ((objective, _),) = OBJECTIVES.parse(recipe.objective, "objective")
    model, processor, _ = load_model(recipe.model, objective, seed=recipe.seed)
    learner = Learner(
        model, processor, method=recipe.method, head=recipe.head, objective=recipe.objective,
        training=recipe.training, protocol=recipe.protocol, seed=recipe.seed,
        classes=list(stream.classes) if stream.classes else None,
    )  # fmt: skip
    experiences = list(stream)
    for experience in experiences:
        learner.learn(experience)
    found = {
        "recipe": options.recipe, "arm": options.arm, "seed": recipe.seed,
        "experiences": [experience.name for experience in experiences],
        "selections_by_write": [shares(learner, each.test, len(experiences)) for each in experiences],
        "scores": list(learner.evaluate(experiences).values()),
        "scores_without_the_newest": [],
    }  # fmt: skip
    for write in range(len(experiences) - 1, 0, -1):
        learner.forget(write)
        found["scores_without_the_newest"].append(list(learner.evaluate(experiences).values()))
    path = Path("results/answers") / f"{options.recipe.replace('/', '-')}-{options.arm}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
