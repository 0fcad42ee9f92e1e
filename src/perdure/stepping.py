"""One optimizer step: batches in, weights moved. The loss is the mean over rows of all micro-batches and processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bookkeeping import Counters, Past, Position
from .data import Batch, Output, Row, Rows
from .early_stopping import EarlyStopping
from .errors import BadInput, NonFiniteLoss
from .loading import Plan, Prefetch, derived_seed, make_batch, take, without_fillers
from .methods import Method
from .optim import Optimization
from .passes import Passes
from .sharding import in_parts, is_split
from .watch import OwnPasses, check_batch

if TYPE_CHECKING:
    from .bookmark import Bookmark
    from .replay import ReplayBuffer
    from .streams.experience import Experience


class Stepping(Passes):
    """The part of the loop that trains."""

    system: nn.Module
    wrapped: nn.Module | None = None
    optimization: Optimization | None
    position: Position
    counters: Counters
    history: list[Past]
    current: Experience | None
    generator: torch.Generator
    replay: ReplayBuffer
    steps_planned: int = 0
    _steps_per_epoch: int = 1
    _clock: float = 0.0
    _finite: Tensor | None = None
    _micro: int = 0
    _groups_now: Sequence[list[int]] = ()
    own_passes: OwnPasses
    rows_added: int = 0
    """Rows that services have appended to the micro-batch at work."""
    views: int = 0
    """How often its own rows were repeated."""
    _step_classes: Tensor | None = None
    _rows: Rows = ()
    _plan_now: Plan | None = None
    _bookmark: Bookmark | None = None
    _early: EarlyStopping | None = None
    _asked: Tensor | None = None
    meter_next: bool = False
    """Whether the first step of the next experience is counted, see `metering`."""
    metered: dict[str, float] | None = None

    # ---- what trains
    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that trains by gradient, with names that stay the same when banks grow."""
        return [pair for group in self._groups() for pair in group["params"]]

    def _groups(self) -> list[dict[str, Any]]:
        groups = []
        for number, method in enumerate(self.methods):
            for group in method.parameter_groups():
                named = [(f"method/{number}/{name}", parameter) for name, parameter in group["params"]]
                groups.append({"lr": self.training.learning_rate, **group, "params": named})
        groups = [group for group in groups if group["params"]]
        if self.auxiliary_head is not None and not groups:
            return []  # it only serves to train an adapter
        head = self.auxiliary_head or self.head
        if head is not None and not head.closed_form:
            own = {
                "lr": self.training.head_learning_rate or self.training.learning_rate, "weight_decay": 0.0,
                "optimizer": self.training.head_optimizer,
            }  # fmt: skip
            for group in head.parameter_groups():
                groups.append({**own, **group, "params": [(f"head/{n}", p) for n, p in group["params"]]})
        return [group for group in groups if group["params"]]

    def _optimize_anew(self, keep: Optimization | None = None) -> None:
        groups = self._groups()
        for parameter in self.model.parameters():  # what trained in an earlier experience may stand still now
            parameter.requires_grad_(False)
        for group in groups:
            for name, parameter in group["params"]:
                if is_split(parameter):
                    raise BadInput(f"training.shard: splits the host, but {name} of the host trains; set it to none")
                parameter.requires_grad_(True)
        self.optimization = Optimization(self.training, groups, keep)
        self.wrapped = self._wrap()

    def _wrap(self) -> nn.Module:
        if self.accelerator.num_processes == 1:
            return self.system
        self.wrapped = None
        self.accelerator.free_memory()  # the wrapper before it has hooks on parameters that are still in use
        # What is split among the processes is exchanged by the blocks themselves.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.system, in_parts(self.system)
        )
        return self.accelerator.prepare(self.system)

    def rate(self, parameter: nn.Parameter) -> float | None:
        """The learning rate of the last step for `parameter`; None where it does not train."""
        return None if self.optimization is None else self.optimization.rate(parameter)

    def parameters_changed(self) -> None:
        """A method grew or replaced parameters between steps: rebuilds the optimizer, keeping what still fits."""
        self.system.to(self.device)
        if self.optimization is not None:
            self._optimize_anew(keep=self.optimization)

    # ---- the steps of one experience
    def _train(self, rows: Rows, plan: Plan, on_step: Callable[..., None] | None) -> None:
        if self.optimization is None:  # nothing trains by gradient
            return
        assert self.current is not None
        features = self._cached_features(self.current, "train", rows) if self.caches_features else None
        self._rows, self._plan_now, begin = rows, plan, self.position.step

        def prepare() -> Iterator[tuple[list[list[int]], list[Batch]]]:
            for step, groups in plan.from_step(begin):
                yield groups, [self._prepare(rows, numbers, step, features) for numbers in groups]

        self.model.train(not self.caches_features)
        early = self._early
        try:
            with Prefetch(prepare) as batches:
                for self._groups_now, micro_batches in batches:
                    if early is not None and early.over:
                        break
                    logged = self.counters.steps % self.training.logging_steps == 0
                    with self._counted(micro_batches):
                        losses = self._step(micro_batches, plan, logged)
                    self.position.step += 1
                    self.counters.steps += 1
                    if early is not None:
                        early.after_step(self, self.position.step)
                    if on_step is not None:
                        self.tick()
                        on_step(self, losses)
                        self._clock = time.perf_counter()  # what the caller does is no training time
            self.check_finite()
            if early is not None:
                early.restore(self.optimization.named)
        finally:
            self.model.eval()
            self._rows, self._plan_now, self._groups_now, self.replay.given = (), None, (), []
            if self.optimization is not None:
                self.optimization.zero_grad()

    @property
    def training_rows(self) -> Rows:
        """Rows that the current experience trains on."""
        return self._rows

    @property
    def numbers_now(self) -> list[int]:
        """Positions in the experience of this process's own rows of the micro-batch at work; -1 for a filler."""
        return self._groups_now[self._micro] if self._groups_now else []

    @property
    def begins(self) -> bool:
        """Whether the micro-batch at work is the first of its experience."""
        return self.position.step == 0 and self._micro == 0

    def _counted(self, micro_batches: list[Batch]) -> AbstractContextManager[None]:
        if not self.meter_next or self.position.step:
            return nullcontext()
        from .metering import training_step

        self.meter_next = False
        return training_step(self, micro_batches)

    def tick(self) -> None:
        """Adds the time since the last tick to the counted seconds."""
        now = time.perf_counter()
        self.counters.seconds, self._clock = self.counters.seconds + now - self._clock, now

    def _transformed(self, picked: list[Row]) -> list[Row]:
        for method in self.methods:
            if type(method).transform is not Method.transform:
                picked = [method.transform(row) for row in picked]
        return picked

    def _prepare(self, rows: Rows, numbers: list[int], step: int, features: Tensor | None) -> Batch:
        picked = self._transformed(take(rows, numbers))
        if features is not None:
            ids = torch.tensor([self.labels[str(row["label"])] for row in picked])
            batch = Batch({}, ids, picked, torch.tensor(numbers), features=features[[max(n, 0) for n in numbers]])
        else:
            seeds = [derived_seed(self.seed, "augment", self.position.experience, step, n) for n in numbers]
            known = self.labels if self.head else None
            batch = make_batch(self.objective, self.processor, picked, known, numbers, training=True, seeds=seeds)
        if self.protocol.task_id != "none" and self.current is not None and self.current.task is not None:
            batch = replace(batch, task=torch.full((len(numbers),), self.current.task))
        if self.protocol.boundaries == "none":  # positions that begin again tell where something new begins
            batch = replace(batch, index=torch.tensor([min(number, 0) for number in numbers]))
        return without_fillers(batch, numbers)

    def rows_everywhere(self, batch: Batch) -> tuple[Rows, Tensor | Sequence[int] | None]:
        """Rows and positions of this micro-batch in all processes, in the order in which one process would see them."""
        world, plan = self.accelerator.num_processes, self._plan_now
        if world == 1 or plan is None:
            return batch.rows, batch.index
        order = plan.order(self.position.step // plan.steps_per_epoch)
        numbers = [
            number
            for rank in range(world)
            for number in replace(plan, rank=rank).micro_batches(self.position.step, order)[self._micro]
            if number >= 0
        ]
        return self.rows_of(numbers), numbers

    def rows_of(self, numbers: list[int]) -> list[Row]:
        """Training rows of the current experience by number, as a batch has them."""
        return self._transformed(take(self._rows, numbers))

    # ---- one step
    def _step(self, micro_batches: list[Batch], plan: Plan, logged: bool) -> dict[str, float]:
        assert self.optimization is not None and self.wrapped is not None
        with self.own_passes.watched():
            micro_batches = [self._before_step(number, batch) for number, batch in enumerate(micro_batches)]
        counts, total = self._counts(micro_batches)
        self._step_classes = self._classes_of(micro_batches)
        log: dict[str, Tensor] = {}
        for number, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
            self._micro = number
            batch = batch.to(self.device)
            last = number == len(micro_batches) - 1
            synchronise = nullcontext() if last or self._world == 1 else self.accelerator.no_sync(self.wrapped)
            share = count / total if total else 1 / (len(micro_batches) * self._world)
            with synchronise:
                with self.observing(batch) if logged else nullcontext(), self.autocast():
                    output = self.wrapped(batch, True)
                    loss = self._loss(batch, output, total, share, log)
                self._refuse_non_finite(loss, "loss", log)
                self.accelerator.backward(loss)
        optimization = self.optimization
        with self.own_passes.watched():
            for method in self.methods:
                method.after_backward()
        norm = optimization.clip()
        if norm is not None:
            self._refuse_non_finite(norm, "gradient norm", log)
        before = optimization.values() if any(method.needs_before_update for method in self.methods) else {}
        self._bookmark = None  # from here on the experience leaves a trace
        # Without boundaries the optimizer goes on from one to the next, and its warm-up with it.
        taken = self.counters.steps if self.protocol.boundaries == "none" else self.position.step
        optimization.step(taken, plan.steps)
        with torch.no_grad(), self.own_passes.watched():
            for method in self.methods:
                method.after_update(before)
        optimization.zero_grad()
        with self.own_passes.watched():
            for method in self.methods:
                method.after_step()
        return self._shown(log) if logged else {}

    @property
    def _world(self) -> int:
        return self.accelerator.num_processes

    def _before_step(self, number: int, batch: Batch) -> Batch:
        self._micro, self.rows_added, self.views, before = number, 0, 0, batch
        self.replay.given = []
        for method in self.methods:
            batch = method.before_step(batch)
        check_batch(self, before, batch, self.rows_added)  # pyright: ignore[reportArgumentType]  # a base of Loop
        return batch

    def _loss(self, batch: Batch, output: Output, total: float, share: float, log: dict[str, Tensor]) -> Tensor:
        """What this micro-batch of this process adds to the loss of the step.

        The objective's sum is divided by the count over the whole step. A method's own losses are means over a batch
        (or do not depend on it), so they are weighted by the batch's share of that count. Processes are averaged when
        gradients are exchanged, hence the factor.
        """
        owner = next((method for method in self.methods if method.criterion is not None), None)
        if owner is not None:
            assert owner.criterion is not None
            with self.own_passes.watched():
                summed, _ = owner.criterion(batch, output)
        else:
            allowed = self.allowed(batch, output.logits) if output.logits is not None else None
            loss = self.objective.loss if self._world == 1 else self.objective.loss_among
            summed, _ = loss(batch, output, allowed)
        parts = {"loss": summed / max(total, 1.0)}
        with self.own_passes.watched():
            for method in self.methods:
                for name, extra in method.losses(batch, output).items():
                    parts[f"{method.name}.{name}"] = extra * share
        for name, value in parts.items():
            log[name] = log[name] + value.detach() if name in log else value.detach()
        return sum(parts.values(), torch.zeros((), device=summed.device)) * self._world

    def _counts(self, micro_batches: list[Batch]) -> tuple[list[float], float]:
        """Rows or tokens that count in each micro-batch, and in the whole step over all processes."""
        counts, rows = [], 0
        for batch in micro_batches:
            if batch.labels is None:
                counts.append(float(len(batch)))
            else:
                labels = batch.labels[:, 1:] if batch.labels.ndim == 2 else batch.labels
                counts.append(float((labels != -100).sum()))
            real = batch.index >= 0 if batch.index is not None else torch.ones(len(batch), dtype=torch.bool)
            rows += int((real if batch.rehearsed is None else real | batch.rehearsed).sum())
        sums = torch.tensor([sum(counts), rows], dtype=torch.float64)
        if self._world > 1:
            sums = self.accelerator.reduce(sums.to(self.device), "sum").cpu()
        self.counters.samples += int(sums[1])
        return counts, float(sums[0])

    def _shown(self, log: dict[str, Tensor]) -> dict[str, float]:
        if self._world == 1:
            return {name: float(value) for name, value in log.items()}
        names = sorted(log)
        values = self.accelerator.reduce(torch.stack([log[name].double() for name in names]), "sum")
        found = dict(zip(names, values.tolist(), strict=True))
        return {name: found[name] for name in log}  # in the order of one process

    # ---- masks
    def _classes_of(self, micro_batches: list[Batch]) -> Tensor | None:
        """Classes [C] of the step's own rows: what "current" means on a stream without boundaries."""
        if self.head is None or self.protocol.boundaries == "train" or self.protocol.mask != "current":
            return None
        found = torch.zeros(len(self.labels))
        for batch in micro_batches:
            assert batch.labels is not None
            mine = batch.labels if batch.rehearsed is None else batch.labels[~batch.rehearsed]
            found[mine[mine >= 0]] = 1
        if self._world > 1:
            found = self.accelerator.reduce(found.to(self.device), "sum")
        return found.to(self.device) > 0

    def allowed(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """Classes that compete in the training loss: [C], or [B, C] where rehearsed rows see more than current ones."""
        if self.head is None or self.protocol.mask == "all":
            return None
        seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        seen[: len(self.labels)] = True
        if self.protocol.mask == "seen" or any("all_data" in method.needs for method in self.methods):
            return seen
        current = torch.zeros_like(seen)
        if self._step_classes is not None:
            current[: len(self._step_classes)] = self._step_classes
        else:
            current[[self.labels[name] for name in self.history[-1].classes]] = True
        if batch.rehearsed is None:
            return current
        return torch.where(batch.rehearsed[:, None], seen, current)

    # ---- values that are not finite
    def _refuse_non_finite(self, value: Tensor, what: str, log: dict[str, Tensor]) -> None:
        """Each look stalls an accelerator: there it is taken on logged steps, before saves and at the end."""
        finite = torch.isfinite(value.detach())
        self._finite = finite if self._finite is None else self._finite & finite
        if self.device.type == "cpu" or self.counters.steps % self.training.logging_steps == 0:
            self.check_finite(what, log)

    def check_finite(self, what: str = "loss", log: dict[str, Tensor] | None = None) -> None:
        """Raises NonFiniteLoss if a loss or a gradient since the last look was NaN or infinite."""
        finite, self._finite = self._finite, None
        if finite is None or bool(finite):
            return
        shown = {name: float(value) for name, value in (log or {}).items()}
        raise NonFiniteLoss(
            f"{what}: is not finite at step {self.counters.steps} of the run ({shown}); the last good state is kept. "
            "Lower training.learning_rate, set training.max_grad_norm, or look at the rows of this batch"
        )
