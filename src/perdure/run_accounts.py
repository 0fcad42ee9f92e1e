"""What a run keeps books on beside its scores: right answers by class, bytes at boundaries, counted work, memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .evaluation.classes import class_figures, class_table
from .evaluation.plasticity import feature_drift

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .learner import Learner
    from .streams import Stream

PROBE_ROWS = 32
"""Rows of an experience whose features and routing are looked at."""
COMPARED_ROWS = 256
"""Rows of all earlier experiences together whose features are compared: what a boundary costs stays bounded."""


def mean_drift(learner: Learner, stream: Stream, probes: Mapping[int, Tensor]) -> float | None:
    """Mean over earlier experiences of the drift of their features since each was learnt; None for the first.

    Args:
        probes: experience -> features of its first `PROBE_ROWS` training rows when it was learnt.
    """
    if not probes:
        return None
    most = max(1, COMPARED_ROWS // len(probes))
    before = [features[:most] for _, features in sorted(probes.items())]
    rows = [row for index in sorted(probes) for row in stream.experience(index).train[: min(PROBE_ROWS, most)]]
    after = learner.features(rows).split([len(each) for each in before])
    return statistics.fmean(map(feature_drift, before, after))


def plasticity_of(learner: Learner) -> dict[str, float]:
    """The figures of all methods."""
    return {name: value for method in learner.methods for name, value in method.plasticity().items()}


@dataclass
class Accounts:
    """Kept with the run's state.

    Attributes:
        classes: after each experience, class -> [right, rows] over the test rows of the experiences learnt so far.
        stored: `Learner.stored_bytes` after each experience.
        plasticity: figures of the methods after each experience, such as the share of directions that they protect.
        work: what `metering` has counted, in the last experience.
        device_peak: most bytes that torch had allocated on the accelerator during the run; 0 on a CPU.
        valid: scores on the validation rows of all experiences once the last was learnt; empty where there are none.
    """

    classes: list[dict[str, list[int]]] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    plasticity: list[dict[str, float]] = field(default_factory=list)
    work: dict[str, float] = field(default_factory=dict)
    device_peak: int = 0
    valid: list[float] = field(default_factory=list)

    def begin(self, learner: Learner) -> None:
        if learner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(learner.device)

    def boundary(self, learner: Learner, counts: dict[str, list[int]]) -> None:
        """After an experience was learnt and scored."""
        self.classes.append(counts)
        self.stored.append(learner.stored_bytes())
        self.plasticity.append(plasticity_of(learner))

    def look(self, learner: Learner) -> None:
        """Takes over what the learner has counted since."""
        self.work |= learner.metered or {}
        if learner.device.type == "cuda":
            self.device_peak = max(self.device_peak, torch.cuda.max_memory_allocated(learner.device))

    def validate(self, learner: Learner, stream: Stream, between: Callable[[], None]) -> None:
        """Scores the validation rows of all experiences; `between` is called before each."""
        self.valid = []
        for index in range(stream.length or 0):
            between()
            experience = stream.experience(index)
            if len(experience.valid):
                self.valid += [s for s in learner.evaluate([experience], split="valid").values() if s is not None]

    # ---- for the report
    def table(self) -> list[dict[str, Any]]:
        return class_table(self.classes) if any(self.classes) else []

    def figures(self, higher_is_better: bool) -> dict[str, float | None]:
        """Perplexities are averaged by their logarithms."""
        found = class_figures(self.table()) if any(self.classes) else {}
        if self.valid:
            finite = all(map(math.isfinite, self.valid))
            mean = statistics.fmean if higher_is_better else statistics.geometric_mean
            found["validation_average"] = mean(self.valid) if finite else None
        return found

    def curves(self) -> dict[str, Any]:
        """`stored_bytes`, and `plasticity`: name -> value after each experience, null where there was none."""
        names = {name: None for found in self.plasticity for name in found}
        plasticity = {name: [found.get(name) for found in self.plasticity] for name in names}
        return {"stored_bytes": self.stored, **({"plasticity": plasticity} if plasticity else {})}

    def cost(self) -> dict[str, float]:
        found = dict(self.work)
        if len(self.stored) > 1:  # the first experience brings what is there once, such as a head's statistics
            found["growth_bytes"] = (self.stored[-1] - self.stored[0]) / (len(self.stored) - 1)
        if self.device_peak:
            found["device_peak_bytes"] = self.device_peak
        return found

    # ---- state
    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any] | None, learnt: int) -> Accounts:
        """From a state after `learnt` experiences; one that was written before there were accounts knows no classes."""
        return cls(classes=[{} for _ in range(learnt)]) if state is None else cls(**state)
