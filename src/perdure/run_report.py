"""The report of a run, from what the run holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .learner import Learner
    from .run import Run


def report_of(run: Run, status: str) -> dict[str, Any]:
    """The content of report.json (`report.build`) as the run stands now."""
    from .report.build import build_report

    learner, recipe = run.learner, run.recipe
    settings = learner.settings()
    return build_report(
        name=recipe.name,
        method="+".join(method.name for method in learner.methods),
        head=None if learner.head is None else learner.head.name,
        model=run.model_facts["name"],
        stream=run.stream.name,
        objective=learner.objective.name,
        metric=learner.objective.metric,
        higher_is_better=learner.objective.higher_is_better,
        seed=recipe.seed,
        protocol=settings["protocol"],
        training=settings["training"],
        details=_details(run, settings),
        matrix=run.matrix,
        baseline=run.baseline,
        cost=_cost(run),
        status=status,
        plasticity=_plasticity(run),
        metrics=run.accounts.figures(learner.objective.higher_is_better)
        | ({} if run.probing is None else run.probing.figures(learner.objective.higher_is_better)),
        curves={"loss": read_losses(run.losses_path), **run.accounts.curves()}
        | ({} if run.probing is None else {"probe": run.probing.curves()}),
        per_class=run.accounts.table(),
        router=run.router,
        environment=run.environment,
        notes=[*run.notes, *_silence(run)],
    )


def _details(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    learner = run.learner
    return {
        "arm": run.recipe.label,
        "method": method_facts(learner),
        "head": settings["head"],
        "objective": settings["objective"],
        "model": {**run.model_facts, "hash": run.base_hash},
        "stream": run.stream.describe(),
        "tuning": run.recipe.tuning,
        "pretraining": _overlap(run),
        "router_history": run.router_history,
        "writes": learner.writes,
    }  # fmt: skip


def method_facts(learner: Learner) -> list[dict[str, Any]]:
    """Each method with its settings, as reports hold them."""
    return [
        {"name": m.name, "title": m.title, "config": m.config.model_dump(mode="json"), "status": m.status,
         "removal": m.removal, "needs": sorted(m.needs)} for m in learner.methods
    ]  # fmt: skip


def counted(learner: Learner) -> dict[str, float]:
    """What a learner itself has counted, for `cost` of a report."""
    counters = learner.counters
    return {
        "seconds": counters.seconds, "total_parameters": sum(p.numel() for p in learner.system.parameters()),
        "steps": counters.steps, "samples": counters.samples,
        "extra_passes": counters.extra_passes, "extra_rows": counters.extra_rows,
    }  # fmt: skip


def _overlap(run: Run) -> dict[str, Any]:
    from .pretraining import overlap, pretraining_of

    every = [run.stream.experience(index) for index in range(run.length)]
    known = run.recipe.pretraining or pretraining_of(run.recipe.model)
    return overlap(known, [name for each in every for name in each.classes], [each.name for each in every])


MOSTLY = 0.5
"""Share of tokens without an open item from which a report says so in words."""


def _plasticity(run: Run) -> dict[str, float]:
    found: dict[str, float] = {}
    measured = [value for value in run.drift if value is not None]
    if measured:
        found["feature_drift"] = measured[-1]
    if run.router_history:
        last = run.router_history[-1]
        found |= {name: last[name] for name in ("output_ratio", "off_rate", "new_share") if name in last}
    return found | (run.accounts.plasticity[-1] if run.accounts.plasticity else {})


def _silence(run: Run) -> list[str]:
    """A memory whose items nearly all stay below their threshold is no memory any more; nobody shall overlook that."""
    last = run.router_history[-1] if run.router_history else {}
    items = int(max((facts.get("items", 0) for facts in run.router.values()), default=0))
    if last.get("off_rate", 0.0) <= MOSTLY or not items:
        return []
    said = f"At {last['off_rate']:.0%} of the tokens no item of the memory answers: there the host is as it was before."
    settings = [f"method.{m.name}.threshold" for m in run.learner.methods if getattr(m.config, "threshold", 0)]
    if settings:
        said += f" Scores fall as items grow in number ({items} a map here); lower {' or '.join(settings)}."
    return [said]


def _cost(run: Run) -> dict[str, float]:
    from .replay import row_bytes

    learner, stored = run.learner, run.accounts.stored
    return {
        **counted(learner), "evaluation_seconds": run.evaluation_seconds,
        "trainable_parameters": run.trainable or learner.trainable_parameters(),
        "stored_bytes": stored[-1] if stored else learner.stored_bytes(),
        "rehearsal_bytes": sum(map(row_bytes, learner.replay.rows)),
        **run.accounts.cost(), **_probe_cost(run),
    }  # fmt: skip


def _probe_cost(run: Run) -> dict[str, float]:
    """Time of the probes, and its share of all the time that learning, scoring and probing took."""
    if run.probing is None:
        return {}
    seconds = run.probing.seconds
    total = run.learner.counters.seconds + run.evaluation_seconds + seconds
    return {"probe_seconds": seconds, "probe_share": seconds / total if total else 0.0}


def read_losses(path: Path, size: int | None = None) -> list[list[float]]:
    """The loss curve of losses.jsonl, or of its first `size` bytes: [step, experience, value] of each logged step."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_bytes()[:size].decode("utf-8").splitlines()]
    return [[line["step"], line["experience"], line["loss"]] for line in lines]


def mean_over_sites(router: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each figure of the router, averaged over all sites."""
    names = {name for facts in router.values() for name in facts}
    return {
        name: sum(facts.get(name, 0.0) for facts in router.values()) / max(1, len(router)) for name in sorted(names)
    }
