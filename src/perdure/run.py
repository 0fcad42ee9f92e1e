"""Runs a recipe over its whole stream in one folder: learn, score, save, report; resumes where it was stopped."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput, DamagedState, ForgotTooMuch, Interrupted, NonFiniteLoss, ProtocolRefused
from .learner import Learner
from .memory.observe import RouterLog
from .metering import inference
from .models import load_model, model_name
from .probing import Probing
from .progress import Progress
from .protocol import declared_classes
from .recipe import Recipe, load_recipe, resolved_yaml
from .registry import OBJECTIVES
from .run_accounts import PROBE_ROWS, Accounts, mean_drift
from .run_folder import (
    LOCK_FILE,
    LOSSES_FILE,
    PAGE_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    STATE_FOLDER,
    leave_no_trace,
    read_report,
    refuse_foreign_folder,
    told,
    undo,
)
from .run_report import mean_over_sites, report_of
from .state import (
    RunLock,
    StateStore,
    append_line,
    atomic_write_text,
    environment,
    environment_differences,
    files,
    model_hash,
    truncate,
)
from .streams import Experience, Stream, build_stream

__all__ = ["Run", "read_report", "run_recipe", "undo"]


def run_recipe(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Runs a recipe, or goes on with it, in `recipe.output_dir`.

    Args:
        recipe: what to run; its folder may hold an unfinished run of the same recipe.
        progress: show bars on a terminal, and lines elsewhere.

    Returns:
        The content of report.json.

    Raises:
        BadInput: the folder belongs to another recipe, or something cannot be honoured; what the folder held stays.
        CannotWrite: another run holds the folder, or the disk is full.
        Interrupted: Ctrl-C; a checkpoint was written first.
        NonFiniteLoss, ProtocolRefused, ForgotTooMuch: as they say.
    """
    folder = recipe.folder
    refuse_foreign_folder(folder, recipe)
    finished = read_report(folder)
    if finished is not None and finished.get("status") == "complete":
        check_limit(finished, recipe)
        return finished
    bars = Progress(enabled=progress)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        used = (folder / LOCK_FILE).exists()
        if used:  # another run may be at work here: refused before a model is loaded
            stack.enter_context(RunLock(folder))
        run = Run(recipe, bars)  # before the folder is made: bad input leaves no trace
        if not used:
            with files.writing(folder):
                files.make_folder(folder, exist_ok=True)
            stack.enter_context(RunLock(folder))
            refuse_foreign_folder(folder, recipe)  # another one may have begun meanwhile
        begun = (folder / RECIPE_FILE).exists()
        try:
            with interruptible(bars) as interrupt:
                return run.go(interrupt)
        except (BadInput, ProtocolRefused):
            if not begun and not run.learner.counters.steps and not run.matrix:
                leave_no_trace(folder, missing)
            raise


def check_limit(report: dict[str, Any], recipe: Recipe) -> None:
    """Compares the report's forgetting with the limit of the recipe.

    Raises:
        ForgotTooMuch: it is beyond the limit.
    """
    limit, found = recipe.protocol.max_forgetting, report["metrics"].get("forgetting")
    if limit is not None and found is not None and found > limit:
        raise ForgotTooMuch(
            f"forgetting is {found:.4f}, protocol.max_forgetting allows {limit}; the run is kept in {recipe.folder}, "
            f"`perdure undo {recipe.folder}` takes its last experience back"
        )


@contextmanager
def interruptible(bars: Progress) -> Iterator[threading.Event]:
    """First Ctrl-C sets the event, so that the run can save and stop between steps; the second one raises."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        bars.warn("stopping as soon as a checkpoint is written; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def fresh_head(learner: Learner, names: list[str]) -> Iterator[None]:
    """The learner with an untrained head for `names`, as a baseline of what learning adds; the old head comes back."""
    head, labels = learner.head, learner.labels
    untrained = copy.deepcopy(head)
    if untrained is not None:
        untrained.grow(len(names))
        untrained.module.to(learner.device)
    learner.head, learner.labels = untrained, {name: number for number, name in enumerate(names)}
    learner.name_classes()
    try:
        yield
    finally:
        learner.head, learner.labels = head, labels


@dataclass
class Probe:
    """What is measured after an experience beside its scores."""

    features: Tensor | None = None
    drift: float | None = None
    router: dict[str, dict[str, float]] = field(default_factory=dict)


class Run:
    """One run in one folder. Making it reads stream and model and writes nothing.

    Args:
        recipe: what to run.
        progress: what the user sees.

    Raises:
        BadInput: stream, model or settings that cannot be honoured, any row of any experience included.
    """

    def __init__(self, recipe: Recipe, progress: Progress):
        self.recipe, self.folder, self.progress = recipe, recipe.folder, progress
        self.interrupt = threading.Event()
        self.stream: Stream = build_stream(recipe.stream, recipe.seed)
        if self.stream.length is None:
            raise BadInput("stream: is unbounded; `perdure run` needs an end, use Learner.partial_fit for live data")
        self.length: int = self.stream.length
        recipe.training.check_length(self.length)
        ((objective, _),) = OBJECTIVES.parse(recipe.objective, "objective")
        if recipe.training.num_threads:
            torch.set_num_threads(recipe.training.num_threads)
        self.notes: list[str] = [recipe.choice] if recipe.choice else []
        for line in (*self.notes, f"loading {model_name(recipe.model)}"):
            progress.message(line)
        model, processor, self.model_facts = load_model(recipe.model, objective, seed=recipe.seed)
        self.base_hash = model_hash(dict(model.state_dict()))
        self.learner = Learner(
            model, processor, method=recipe.method, head=recipe.head, objective=recipe.objective,
            training=recipe.training, protocol=recipe.protocol, seed=recipe.seed,
            classes=declared_classes(self.stream.classes, recipe.protocol),
        )  # fmt: skip
        self._check_rows()
        self.store: StateStore
        self.losses_path = self.folder / LOSSES_FILE
        self.matrix: list[list[float | None]] = []
        self.baseline: list[float | None] | None = None
        self.trainable = 0
        self.drift: list[float | None] = []
        self.router: dict[str, dict[str, float]] = {}
        self.router_history: list[dict[str, float]] = []
        self.evaluation_seconds = 0.0
        self.probes: dict[int, Tensor] = {}
        probe = recipe.protocol.probe
        self.probing = None if probe is None else Probing(probe)
        self.accounts = Accounts()
        self.environment = environment(self.learner.device)

    def _check_rows(self) -> None:
        """A wrong row of the last experience is found now, not after hours. Images are read when their turn comes."""
        names = []
        for index in range(self.length):
            experience = self.stream.experience(index)
            names.append(experience.name)
            for split in ("train", "test"):
                rows = getattr(experience, split)
                if len(rows) and "image" not in rows[0]:
                    try:
                        self.learner.objective.check(rows, self.learner.processor)
                    except BadInput as error:
                        raise BadInput(f"experience {index} ({experience.name!r}), {split} {error}") from None
        unused = [name for name in getattr(self.learner.objective.config, "scorers", ()) if name not in names]
        if unused:  # a part of a stream may be run, so it is no error; a typing error would be scored by another rule
            self.progress.warn(
                f"objective.instruction.scorers: no experience is named {', '.join(unused)}; there are "
                f"{', '.join(names)}"
            )

    # ---- the whole run
    def go(self, interrupt: threading.Event) -> dict[str, Any]:
        """Runs to the end; the caller holds the folder's lock.

        Args:
            interrupt: set when the user wants to stop.
        """
        self.interrupt = interrupt
        atomic_write_text(self.folder / RECIPE_FILE, resolved_yaml(self.recipe))
        training = self.recipe.training
        self.store = StateStore(
            self.folder / STATE_FOLDER, limit=training.save_total_limit, keep_boundaries=training.keep_boundaries
        )
        with told(self.progress.warn):
            self._resume()
        learner = self.learner
        self.accounts.begin(learner)
        with self.progress:
            if not len(self.store):
                started = time.perf_counter()
                self.baseline = self._baseline()
                self.evaluation_seconds += time.perf_counter() - started
                self._save(boundary=0)
            self.stream.seek(learner.position.experience - (learner.position.phase == "evaluate"))
            for experience in self.stream:
                if learner.position.phase != "evaluate":
                    self.progress.start(f"experience {experience.index + 1}/{self.length} {experience.name}")
                    learner.meter_next = experience.index == self.length - 1  # once a run, where most has grown
                    learner.learn(experience, on_step=self._on_step)
                self._after(experience)
                self.progress.experience_done(experience, self.matrix[-1], learner.objective.metric)
            report = self._finish()
        check_limit(report, self.recipe)
        return report

    def _on_step(self, learner: Any, losses: dict[str, float]) -> None:
        position = learner.position
        if (losses or position.step == 1) and not any(method.pretrains for method in learner.methods):
            self.trainable = max(self.trainable, learner.trainable_parameters())
        self.progress.step(position.step, learner.steps_planned, f"loss {losses['loss']:.3f}" if losses else None)
        if losses:
            line = {"step": learner.counters.steps, "experience": position.experience, **losses}
            append_line(self.losses_path, json.dumps(line))
        if self.probing is not None:
            self.probing.after_step(learner, self.stream)
        every = self.recipe.training.save_steps
        if self.interrupt.is_set() or (every and position.step % every == 0):
            self._save()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.interrupt.is_set():
            raise Interrupted(
                f"stopped after step {self.learner.counters.steps}, which is saved in {self.folder}; "
                "the same command goes on from there"
            )

    def _after(self, experience: Experience) -> None:
        """Scores, probes and saves once an experience was learnt. Interrupted, it is done again from its start."""
        learner = self.learner
        learner.position.phase = "evaluate"
        started = time.perf_counter()
        self._refuse_non_finite(learner.learnt_state()[0])  # not of what trains alone: a bank has frozen its atoms
        try:
            self._stop_if_asked()
            probe = self._probe(experience)
            counts: dict[str, list[int]] = {}
            row = self._row(experience.index, counts=counts)
            if experience.index == self.length - 1:
                self.accounts.validate(learner, self.stream, self._stop_if_asked)
        except Interrupted:
            self._save()
            raise
        self._keep(experience, probe, counts)
        self.evaluation_seconds += time.perf_counter() - started
        if self.probing is not None:  # counts its own time
            self.probing.after_experience(learner, self.stream)
        self.matrix.append(row)
        learner.position.phase = "boundary"
        report = report_of(self, "running")
        self._save(boundary=experience.index + 1, report={**report, "curves": {}})
        if experience.index + 1 < self.length:
            from .report.build import write_json

            write_json(self.folder / REPORT_FILE, report)

    def _finish(self) -> dict[str, Any]:
        from .report.build import write_json
        from .report.html import render_run

        report = report_of(self, "complete")
        render_run(report, self.folder / PAGE_FILE)
        write_json(self.folder / REPORT_FILE, report)  # last: it is what says that the run is complete
        return report

    # ---- scores
    def _row(
        self, learnt: int, everything: bool = False, counts: dict[str, list[int]] | None = None
    ) -> list[float | None]:
        """One row of R: experiences the protocol lets us score, null elsewhere. `counts` takes the right answers by
        class on those learnt.
        """
        evaluate = "all" if everything else self.recipe.protocol.evaluate
        reach = {"seen": learnt + 1, "seen_and_next": learnt + 2, "all": self.length}[evaluate]
        row: list[float | None] = [None] * self.length
        if any("all_data" in method.needs for method in self.learner.methods) and 0 <= learnt < self.length - 1:
            return row  # joint training learns at the end: before that an untrained head would be scored
        scored = [self.stream.experience(index) for index in range(min(reach, self.length))]
        total = sum(len(experience.test) for experience in scored)
        when = "before learning" if learnt < 0 else f"after experience {learnt + 1}"
        self.progress.start(f"scoring {when}", total)
        done = 0
        for experience in scored:
            self._stop_if_asked()
            mine = counts if experience.index <= learnt else None
            score = self.learner.evaluate([experience], per_class=mine)[experience.index]
            if score is not None and not math.isfinite(score):
                raise NonFiniteLoss(
                    f"{self.learner.objective.metric} on experience {experience.index} is {score} after experience "
                    f"{learnt}; the last good state is kept. Lower training.learning_rate"
                )
            row[experience.index] = score
            done += len(experience.test)
            self.progress.step(done, total)
        return row

    def _baseline(self) -> list[float | None] | None:
        """Scores before any learning, on which forward transfer rests (Lopez-Paz & Ranzato 2017, b_j).

        Of the model as it came for language modelling; of a fresh head where every later experience has only classes
        that came before it. None elsewhere: a class that was never seen scores 0 by construction, which is no transfer.
        """
        if self.recipe.protocol.evaluate == "seen":
            return None
        if self.learner.head is None or self.learner.protocol.label_space == "declared":  # scores before it learns
            return self._row(-1, everything=True)
        known: dict[str, None] = {}
        for index in range(self.length):
            classes = self.stream.experience(index).classes
            if index and not set(classes) <= set(known):
                return None
            known |= dict.fromkeys(classes)
        with fresh_head(self.learner, list(known)):
            return self._row(-1, everything=True)

    def _probe(self, experience: Experience) -> Probe:
        """Drift of the features of earlier experiences since each was learnt, and how the router answers them."""
        learner, log, probe = self.learner, RouterLog(), Probe()
        observed = bool(learner.services.router_log.sites)
        rows = list(experience.train[:PROBE_ROWS])
        if learner.head is not None:
            probe.features = learner.features(rows)
            self._refuse_non_finite({"features": probe.features})
            if learner.protocol.boundaries == "train" and not learner.caches_features:
                probe.drift = mean_drift(learner, self.stream, self.probes)
        if observed:
            learner.observe(rows, log)
            training, answers = learner.services.router_log.summary(), log.summary()
            probe.router = {
                site: {**answers.get(site, {}), "new_share": facts["new_share"]} for site, facts in training.items()
            }
        return probe

    def _keep(self, experience: Experience, probe: Probe, counts: dict[str, list[int]]) -> None:
        learner, accounts = self.learner, self.accounts
        accounts.boundary(learner, counts)
        if experience.index == self.length - 1:
            accounts.work |= inference(learner, experience)
        accounts.look(learner)
        if probe.features is not None:
            self.probes[experience.index] = probe.features
            if self.learner.protocol.boundaries == "train" and not self.learner.caches_features:
                self.drift.append(probe.drift)
        if probe.router:
            self.router = probe.router
            self.router_history.append(mean_over_sites(probe.router))
            self.learner.services.router_log.reset()

    # ---- state
    def _refuse_non_finite(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteLoss(
                    f"{name}: holds NaN or infinity after step {self.learner.counters.steps}; the last good state is "
                    "kept. Lower training.learning_rate, or set training.max_grad_norm"
                )

    def _save(self, boundary: int | None = None, report: dict[str, Any] | None = None) -> None:
        self._refuse_non_finite(self.learner.learnt_state()[0])
        self.accounts.look(self.learner)
        tensors, values = self.learner.state_dict()
        tensors |= {f"probe/{index}": probe for index, probe in self.probes.items()}
        values["run"] = {
            "matrix": self.matrix, "baseline": self.baseline, "trainable": self.trainable, "drift": self.drift,
            "router": self.router, "router_history": self.router_history,
            "losses_bytes": self.losses_path.stat().st_size if self.losses_path.exists() else 0,
            "environment": self.environment, "stream_hash": self.stream.hash, "base_hash": self.base_hash,
            "evaluation_seconds": self.evaluation_seconds, "notes": self.notes, "report": report,
            "probing": None if self.probing is None else self.probing.state_dict(),
            "accounts": self.accounts.state_dict(),
        }  # fmt: skip
        self.store.save(self.learner.counters.steps, tensors, values, boundary=boundary)

    def _resume(self) -> None:
        if not len(self.store):
            damaged = sorted(path.name for path in self.store.folder.glob("damaged-*"))
            if damaged:
                raise DamagedState(
                    f"{self.store.folder}: no checkpoint is whole ({', '.join(damaged)}); start again in another "
                    "output_dir, or delete this folder"
                )
            self.losses_path.unlink(missing_ok=True)
            return
        state = self.store.load()
        kept = state.values["run"]
        for what, now in (("stream_hash", self.stream.hash), ("base_hash", self.base_hash)):
            if kept[what] != now:
                word = {"stream_hash": "stream", "base_hash": "model"}[what]
                raise BadInput(
                    f"{word}: its hash was {kept[what][:12]} when the run began and is {now[:12]} now; it changed, "
                    "so going on would not be the same run. Restore it or start in another output_dir"
                )
        for difference in environment_differences(kept["environment"], self.environment):
            self.notes.append(f"environment changed on resume: {difference}")
            self.progress.warn(f"environment changed: {difference}; the rest may differ in the last bits")
        self.learner.load_state_dict(state.tensors, state.values)
        self.matrix, self.baseline, self.trainable = kept["matrix"], kept["baseline"], kept["trainable"]
        self.drift, self.router_history, self.router = kept["drift"], kept["router_history"], kept["router"]
        self.evaluation_seconds = kept["evaluation_seconds"]
        self.accounts = Accounts.of(kept.get("accounts"), len(kept["matrix"]))
        if self.probing is not None:
            self.probing.load_state_dict(kept["probing"])
        self.notes = [*kept["notes"], *(note for note in self.notes if note not in kept["notes"])]
        self.probes = {int(k.split("/")[1]): t for k, t in state.tensors.items() if k.startswith("probe/")}
        truncate(self.losses_path, kept["losses_bytes"])


def learner_of(folder: str | Path) -> Learner:
    """The learner of a folder of `save_pretrained`, or of the newest state of a run.

    Raises:
        BadInput: the folder is neither, or its model cannot be found.
    """
    from .state.portable import DOCUMENT as PORTABLE

    folder = Path(folder)
    if (folder / PORTABLE).is_file():
        return Learner.from_pretrained(folder)
    if not (folder / RECIPE_FILE).is_file() or not (folder / STATE_FOLDER).is_dir():
        raise BadInput(
            f"export: {folder} holds neither {PORTABLE} of `save_pretrained` nor {RECIPE_FILE} and {STATE_FOLDER} of a "
            "run; give one of these folders"
        )
    run = Run(load_recipe(folder / RECIPE_FILE), Progress(False))
    state = StateStore(folder / STATE_FOLDER).load()
    if state.values["run"]["base_hash"] != run.base_hash:
        raise BadInput(f"model: its weights are not those that the run in {folder} began with; restore them")
    run.learner.load_state_dict(state.tensors, state.values)
    return run.learner
