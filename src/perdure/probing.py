"""Scores between the boundaries: what the model is worth at any time, and how far it falls when something new begins.

Every n optimizer steps, and at the end of each experience, test rows of the experiences met so far are scored, the
current one included. Nothing of the learner changes by it, random states included.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import NonFiniteLoss
from .evaluation import metrics
from .loading import drawn

if TYPE_CHECKING:
    from .config import ProbeConfig
    from .learner import Learner
    from .streams import Experience, Stream


class Probing:
    """The probes of one run.

    Attributes:
        scores: experience -> [step, score] by rising step; steps are optimizer steps of the whole run.
        ends: for each experience learnt, the step at which it ended.
        seconds: time that the probes took.
    """

    def __init__(self, config: ProbeConfig):
        self.config = config
        self.scores: dict[int, list[list[float]]] = {}
        self.ends: list[int] = []
        self.seconds = 0.0
        self._rows: dict[int, Experience] = {}

    def after_step(self, learner: Learner, stream: Stream) -> None:
        if learner.counters.steps % self.config.every == 0:
            self._look(learner, stream)

    def after_experience(self, learner: Learner, stream: Stream) -> None:
        """The last look at an experience, with the head that closed forms have just fitted."""
        self._look(learner, stream)
        self.ends.append(learner.counters.steps)

    def _look(self, learner: Learner, stream: Stream) -> None:
        started, step = time.perf_counter(), learner.counters.steps
        for index in range(len(self.ends) + 1):
            score = learner.evaluate([self._probed(stream, index)])[index]
            if score is None:
                continue
            if not math.isfinite(score):
                raise NonFiniteLoss(
                    f"{learner.objective.metric} on experience {index} is {score} after step {step}; the last good "
                    "state is kept. Lower training.learning_rate"
                )
            points = self.scores.setdefault(index, [])
            if points and points[-1][0] == step:  # after the step, then at the end of the experience
                points.pop()
            points.append([step, score])
        self.seconds += time.perf_counter() - started

    def _probed(self, stream: Stream, index: int) -> Experience:
        """The experience with the test rows that are scored; under a hash of its own, as features are cached by it."""
        if index not in self._rows:
            whole, limit = stream.experience(index), self.config.rows
            self._rows[index] = whole
            if limit is not None and len(whole.test) > limit:
                self._rows[index] = replace(whole, test=drawn(whole.test, limit), hash=f"{whole.hash}/{limit}")
        return self._rows[index]

    # ---- figures
    def figures(self, higher_is_better: bool) -> dict[str, float | None]:
        """What the probes say, by the names of `evaluation.metrics`."""
        probes = {index: [(int(step), score) for step, score in points] for index, points in self.scores.items()}
        every = [int(step) for step, _ in self.scores.get(0, ())]
        begins = [0, *self.ends[:-1]]
        # An experience that was looked at only at its end has no curve: a closed form, a frozen model, joint training.
        curve = bool(self.ends) and all(
            any(begin < step < end for step in every) for begin, end in zip(begins, self.ends, strict=True)
        )
        window, ends = self.config.window or 10 * self.config.every, self.ends
        found = {
            "anytime_accuracy": lambda: metrics.anytime_accuracy(self._averages()),
            "min_acc": lambda: metrics.min_acc(probes, ends, higher_is_better),
            "wc_acc": lambda: metrics.wc_acc(probes, ends, higher_is_better),
            "windowed_forgetting": lambda: metrics.windowed_forgetting(probes, window, higher_is_better),
            "windowed_plasticity": lambda: metrics.windowed_plasticity(probes, window, higher_is_better),
            "recovery_steps": lambda: metrics.recovery_steps(probes, ends, higher_is_better=higher_is_better),
            "recovered_share": lambda: metrics.recovered_share(probes, ends, higher_is_better=higher_is_better),
        }
        return {name: figure() if curve else None for name, figure in found.items()}

    def _averages(self) -> list[tuple[int, float]]:
        """(step, mean score over the experiences met by then)."""
        found: dict[int, list[float]] = {}
        for points in self.scores.values():
            for step, score in points:
                found.setdefault(int(step), []).append(score)
        return [(step, math.fsum(scores) / len(scores)) for step, scores in sorted(found.items())]

    def curves(self) -> dict[str, Any]:
        """For the report: `scores` by experience, `average` over those met, `ends`."""
        return {
            **self.config.model_dump(), "ends": self.ends,
            "scores": {str(index): points for index, points in sorted(self.scores.items())},
            "average": [list(pair) for pair in self._averages()],
        }  # fmt: skip

    # ---- state
    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": {str(index): points for index, points in self.scores.items()}, "ends": list(self.ends),
            "seconds": self.seconds,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = {int(index): [list(point) for point in points] for index, points in state["scores"].items()}
        self.ends, self.seconds = list(state["ends"]), state["seconds"]
