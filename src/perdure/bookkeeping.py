"""Small things the loop keeps books with: where it stands, what was spent, what is past."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy
import torch
from torch import nn


@dataclass
class Position:
    """Where the loop stands; a checkpoint in the middle of an experience continues here."""

    experience: int = 0
    step: int = 0
    phase: str = "boundary"


@dataclass
class Counters:
    """What was spent; all but seconds are exact and equal after a resume."""

    steps: int = 0
    samples: int = 0
    extra_passes: int = 0
    extra_rows: int = 0
    seconds: float = 0.0


@dataclass
class Past:
    """What is remembered of an experience once its rows are gone."""

    index: int
    name: str
    classes: list[str] = field(default_factory=list)
    hash: str = ""


class Unlearnt(dict):
    """Labels for scoring: a class that was never learnt gets an id that no prediction can have."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 10**9


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the mode of every module and the random states of torch, Python and NumPy as before
    afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    python, numbers = random.getstate(), numpy.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
        model.train(modes[0][1])
        for module, training in modes:  # a part may stand in another mode than the whole
            module.training = training
