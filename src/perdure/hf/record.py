"""What a sequence of experiences under a Trainer measured: the matrix, and the report made from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run_accounts import plasticity_of
from ..run_report import counted, method_facts
from ..state.environment import environment
from .loop import TrainerLoop, TrainerRows


class Record:
    """Scores after each experience.

    Attributes:
        names: of the experiences learnt, in their order.
        matrix: R[i][j], score on the evaluation set of experience j after experience i; None where there is none.
        losses: [step, experience, value] as the Trainer logged them.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.matrix: list[list[float | None]] = []
        self.losses: list[list[float]] = []
        self.trainable = 0
        self.seconds = 0.0

    def add(self, loop: TrainerLoop, sets: Mapping[str, Any]) -> list[float | None]:
        """Scores all experiences learnt so far; where one was learnt elsewhere, or given up, its row is empty."""
        started = time.perf_counter()
        self.names = [past.name for past in loop.history]
        while len(self.matrix) < len(self.names) - 1:
            self.matrix.append([None] * (len(self.matrix) + 1))
        self.matrix.append([loop.score(TrainerRows(sets[n])) if n in sets else None for n in self.names])
        self.seconds += time.perf_counter() - started
        return self.matrix[-1]

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state(self, values: dict[str, Any]) -> None:
        vars(self).update(values)

    def report(self, loop: TrainerLoop, name: str, complete: bool) -> dict[str, Any]:
        """The content of report.json, as `perdure run` writes it."""
        from ..report.build import build_report

        trainer, settings = loop.trainer, loop.settings()
        return build_report(
            name=name,
            method="+".join(method.name for method in loop.methods),
            head="the model's own" if loop.objective.own_head else None,
            model=loop._base_name() or type(loop.model).__name__,
            stream=" → ".join(self.names),
            objective=loop.objective.name,
            metric=loop.objective.metric,
            higher_is_better=loop.objective.higher_is_better,
            seed=loop.seed,
            protocol=settings["protocol"],
            training={**settings["training"], "trainer": type(trainer).__name__},
            details={
                "method": method_facts(loop),
                "stream": {"experiences": self.names},
                "writes": loop.writes,
                "arguments": trainer.args.to_sanitized_dict(),
            },
            matrix=self.matrix,
            baseline=None,
            cost={
                **counted(loop), "evaluation_seconds": self.seconds, "trainable_parameters": self.trainable,
                "stored_bytes": loop.stored_bytes(),
            },
            status="complete" if complete else "running",
            plasticity=plasticity_of(loop),
            curves={"loss": self.losses},
            environment=environment(loop.device),
        )  # fmt: skip

    def write(self, report: dict[str, Any], folder: Path) -> None:
        """report.html and report.json."""
        from ..comparison import write_run

        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, report, everything=True)
