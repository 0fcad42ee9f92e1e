"""The only training loop. It owns the step; methods return losses (DESIGN decision 1)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .assembly import build_auxiliary_head, build_head, build_methods, check_protocol, settings_of
from .bookkeeping import Counters, Past, Position, Unlearnt, quiet
from .config import ProtocolConfig, TrainingConfig
from .data import Batch, Output, Row, Rows
from .errors import BadInput, NonFiniteLoss
from .hosts import Host
from .loading import Plan, Prefetch, derived_seed, make_batch, take, without_fillers
from .memory.observe import observing
from .methods import Method
from .optim import Optimization
from .registry import OBJECTIVES
from .replay import ReplayBuffer
from .services import Services
from .streams.experience import Experience


class System(nn.Module):
    """Host and head as one module: what a wrapper for several processes sees. The user's model is never the wrapper."""

    def __init__(self, learner: Loop):
        super().__init__()
        self.host = learner.model
        if learner.head is not None:
            self.head = learner.head.module
        if learner.auxiliary_head is not None:
            self.auxiliary_head = learner.auxiliary_head.module
        self._learner = (learner,)  # in a tuple so that it is no submodule and no part of the state

    def forward(self, batch: Batch, training_head: bool = False) -> Output:
        learner = self._learner[0]
        head = learner.auxiliary_head if training_head and learner.auxiliary_head is not None else learner.head
        return learner.objective.forward(self.host, head, batch, learner.pooling)


class Loop:
    """Keeps a pretrained transformer learning, one experience after another.

    Args:
        model: the user's own transformers model; small modules are put into it, it stays the same object.
        processor: its tokenizer or an image processor.
        method: a name, `{name: settings}`, or a list of these, e.g. `[{"moram": {"rank": 8}}, {"er": {"budget": 200}}]`.
        head: "cosine" (default for classification), "linear", "ridge", or `{name: settings}`.
        objective: "classification" or "causal_lm", or `{name: settings}`.
        training, protocol: `TrainingConfig`, `ProtocolConfig`, or dicts of their fields.
        seed: seed of every random draw.
        classes: all class names, where they are declared in advance (needed for the mask "all").

    Raises:
        BadInput: a name, setting or combination that cannot be honoured.
        ProtocolRefused: a method needs more than the protocol grants.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        method: Any = "moram",
        head: Any = None,
        objective: Any = "classification",
        training: Any = None,
        protocol: Any = None,
        seed: int = 0,
        classes: Sequence[str] | None = None,
    ):
        self.training = settings_of(training, TrainingConfig, "training")
        self.protocol = settings_of(protocol, ProtocolConfig, "protocol")
        ((name, config),) = OBJECTIVES.parse(objective, "objective")
        self.objective = OBJECTIVES.get(name)(config)
        self.objective.check_model(model, processor)
        self.methods = build_methods(method)
        check_protocol(self.methods, self.protocol, self.training)
        self.model, self.processor, self.seed = model, processor, seed
        self.host = Host.of(model)
        automatic = getattr(self.objective.config, "pooling", None) == "auto"
        self.pooling = self.host.pool_default() if automatic else None
        self.labels: dict[str, int] = {}
        self.declared = list(classes) if classes else None
        self.history: list[Past] = []
        self.writes: list[dict[str, Any]] = []
        self.position, self.counters = Position(), Counters()
        self.losses_seen: dict[str, float] = {}
        self._seed_everything()
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        model.to(self.accelerator.device)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "methods"))
        everything = any("all_data" in method.needs for method in self.methods)
        samples = sys.maxsize if everything else max(method.requires_rehearsal() for method in self.methods)
        self.replay = ReplayBuffer(samples, self.protocol.rehearsal_bytes, generator=self.generator)
        self.services = Services(self)
        for item in self.methods:
            item.loop = self.services
            item.attach(self.host)
        width = self.host.width
        self.head = build_head(head, self.objective, width, seed)
        self.auxiliary_head = build_auxiliary_head(self.head, self.methods, width, seed)
        self.system = System(self).to(self.accelerator.device)
        self.optimization: Optimization | None = None
        self._features: dict[tuple[int, str], Tensor] = {}
        self.current: Experience | None = None

    # ---- construction
    def _seed_everything(self) -> None:
        import random

        import numpy

        torch.manual_seed(derived_seed(self.seed, "torch"))
        random.seed(derived_seed(self.seed, "python"))
        numpy.random.seed(derived_seed(self.seed, "numpy") % 2**32)
        if self.training.num_threads:
            torch.set_num_threads(self.training.num_threads)

    @property
    def caches_features(self) -> bool:
        return all(method.frozen_features for method in self.methods) and not any(
            "rehearsal" in method.needs for method in self.methods
        )

    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.named_trainable())

    @property
    def epoch(self) -> int:
        """Pass over the current experience, from 0."""
        return self.position.step // self._steps_per_epoch

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def seen(self) -> list[str]:
        """Names of the classes learnt so far, by class id."""
        return list(self.labels)

    # ---- classes and masks
    def _see(self, names: Iterable[str]) -> None:
        for name in names:
            if self.declared is not None and name not in self.declared:
                raise BadInput(
                    f"label: {name!r} is outside the declared set of {len(self.declared)} classes "
                    f"({', '.join(self.declared[:5])} ...); declare it or correct the row"
                )
            self.labels.setdefault(name, len(self.labels))
        wanted = len(self.labels)
        if self.protocol.mask == "all":
            if self.declared is None:
                raise BadInput("protocol.mask: all needs the classes in advance; give `classes` or use the mask seen")
            wanted = len(self.declared)
        for head in (self.head, self.auxiliary_head):
            if head is not None and head.classes < wanted:
                head.grow(wanted)
                head.module.to(self.device)

    def _allowed(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """Classes that compete in the training loss: [C], or [B, C] where rehearsed rows see more than current ones."""
        if self.head is None or self.protocol.mask == "all":
            return None
        width = logits.shape[-1]
        seen = torch.zeros(width, dtype=torch.bool, device=logits.device)
        seen[: len(self.labels)] = True
        if self.protocol.mask == "seen" or any("all_data" in method.needs for method in self.methods):
            return seen
        current = torch.zeros_like(seen)
        if self.protocol.boundaries == "train":
            assert self.current is not None
            names = self.current.classes or self.history[-1].classes
            current[[self.labels[name] for name in names]] = True
            if batch.rehearsed is None:
                return current
        else:
            assert batch.labels is not None
            current[batch.labels[batch.labels >= 0]] = True
        if batch.rehearsed is None:
            return current
        return torch.where(batch.rehearsed[:, None], seen, current)

    # ---- learning
    def learn(self, experience: Experience, *, on_step: Callable[[Loop, dict[str, float]], None] | None = None) -> Loop:
        """Learns one experience; continues in its middle when a state from there was loaded.

        Args:
            experience: what to learn; its train rows are read as often as `training.epochs` says.
            on_step: called after every optimizer step with the losses of this step (on logged steps, else empty).

        Raises:
            BadInput: the experience is empty or a row does not fit.
            NonFiniteLoss: the loss is NaN or infinite; the optimizer has not stepped on it.
        """
        started = time.perf_counter()
        if not len(experience.train):
            raise BadInput(f"experience {experience.name!r}: has no training rows; give at least one")
        resumed = self.position.phase == "train"
        self.current = experience
        if not resumed:
            self._begin(experience)
        rows = self._training_rows(experience)
        if len(rows):
            plan = self._plan(experience, rows)
            self._steps_per_epoch, self.steps_planned = plan.steps_per_epoch, plan.steps
            if self.optimization is None and self.named_trainable():
                self._optimize_anew()
            self._train(experience, rows, plan, on_step, started)
            self._end(experience, rows)
        self.position = Position(self.position.experience + 1, 0, "boundary")
        if self.protocol.boundaries == "train":
            self.optimization = None
        self._forget_features(experience)
        self.counters.seconds += time.perf_counter() - started
        return self

    def _begin(self, experience: Experience) -> None:
        labels = self._label_names(experience)
        self.objective.check(experience.train, self.processor)
        self._see(labels)
        first = not self.history
        self.history.append(Past(experience.index, experience.name, labels, experience.hash))
        self.writes.append({"id": len(self.writes), "kind": "experience", "name": experience.name, "hash": experience.hash})
        if self.protocol.boundaries == "train" or first:
            if not first and any("old_model" in method.needs for method in self.methods):
                self.services.remember_model()
            for method in self.methods:
                method.before_experience(self._as_granted(experience))
            self.system.to(self.device)
        self.position = Position(self.position.experience, 0, "train")

    def _label_names(self, experience: Experience) -> list[str]:
        if self.head is None:
            return []
        if experience.classes:
            return list(experience.classes)
        names: dict[str, None] = {}
        for number, row in enumerate(experience.train):
            if "label" not in row:
                raise BadInput(f"experience {experience.name!r}, row {number}: has no field 'label'; map it with stream.fields")
            names[str(row["label"])] = None
        return list(names)

    def _as_granted(self, experience: Experience) -> Experience:
        """The experience without what the protocol does not grant: test rows never, the task id where it is withheld."""
        task = experience.task if self.protocol.task_id != "none" else None
        return replace(experience, test=(), valid=(), task=task)

    def _training_rows(self, experience: Experience) -> Rows:
        rows: Rows = experience.train
        for method in self.methods:
            chosen = method.sampler(self._as_granted(experience))
            if chosen is not None:
                rows = chosen
        return rows

    def _plan(self, experience: Experience, rows: Rows) -> Plan:
        t = self.training
        return Plan(
            len(rows), t.per_device_train_batch_size, t.gradient_accumulation_steps, self.accelerator.num_processes,
            self.accelerator.process_index, t.epochs, t.max_steps,
            derived_seed(self.seed, "experience", self.position.experience),
        )  # fmt: skip

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that trains by gradient, with names that stay the same when banks grow."""
        return [pair for group in self._groups() for pair in group["params"]]

    def _groups(self) -> list[dict[str, Any]]:
        groups = []
        for number, method in enumerate(self.methods):
            for group in method.parameter_groups():
                named = [(f"method/{number}/{name}", parameter) for name, parameter in group["params"]]
                groups.append({"lr": self.training.learning_rate, **group, "params": named})
        head = self.auxiliary_head or self.head
        if head is not None and not head.closed_form:
            rate = self.training.head_learning_rate or self.training.learning_rate
            groups.append({"params": [(f"head/{n}", p) for n, p in head.parameters()], "lr": rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def _optimize_anew(self, keep: Optimization | None = None) -> None:
        groups = self._groups()
        for group in groups:
            for _, parameter in group["params"]:
                parameter.requires_grad_(True)
        self.optimization = Optimization(self.training, groups, keep)
        self.wrapped = self.accelerator.prepare(self.system) if self.accelerator.num_processes > 1 else self.system

    def parameters_changed(self) -> None:
        """A method grew or replaced parameters between steps: rebuilds the optimizer, keeping what still fits."""
        self.system.to(self.device)
        if self.optimization is not None:
            self._optimize_anew(keep=self.optimization)

    def _train(self, experience: Experience, rows: Rows, plan: Plan, on_step: Any, started: float) -> None:
        if self.optimization is None:  # nothing trains by gradient
            return
        features = self._cached_features(experience, "train", rows) if self.caches_features else None
        begin = self.position.step

        def prepare() -> Iterator[list[Batch]]:
            for step, groups in plan.from_step(begin):
                yield [self._prepare(rows, numbers, step, features) for numbers in groups]

        self.model.train(not self.caches_features)
        with Prefetch(prepare) as batches:
            for micro_batches in batches:
                logged = self.counters.steps % self.training.logging_steps == 0
                losses = self._step(micro_batches, plan, logged)
                self.position.step += 1
                self.counters.steps += 1
                self.counters.samples += sum(len(batch) for batch in micro_batches)
                if on_step is not None:
                    now = time.perf_counter()
                    self.counters.seconds, started = self.counters.seconds + now - started, now
                    on_step(self, losses)
        self.model.eval()

    def _prepare(self, rows: Rows, numbers: list[int], step: int, features: Tensor | None) -> Batch:
        picked: list[Row] = take(rows, numbers)
        for method in self.methods:
            if type(method).transform is not Method.transform:
                picked = [method.transform(row) for row in picked]
        if features is not None:
            ids = torch.tensor([self.labels[str(row["label"])] for row in picked])
            batch = Batch({}, ids, picked, torch.tensor(numbers), features=features[[max(n, 0) for n in numbers]])
        else:
            seeds = [derived_seed(self.seed, "augment", self.position.experience, step, n) for n in numbers]
            batch = make_batch(
                self.objective, self.processor, picked, self.labels if self.head else None, numbers, training=True, seeds=seeds
            )
        if self.protocol.task_id != "none" and self.current is not None and self.current.task is not None:
            batch = replace(batch, task=torch.full((len(numbers),), self.current.task))
        return without_fillers(batch, numbers)

    def _step(self, micro_batches: list[Batch], plan: Plan, logged: bool) -> dict[str, float]:
        """One optimizer step. The loss is the mean over all rows (or tokens) of all micro-batches and processes."""
        assert self.optimization is not None
        for number in range(len(micro_batches)):
            for method in self.methods:
                micro_batches[number] = method.before_step(micro_batches[number])
        total = self._global_count(micro_batches)
        log: dict[str, Tensor] = {}
        world = self.accelerator.num_processes
        for number, batch in enumerate(micro_batches):
            batch = batch.to(self.device)
            last = number == len(micro_batches) - 1
            synchronise = nullcontext() if last or world == 1 else self.accelerator.no_sync(self.wrapped)
            with synchronise:
                with self.observing(batch) if logged else nullcontext(), self.autocast():
                    output = self.wrapped(batch, True)
                    loss = self._loss(batch, output, total, world, len(micro_batches), log)
                self._refuse_non_finite(loss, log)
                self.accelerator.backward(loss)
        optimization = self.optimization
        for method in self.methods:
            method.after_backward()
        optimization.clip()
        before = optimization.values() if any(method.needs_before_update for method in self.methods) else {}
        optimization.step(self.position.step, plan.steps)
        with torch.no_grad():
            for method in self.methods:
                method.after_update(before)
        optimization.zero_grad()
        for method in self.methods:
            method.after_step()
        return {name: float(value) for name, value in log.items()} if logged else {}

    def _loss(
        self, batch: Batch, output: Output, total: Tensor, world: int, parts: int, log: dict[str, Tensor]
    ) -> Tensor:
        owner = next((method for method in self.methods if method.criterion is not None), None)
        if owner is not None:
            assert owner.criterion is not None
            summed, count = owner.criterion(batch, output)
        else:
            allowed = self._allowed(batch, output.logits) if output.logits is not None else None
            summed, count = self.objective.loss(batch, output, allowed)
        loss = summed * (world / total.clamp(min=1).to(summed.dtype))
        parts_of_loss = {"loss": loss.detach() / world}
        for method in self.methods:
            for name, extra in method.losses(batch, output).items():
                loss = loss + extra / parts
                parts_of_loss[f"{method.name}.{name}"] = extra.detach() / parts
        for name, value in parts_of_loss.items():
            log[name] = log[name] + value if name in log else value
        return loss

    def _global_count(self, micro_batches: list[Batch]) -> Tensor:
        count = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches:
            if batch.labels is not None:
                labels = batch.labels[:, 1:] if batch.labels.ndim == 2 else batch.labels
                count += (labels != -100).sum()
            else:
                count += len(batch)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count.to(self.device, torch.float32), "sum").cpu()
        return count.to(torch.float32).to(self.device)

    def _refuse_non_finite(self, loss: Tensor, log: dict[str, Tensor]) -> None:
        # On an accelerator each look at the value stalls the device, so it is taken on logged steps and before saves.
        if self.device.type != "cpu" and self.counters.steps % self.training.logging_steps:
            return
        if not bool(torch.isfinite(loss.detach())):
            shown = {name: float(value) for name, value in log.items()}
            raise NonFiniteLoss(
                f"loss: is not finite at step {self.counters.steps} of the run ({shown}); the last good state is kept. "
                "Lower training.learning_rate, set training.max_grad_norm, or look at the rows of this batch"
            )

    def _end(self, experience: Experience, rows: Rows) -> None:
        self.model.eval()
        if self.protocol.boundaries == "train" or experience.last:
            for method in self.methods:
                method.after_experience(self._as_granted(experience))
        if self.head is not None and self.head.closed_form:
            self._fit_head(experience, rows)

    def _fit_head(self, experience: Experience, rows: Rows) -> None:
        """The closed-form head's pass; counted as extra where the adapter has already had its own passes."""
        assert self.head is not None
        self.head.begin_fit(len(rows), derived_seed(self.seed, "fit", self.position.experience) % 2**31)
        if self.caches_features:
            features = self._cached_features(experience, "train", rows)
            ids = torch.tensor([self.labels[str(row["label"])] for row in rows])
            self.head.update(features.to(self.device), ids.to(self.device))
        else:
            self.counters.extra_passes += 1
            self.counters.extra_rows += len(rows)
            for batch in self.batches(rows):
                with torch.no_grad(), self.autocast():
                    output = self.objective.forward(self.model, None, batch, self.pooling)
                assert output.features is not None
                self.head.update(output.features.float(), batch.labels)
        self.head.end_fit()

    # ---- passes without gradients
    def batches(
        self, rows: Rows, labels: dict[str, int] | None = None, *, by_length: bool = False, unlabelled: bool = False
    ) -> Iterator[Batch]:
        """Evaluation batches on the device, without augmentation, in row order.

        Args:
            rows: what to go through.
            labels: class name -> id; the learner's own when absent.
            by_length: order rows by length instead, which pads less.
            unlabelled: leave labels out.
        """
        size = self.training.per_device_eval_batch_size
        known = (labels if labels is not None else self.labels) if self.head is not None and not unlabelled else None
        numbers = list(range(len(rows)))
        if by_length and len(rows) and "text" in rows[0]:
            numbers.sort(key=lambda number: len(rows[number]["text"]))
        for start in range(0, len(rows), size):
            chosen = numbers[start : start + size]
            batch = make_batch(self.objective, self.processor, take(rows, chosen), known, chosen, training=False, seeds=None)
            yield batch.to(self.device)

    def _cached_features(self, experience: Experience, split: str, rows: Rows) -> Tensor:
        key = (experience.index, split)
        if key not in self._features:
            with quiet(self.model), torch.no_grad(), self.autocast():
                parts = [
                    self.objective.forward(self.model, None, batch, self.pooling).features.float().cpu()
                    for batch in self.batches(rows, Unlearnt(self.labels))
                ]
            self._features[key] = torch.cat(parts)
        return self._features[key]

    def _forget_features(self, experience: Experience) -> None:
        self._features.pop((experience.index, "train"), None)

    @contextmanager
    def observing(self, batch: Batch) -> Iterator[None]:
        self.services.router_log.mask = batch.inputs.get("attention_mask")
        with observing(self.services.router_log.add):
            yield

    def autocast(self) -> Any:
        if not self.training.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
