"""Trains one trial on the first experiences and judges it on their validation rows."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..bookkeeping import quiet
from ..errors import NonFiniteLoss
from ..learner import Learner
from ..models import load_model
from ..protocol import declared_classes
from ..recipe import Recipe
from ..registry import OBJECTIVES
from ..state import model_hash, perdure_commit
from ..streams import Experience
from ..streams.guarded import FirstExperiences
from .trials import pretraining_of

Begun = dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]
"""State after pretraining, by what decides it."""


def train_trial(
    recipe: Recipe, stream: FirstExperiences, begun: Begun, on_step: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Learns the experiences of `stream` one after another and measures the validation rows of them all.

    Args:
        recipe: the arm with the trial's values.
        stream: what may be seen.
        begun: keeps the state after pretraining, which is the first experience of some arms and often does not depend
            on what is swept, for the trials that follow.
        on_step: as in `Learner.learn`.

    Returns:
        `loss`, the mean over the experiences that have validation rows; `score` in the same way; `metric`; `seconds`;
        `base`, the hash of the model's weights; `commit`.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite.
        ProtocolRefused: something touched rows that tuning may not see.
    """
    started = time.perf_counter()
    ((objective, _),) = OBJECTIVES.parse(recipe.objective, "objective")
    model, processor, _ = load_model(recipe.model, objective, seed=recipe.seed)
    base = model_hash(dict(model.state_dict()))
    training = recipe.training
    if isinstance(training.epochs, list):  # one number for each experience of the whole stream
        training = training.model_copy(update={"epochs": training.epochs[stream.positions[0] :]})
    learner = Learner(
        model, processor, method=recipe.method, head=recipe.head, objective=recipe.objective, training=training,
        protocol=recipe.protocol, seed=recipe.seed, classes=declared_classes(stream.classes, recipe.protocol),
    )  # fmt: skip
    experiences = list(stream)
    _learn(learner, experiences, pretraining_of(recipe), begun, on_step)
    judged = [experience for experience in experiences if len(experience.valid)]
    losses = [validation_loss(learner, experience) for experience in judged]
    scores = [value for value in learner.evaluate(judged, split="valid").values() if value is not None]
    loss, score = statistics.fmean(losses), statistics.fmean(scores)
    if not math.isfinite(loss) or not math.isfinite(score):
        raise NonFiniteLoss(f"validation loss is {loss}, {learner.objective.metric} {score}")
    seconds = time.perf_counter() - started
    found = {"loss": loss, "score": score, "metric": learner.objective.metric, "seconds": seconds}
    return {**found, "base": base, "commit": perdure_commit()}


def _learn(
    learner: Learner,
    experiences: list[Experience],
    key: str | None,
    begun: Begun,
    on_step: Callable[..., None] | None,
) -> None:
    if key is not None and key in begun:
        tensors, values = begun[key]
        learner.load_state_dict(tensors, copy.deepcopy(values))
    for experience in experiences[learner.position.experience :]:
        learner.learn(experience, on_step=on_step)
        if key is not None and key not in begun:
            begun.clear()  # trials that share it follow each other
            tensors, values = learner.state_dict()
            begun[key] = ({name: t.clone() for name, t in tensors.items()}, copy.deepcopy(values))


def validation_loss(learner: Learner, experience: Experience) -> float:
    """Mean loss on the validation rows, of the head that predicts: the objective's, or the mean squared error that a
    closed-form head minimises.
    """
    closed_form = learner.head is not None and learner.head.closed_form
    total, count = 0.0, 0.0
    with quiet(learner.model), torch.no_grad(), learner.classes_encoded():
        for batch in learner.scored_batches(experience, "valid", experience.valid):
            with learner.autocast():
                output = learner.system(batch, False)
            if closed_form:
                assert output.logits is not None and batch.labels is not None
                target = torch.nn.functional.one_hot(batch.labels, output.logits.shape[-1])
                summed, rows = (output.logits - target).square().mean(-1).sum(), len(batch)
            else:
                summed, rows = learner.objective.loss(batch, output, None)
            total, count = total + float(summed), count + float(rows)
    return total / count
