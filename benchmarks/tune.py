"""Rates of every arm of a recipe: the same grid, the same trials, judged on validation rows of the first experiences.

`python -m benchmarks.tune clinc150 --experiences 2 --arms finetune,lora,moram` trains each arm on the first two
experiences alone for every pair of rates and takes the pair with the lowest validation loss over both, of the head that
the arm predicts with: cross-entropy, or the mean squared error that a closed-form head minimises. Test rows and later
experiences are never read. One experience shows what is learnt and nothing of what is forgotten: it favours rates that
are too high for a long stream. The table goes to results/tuning/<recipe>.json, from which trials that were made before
are taken; what it says is copied into the recipe by hand. Arms that do the same on a first experience take the rates of
their plain form where one experience is used.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perdure.bookkeeping import quiet
from perdure.learner import Learner
from perdure.models import load_model
from perdure.recipe import Recipe, load_recipe
from perdure.registry import OBJECTIVES
from perdure.streams import Experience, build_stream

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HEAD_RATES = (3e-3, 1e-2, 3e-2)


def trial(
    recipe: Recipe, rate: float, head_rate: float | None, positions: Sequence[int] = (0,), begun: Begun | None = None
) -> dict[str, Any]:
    """Trains on the experiences at `positions`, one after another, and measures the validation rows of them all.

    Pretraining, which the first experience is for some arms, does not depend on the rates: `begun` keeps its state for
    the trials that follow.
    """
    stream = build_stream(recipe.stream, recipe.seed)
    experiences = [stream.experience(position) for position in positions]
    ((objective, _),) = OBJECTIVES.parse(recipe.objective, "objective")
    model, processor, _ = load_model(recipe.model, objective, seed=recipe.seed)
    training = recipe.training.model_copy(update={"learning_rate": rate, "head_learning_rate": head_rate})
    learner = Learner(
        model, processor, method=recipe.method, head=recipe.head, objective=recipe.objective, training=training,
        protocol=recipe.protocol, seed=recipe.seed, classes=list(stream.classes) if stream.classes else None,
    )  # fmt: skip
    pretrains = any(method.pretrains for method in learner.methods)
    if begun and pretrains:
        tensors, values = begun["state"]
        learner.load_state_dict(tensors, copy.deepcopy(values))
    for experience in experiences[learner.position.experience if begun and pretrains else 0 :]:
        learner.learn(experience)
        if pretrains and begun == {}:
            tensors, values = learner.state_dict()
            begun["state"] = ({name: t.clone() for name, t in tensors.items()}, copy.deepcopy(values))
    scores = learner.evaluate(experiences, split="valid").values()
    losses = [validation_loss(learner, experience) for experience in experiences]
    found = {"loss": statistics.mean(losses), "score": statistics.mean(scores)}
    return {"learning_rate": rate, "head_learning_rate": head_rate, "experiences": list(positions), **found}


Begun = dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]
"""The state after pretraining under "state", once there is one."""


def validation_loss(learner: Learner, experience: Experience) -> float:
    """Mean loss on the validation rows, of the head that predicts."""
    closed_form = learner.head is not None and learner.head.closed_form
    total, count = 0.0, 0.0
    with quiet(learner.model), torch.no_grad():
        for batch in learner.batches(experience.valid):
            output = learner.system(batch, False)
            if closed_form:
                assert output.logits is not None and batch.labels is not None
                target = torch.nn.functional.one_hot(batch.labels, output.logits.shape[-1])
                summed, rows = (output.logits - target).square().mean(-1).sum(), len(batch)
            else:
                summed, rows = learner.objective.loss(batch, output, None)
            total, count = total + float(summed), count + float(rows)
    return total / count


def numbers(text: str | None) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",")) if text else ()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--arms", default=None, help="comma-separated; all arms when absent")
    parser.add_argument("--rates", default=None)
    parser.add_argument("--head-rates", default=None)
    parser.add_argument("--first", type=int, default=0, help="1 where the model has learnt the first one already")
    parser.add_argument("--experiences", type=int, default=1, help="how many are learnt")
    parser.add_argument("--table", default=None, help="name of the table; the recipe's when absent")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    rates, heads = numbers(options.rates) or RATES, numbers(options.head_rates) or HEAD_RATES
    positions = range(options.first, options.first + options.experiences)
    arms = options.arms.split(",") if options.arms else list(recipe.arms)
    path = Path("results/tuning") / f"{options.table or recipe.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in arms:
        arm = recipe.with_arm(name)
        head_rates = (None,) if "causal_lm" in arm.objective else heads
        before = read(path).get(name, {}).get("trials", [])
        before = [each for each in before if each["experiences"] == list(positions)]  # others judged something else
        known = {(each["learning_rate"], each["head_learning_rate"]): each for each in before}
        begun: Begun = {}
        trials = [
            known.get(pair) or trial(arm, *pair, positions, begun) for pair in itertools.product(rates, head_rates)
        ]
        best = min(trials, key=lambda found: found["loss"])
        print(f"{name}: {best}", flush=True)
        # Read again: several arms may be tuned at a time.
        path.write_text(json.dumps(read(path) | {name: {"best": best, "trials": trials}}, indent=1))


if __name__ == "__main__":
    main()
