"""The only training loop. It owns the step; methods return losses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .assembly import (
    build_auxiliary_head,
    build_head,
    check_combination,
    complete_methods,
    settings_of,
)
from .bookkeeping import Counters, Past, Position
from .config import ProtocolConfig, TrainingConfig
from .data import Batch, Output, Rows
from .errors import BadInput
from .hosts import Host
from .loading import Granted, Plan, derived_seed
from .protocol import check_granted
from .registry import OBJECTIVES
from .replay import ReplayBuffer
from .services import Services
from .stepping import Stepping
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


class Loop(Stepping):
    """Keeps a pretrained transformer learning, one experience after another.

    Args:
        model: the user's own transformers model; small modules are put into it, it stays the same object.
        processor: its tokenizer or an image processor.
        method: a name, `{name: settings}`, or a list of these, e.g.
            `[{"moram": {"rank": 8}}, {"er": {"budget": 200}}]`.
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
        self.methods = complete_methods(method)
        check_granted(self.methods, self.protocol, self.training)
        check_combination(self.methods, self.objective, self.protocol, classes)
        self.model, self.processor, self.seed = model, processor, seed
        self.host = Host.of(model)
        automatic = getattr(self.objective.config, "pooling", None) == "auto"
        self.pooling = self.host.pool_default() if automatic else None
        self.labels: dict[str, int] = {}
        self.declared = list(classes) if classes else None
        self.history: list[Past] = []
        self.writes: list[dict[str, Any]] = []
        self.position, self.counters = Position(), Counters()
        self._seed_everything()
        self.accelerator = _accelerator()
        model.to(self.accelerator.device)
        self._trained_before = [(p, p.requires_grad) for p in model.parameters()]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "methods"))
        everything = any("all_data" in method.needs for method in self.methods)
        samples = sys.maxsize if everything else max(method.requires_rehearsal() for method in self.methods)
        limit = None if everything else self.protocol.rehearsal_bytes
        self.replay = ReplayBuffer(samples, limit, generator=self.generator)
        self.services = Services(self)
        for item in self.methods:
            item.loop = self.services
            item.attach(self.host)
        width = self.host.width
        self.head = build_head(head, self.objective, width, seed)
        self.auxiliary_head = build_auxiliary_head(self.head, self.methods, width, seed)
        self.system = System(self).to(self.accelerator.device).eval()
        self.optimization = None
        self._features = {}
        self.current = None

    # ---- construction
    def _seed_everything(self) -> None:
        import random

        import numpy

        torch.manual_seed(derived_seed(self.seed, "torch"))
        random.seed(derived_seed(self.seed, "python"))
        numpy.random.seed(derived_seed(self.seed, "numpy") % 2**32)
        if self.training.num_threads:
            torch.set_num_threads(self.training.num_threads)

    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.named_trainable())

    @property
    def epoch(self) -> int:
        """Pass over the current experience, from 0."""
        return self.position.step // self._steps_per_epoch

    @property
    def seen(self) -> list[str]:
        """Names of the classes learnt so far, by class id."""
        return list(self.labels)

    # ---- classes
    def _refuse_undeclared(self, names: Iterable[str]) -> None:
        for name in names:
            if self.declared is not None and name not in self.declared:
                raise BadInput(
                    f"label: {name!r} is outside the declared set of {len(self.declared)} classes "
                    f"({', '.join(self.declared[:5])} ...); declare it or correct the row"
                )

    def _see(self, names: Iterable[str]) -> bool:
        """Gives new classes an id and a row in each head; True if a head grew."""
        for name in names:
            self.labels.setdefault(name, len(self.labels))
        wanted = len(self.labels)
        if self.protocol.mask == "all" and self.declared is not None:
            wanted = len(self.declared)
        grew = False
        for head in (self.head, self.auxiliary_head):
            if head is not None and head.classes < wanted:
                head.grow(wanted)
                head.module.to(self.device)
                grew = True
        return grew

    # ---- learning
    def learn(self, experience: Experience, *, on_step: Callable[[Any, dict[str, float]], None] | None = None) -> Loop:
        """Learns one experience; continues in its middle when a state from there was loaded.

        Args:
            experience: what to learn; its train rows are read as often as `training.epochs` says.
            on_step: called after every optimizer step with the losses of this step (on logged steps, else empty).

        Raises:
            BadInput: the experience is empty, a row does not fit, or another one was left in its middle.
            NonFiniteLoss: the loss is NaN or infinite; the optimizer has not stepped on it.
        """
        self._clock = time.perf_counter()
        if not len(experience.train):
            raise BadInput(f"experience {experience.name!r}: has no training rows; give at least one")
        grew = False
        if self.position.phase == "train":
            self._refuse_another(experience)
            self.current = experience
        else:
            grew = self._begin(experience)
        rows = self._training_rows(experience)
        if len(rows):
            plan = self._plan(rows)
            self._steps_per_epoch, self.steps_planned = plan.steps_per_epoch, plan.steps
            if (self.optimization is None or grew) and self.named_trainable():
                self._optimize_anew(keep=self.optimization)
            self._train(rows, plan, on_step)
            self._end(experience, rows)
        self.position = Position(self.position.experience + 1, 0, "boundary")
        if self.protocol.boundaries == "train":
            self.optimization = None
        self._forget_features(experience)
        self.tick()
        return self

    def _refuse_another(self, experience: Experience) -> None:
        past = self.history[-1]
        if past.hash and experience.hash != past.hash:
            raise BadInput(
                f"experience {experience.name!r}: the learner stands at step {self.position.step} of {past.name!r}, "
                "whose rows are others; give that experience again, or load an older state"
            )

    def _begin(self, experience: Experience) -> bool:
        labels = self._label_names(experience)
        self.objective.check(experience.train, self.processor)
        self._refuse_undeclared(labels)
        first = not self.history
        told = self.protocol.boundaries == "train" or first
        if told and not first and any("old_model" in method.needs for method in self.methods):
            self.services.remember_model()  # before the heads grow
        before = dict(self.labels)
        self.current = experience
        grew = self._see(labels)
        self.history.append(Past(experience.index, experience.name, labels, experience.hash))
        self.writes.append(
            {"id": len(self.writes), "kind": "experience", "name": experience.name, "hash": experience.hash}
        )
        if told:
            self.services.router_log.reset()  # what it counts is this experience
            try:
                for method in self.methods:
                    method.before_experience(self._as_granted(experience))
            except BadInput:  # refused: as if it had not been offered
                self.labels = before
                self.history.pop()
                self.writes.pop()
                raise
            self.system.to(self.device)
        self.position = Position(self.position.experience, 0, "train")
        return grew

    def _label_names(self, experience: Experience) -> list[str]:
        if self.head is None:
            return []
        names = dict.fromkeys(experience.classes)
        for number, row in enumerate(experience.train):
            if row.get("label") is None:
                raise BadInput(
                    f"experience {experience.name!r}, row {number}: has no field 'label'; map it with stream.fields"
                )
            if str(row["label"]) not in names:
                raise BadInput(
                    f"experience {experience.name!r}, row {number}: label {row['label']!r} is not among its classes "
                    f"({', '.join(list(names)[:10])}); declare it or correct the row"
                )
        return list(names)

    def _as_granted(self, experience: Experience) -> Experience:
        """The experience as methods see it: no test rows, canonical fields only, the task id where it is granted."""
        task = experience.task if self.protocol.task_id != "none" else None
        rows = Granted(experience.train, experience.classes)
        return replace(experience, train=rows, test=(), valid=(), task=task)

    def _training_rows(self, experience: Experience) -> Rows:
        rows: Rows = experience.train
        if self.protocol.boundaries == "none":  # to be asked here would tell that something new begins
            return rows
        for method in self.methods:
            chosen = method.sampler(self._as_granted(experience))
            if chosen is not None:
                rows = chosen
        return rows

    def _plan(self, rows: Rows) -> Plan:
        t = self.training
        return Plan(
            len(rows), t.per_device_train_batch_size, t.gradient_accumulation_steps, self.accelerator.num_processes,
            self.accelerator.process_index, t.epochs, t.max_steps,
            derived_seed(self.seed, "experience", self.position.experience),
        )  # fmt: skip

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
            if self.optimization is not None:
                self.counters.extra_passes += 1
                self.counters.extra_rows += len(rows)
            for batch in self.batches(rows):
                with torch.no_grad(), self.autocast():
                    output = self.objective.forward(self.model, None, batch, self.pooling)
                assert output.features is not None and batch.labels is not None
                self.head.update(output.features.float(), batch.labels)
        self.head.end_fit()


def _accelerator() -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Buffers are the same in every process by construction; a host may have parameters that no output needs (a pooler).
    return Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)]
    )
