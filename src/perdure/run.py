"""Runs a recipe over its whole stream in one folder: learn, score, save, report; resumes where it was stopped."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput, ForgotTooMuch, Interrupted
from .evaluation.plasticity import feature_drift
from .learner import Learner
from .memory.observe import RouterLog, observing
from .models import load_model, model_name
from .progress import Progress
from .recipe import Recipe, resolved_yaml
from .registry import OBJECTIVES
from .state import (
    RunLock,
    StateStore,
    atomic_write_text,
    environment,
    environment_differences,
    model_hash,
    truncate,
)
from .streams import Experience, Stream, build_stream

PROBE_ROWS = 64
"""Rows of each experience on which drift and routing are measured."""


def run_recipe(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Runs a recipe, or goes on with it, in `recipe.output_dir`.

    Args:
        recipe: what to run; its folder may hold an unfinished run of the same recipe.
        progress: show bars.

    Returns:
        The content of report.json.

    Raises:
        BadInput: the folder belongs to another recipe.
        CannotWrite: another run holds the folder, or the disk is full.
        Interrupted: Ctrl-C; a checkpoint was written first.
        NonFiniteLoss, ProtocolRefused, ForgotTooMuch: as they say.
    """
    folder = recipe.folder
    _refuse_other_recipe(folder, recipe)
    finished = read_report(folder)
    if finished is not None and finished["status"] == "complete":
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder), interruptible() as interrupt:
        return Run(recipe, folder, Progress(enabled=progress), interrupt).go()


def read_report(folder: str | Path) -> dict[str, Any] | None:
    """report.json of a run folder, or None where there is none.

    Raises:
        BadInput: the file is not a report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: is not valid JSON ({error}); delete it and run `perdure run` again") from None


def undo(folder: str | Path, to: int | None = None) -> int:
    """Takes a run back to before an experience; the states and report rows after it are dropped.

    Args:
        folder: the run.
        to: index of the experience to return to before; the last one learnt when absent.

    Returns:
        Index of the experience that a new `perdure run` learns next.

    Raises:
        BadInput: the folder is no run, or no state from that boundary was kept.
    """
    folder = Path(folder)
    if not (folder / "state").is_dir():
        raise BadInput(f"{folder}: is not a run folder (it has no state); give the folder of a `perdure run`")
    with RunLock(folder):
        store = StateStore(folder / "state")
        kept = store.boundaries()
        if to is None:
            newest = store.load()
            done = newest.values["position"]["experience"]
            to = done if newest.values["position"]["phase"] == "train" else done - 1
        if to not in kept:
            listed = ", ".join(map(str, kept)) or "none"
            raise BadInput(f"--to {to}: no state from before experience {to} was kept; kept: {listed}")
        store.rollback(boundary=to)
        for name in ("report.json", "report.html"):
            (folder / name).unlink(missing_ok=True)
    return to


def _refuse_other_recipe(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    then, now = path.read_text(encoding="utf-8"), resolved_yaml(recipe)
    if then == now:
        return
    old, new = then.splitlines(), now.splitlines()
    first = next((f"{a!r} there, {b!r} now" for a, b in zip(old, new, strict=False) if a != b), "another length")
    raise BadInput(
        f"output_dir: {folder} holds a run of another recipe ({first}); give another output_dir, "
        "or the old settings to go on with it"
    )


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """First Ctrl-C sets the event, so that the run can save and stop between steps; the second one raises."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """One run in one folder.

    Args:
        recipe: what to run.
        folder: exists and is locked by the caller.
        progress: bars, or nothing.
        interrupt: set when the user wants to stop.
    """

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress, interrupt: threading.Event):
        self.recipe, self.folder, self.progress, self.interrupt = recipe, folder, progress, interrupt
        self.stream: Stream = build_stream(recipe.stream, recipe.seed)
        if self.stream.length is None:
            raise BadInput("stream: is unbounded; `perdure run` needs an end, use Learner.partial_fit for live data")
        ((objective, _),) = OBJECTIVES.parse(recipe.objective, "objective")
        if recipe.training.num_threads:
            torch.set_num_threads(recipe.training.num_threads)
        progress.message(f"loading {model_name(recipe.model)}")
        model, processor, self.model_facts = load_model(recipe.model, objective, seed=recipe.seed)
        self.base_hash = model_hash(dict(model.state_dict()))
        classes = list(self.stream.classes) if self.stream.classes else None
        self.learner = Learner(
            model, processor, method=recipe.method, head=recipe.head, objective=recipe.objective,
            training=recipe.training, protocol=recipe.protocol, seed=recipe.seed, classes=classes,
        )  # fmt: skip
        self.store = StateStore(
            folder / "state", limit=recipe.training.save_total_limit, keep_boundaries=recipe.training.keep_boundaries
        )
        self.losses_path = folder / "losses.jsonl"
        self.matrix: list[list[float | None]] = []
        self.baseline: list[float | None] | None = None
        self.trainable = 0
        self.drift: list[float | None] = []
        self.router: dict[str, dict[str, float]] = {}
        self.router_history: list[dict[str, float]] = []
        self.evaluation_seconds = 0.0
        self.probes: dict[int, Tensor] = {}
        self.environment = environment()
        self.notes: list[str] = []

    # ---- the whole run
    def go(self) -> dict[str, Any]:
        atomic_write_text(self.folder / "recipe.yaml", resolved_yaml(self.recipe))
        self._resume()
        learner, length = self.learner, self.stream.length or 0
        with self.progress:
            if not self.matrix and self.baseline is None and self.recipe.protocol.evaluate != "seen":
                self.baseline = self._row(-1)
            if not len(self.store):
                self._save(boundary=0)
            start = learner.position.experience - (learner.position.phase == "evaluate")
            self.stream.seek(start)
            for experience in self.stream:
                if learner.position.phase != "evaluate":
                    self._learn(experience)
                self._after(experience)
                self.progress.experience_done(experience, self.matrix[-1], learner.objective.metric)
                self._report("complete" if experience.index + 1 == length else "running")
        report = self._report("complete")
        self._check_limit(report)
        return report

    def _learn(self, experience: Experience) -> None:
        length = self.stream.length or 0
        self.progress.start(f"experience {experience.index + 1}/{length} {experience.name}")
        self.learner.learn(experience, on_step=self._on_step)

    def _on_step(self, learner: Any, losses: dict[str, float]) -> None:
        self.trainable = max(self.trainable, learner.trainable_parameters())
        self.progress.step(learner.position.step, learner.steps_planned, losses.get("loss"))
        if losses:
            line = {"step": learner.counters.steps, "experience": learner.position.experience, **losses}
            with self.losses_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        every = self.recipe.training.save_steps
        if self.interrupt.is_set() or (every and learner.position.step % every == 0):
            self._save()
        if self.interrupt.is_set():
            raise Interrupted(f"stopped at step {learner.counters.steps}; the same command goes on from there")

    def _after(self, experience: Experience) -> None:
        """Scores, probes and saves once an experience was learnt."""
        learner = self.learner
        learner.position.phase = "evaluate"
        started = time.perf_counter()
        if self.interrupt.is_set():
            self._save()
            raise Interrupted(f"stopped after experience {experience.index}; the same command goes on from there")
        self._probe(experience)
        self.matrix.append(self._row(experience.index))
        learner.position.phase = "boundary"
        self.evaluation_seconds += time.perf_counter() - started
        self._save(boundary=experience.index + 1)

    def _row(self, learnt: int) -> list[float | None]:
        """One row of R: experiences the protocol lets us score, null elsewhere."""
        length = self.stream.length or 0
        reach = {"seen": learnt + 1, "seen_and_next": learnt + 2, "all": length}[self.recipe.protocol.evaluate]
        row: list[float | None] = [None] * length
        for index in range(min(reach, length)):
            self.progress.note(f"scoring experience {index + 1}")
            row[index] = self.learner.evaluate([self.stream.experience(index)])[index]
        return row

    def _probe(self, experience: Experience) -> None:
        """Drift of the features of earlier experiences since each was learnt, and how the router answers them."""
        learner = self.learner
        log = RouterLog()
        observed = bool(learner.services.router_log.sites)
        if learner.head is not None:
            rows = list(experience.train[:PROBE_ROWS])
            if learner.protocol.boundaries == "train" and not learner.caches_features:
                moved = [
                    feature_drift(before, learner.features(self.stream.experience(index).train[:PROBE_ROWS]))
                    for index, before in sorted(self.probes.items())
                ]
                self.drift.append(sum(moved) / len(moved) if moved else None)
            with observing(log.add) if observed else nullcontext():
                self.probes[experience.index] = learner.features(rows)
        elif observed:
            with observing(log.add), torch.no_grad():
                for batch in learner.batches(experience.train[:PROBE_ROWS]):
                    learner.forward(batch)
        if observed:
            training = learner.services.router_log.summary()
            self.router = {
                site: {**log.summary().get(site, {}), "new_share": facts["new_share"]} for site, facts in training.items()
            }
            self.router_history.append(_mean_over_sites(self.router))
            learner.services.router_log.reset()

    # ---- state
    def _save(self, boundary: int | None = None) -> None:
        tensors, values = self.learner.state_dict()
        tensors |= {f"probe/{index}": probe for index, probe in self.probes.items()}
        values["run"] = {
            "matrix": self.matrix, "baseline": self.baseline, "trainable": self.trainable, "drift": self.drift,
            "router": self.router, "router_history": self.router_history,
            "losses_bytes": self.losses_path.stat().st_size if self.losses_path.exists() else 0,
            "environment": self.environment, "stream_hash": self.stream.hash, "base_hash": self.base_hash,
            "evaluation_seconds": self.evaluation_seconds, "notes": self.notes,
        }  # fmt: skip
        self.store.save(self.learner.counters.steps, tensors, values, boundary=boundary)

    def _resume(self) -> None:
        if not len(self.store):
            self.losses_path.unlink(missing_ok=True)
            return
        state = self.store.load()
        kept = state.values["run"]
        for what, now in (("stream_hash", self.stream.hash), ("base_hash", self.base_hash)):
            if kept[what] != now:
                raise BadInput(
                    f"{what}: {kept[what][:12]} when the run began, {now[:12]} now; the {what.split('_')[0]} changed, "
                    "so going on would not be the same run. Restore it or start in another output_dir"
                )
        for difference in environment_differences(kept["environment"], self.environment):
            self.notes.append(f"environment changed on resume: {difference}")
            self.progress.message(f"warning: environment changed: {difference}; the rest may differ in the last bits")
        self.learner.load_state_dict(state.tensors, state.values)
        self.matrix, self.baseline, self.trainable = kept["matrix"], kept["baseline"], kept["trainable"]
        self.drift, self.router_history, self.router = kept["drift"], kept["router_history"], kept["router"]
        self.evaluation_seconds = kept["evaluation_seconds"]
        self.notes = [*kept["notes"], *(note for note in self.notes if note not in kept["notes"])]
        self.probes = {int(k.split("/")[1]): t for k, t in state.tensors.items() if k.startswith("probe/")}
        if self.losses_path.exists():
            truncate(self.losses_path, kept["losses_bytes"])

    # ---- report
    def _report(self, status: str) -> dict[str, Any]:
        from .report.build import build_report, write_json
        from .report.html import render_run

        learner, recipe = self.learner, self.recipe
        settings = learner.settings()
        report = build_report(
            name=recipe.name,
            method="+".join(method.name for method in learner.methods),
            head=None if learner.head is None else learner.head.name,
            model=self.model_facts["name"],
            stream=self.stream.name,
            objective=learner.objective.name,
            metric=learner.objective.metric,
            higher_is_better=learner.objective.higher_is_better,
            seed=recipe.seed,
            protocol=settings["protocol"],
            training=settings["training"],
            details=self._details(settings),
            matrix=self.matrix,
            baseline=self.baseline,
            cost=self._cost(),
            status=status,
            plasticity=self._plasticity(),
            curves={"loss": self._losses()},
            router=self.router,
            environment=self.environment,
            notes=self.notes,
        )
        write_json(self.folder / "report.json", report)
        if status == "complete":
            render_run(report, self.folder / "report.html")
        return report

    def _details(self, settings: dict[str, Any]) -> dict[str, Any]:
        learner, stream = self.learner, self.stream.describe()
        return {
            "arm": self.recipe.label,
            "method": [
                {"name": m.name, "title": m.title, "config": m.config.model_dump(mode="json"), "status": m.status,
                 "removal": m.removal} for m in learner.methods
            ],
            "head": settings["head"],
            "objective": settings["objective"],
            "model": {**self.model_facts, "hash": self.base_hash},
            "stream": stream,
            "tuning": self.recipe.tuning,
            "router_history": self.router_history,
            "writes": learner.writes,
        }  # fmt: skip

    def _plasticity(self) -> dict[str, float]:
        found: dict[str, float] = {}
        measured = [value for value in self.drift if value is not None]
        if measured:
            found["feature_drift"] = measured[-1]
        if self.router_history:
            found |= {name: self.router_history[-1][name] for name in ("off_rate", "new_share") if name in self.router_history[-1]}
        for method in self.learner.methods:
            found |= method.plasticity()
        return found

    def _cost(self) -> dict[str, float]:
        learner = self.learner
        return {
            "seconds": learner.counters.seconds, "evaluation_seconds": self.evaluation_seconds,
            "trainable_parameters": self.trainable or learner.trainable_parameters(),
            "total_parameters": sum(p.numel() for p in learner.system.parameters()),
            "stored_bytes": learner.stored_bytes(), "steps": learner.counters.steps, "samples": learner.counters.samples,
            "extra_passes": learner.counters.extra_passes, "extra_rows": learner.counters.extra_rows,
        }  # fmt: skip

    def _losses(self) -> list[list[float]]:
        if not self.losses_path.exists():
            return []
        lines = [json.loads(line) for line in self.losses_path.read_text(encoding="utf-8").splitlines()]
        return [[line["step"], line["experience"], line["loss"]] for line in lines]

    def _check_limit(self, report: dict[str, Any]) -> None:
        limit, found = self.recipe.protocol.max_forgetting, report["metrics"].get("forgetting")
        if limit is not None and found is not None and found > limit:
            raise ForgotTooMuch(
                f"forgetting is {found:.4f}, protocol.max_forgetting allows {limit}; the run is kept in {self.folder}, "
                f"`perdure undo {self.folder}` takes its last experience back"
            )


def _mean_over_sites(router: dict[str, dict[str, float]]) -> dict[str, float]:
    names = {name for facts in router.values() for name in facts}
    return {
        name: sum(facts.get(name, 0.0) for facts in router.values()) / max(1, len(router)) for name in sorted(names)
    }
