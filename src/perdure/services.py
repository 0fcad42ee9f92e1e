"""What the loop offers to methods, so that none needs a loop of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ProtocolRefused
from .gathering import gather_rows, processes
from .memory.observe import RouterLog, observing
from .memory.protect import InputMoments
from .replay import pack
from .watch import check_rehearsed, check_views

if TYPE_CHECKING:
    from .data import Batch, Output, Row, Rows
    from .hosts import Site
    from .loop import Loop
    from .methods import Method
    from .replay import ReplayBuffer


@dataclass
class ClassStatistics:
    """Features of one class: `mean` [D], `covariance` [D, D] (of the rows, not unbiased), `count`."""

    mean: Tensor
    covariance: Tensor
    count: int


_SAME_INPUT = {"query": "attention", "key": "attention", "value": "attention", "ffn_in": "ffn", "ffn_gate": "ffn"}


def input_key(site: Site) -> tuple[Any, ...]:
    """Equal for sites of a block that read one tensor: query, key, value; both inputs of a gated feed-forward."""
    shared = _SAME_INPUT.get(site.role)
    return (site.tower, site.layer, shared) if shared else (site.tower, site.layer, site.path)


class Services:
    """The loop as methods see it; they hold it as `self.loop`."""

    def __init__(self, loop: Loop):
        self._loop = loop
        self.router_log = RouterLog()
        self._previous: nn.Module | None = None

    # ---- facts
    @property
    def generator(self) -> torch.Generator:
        """The methods' own random stream (CPU); part of the state."""
        return self._loop.generator

    @property
    def replay(self) -> ReplayBuffer:
        """The only rehearsal buffer; its budget is what the protocol grants."""
        return self._loop.replay

    @property
    def host(self) -> Any:
        return self._loop.host

    @property
    def device(self) -> torch.device:
        return self._loop.device

    @property
    def needs_head(self) -> bool:
        """True if features go through a head that must learn, False if the host itself can score (class texts too)."""
        head = self._loop.head
        return self._loop.objective.scores_classes and not (head is not None and head.by_text)

    @property
    def predicts_tokens(self) -> bool:
        """True if the loss at a token asks for the next one, so that nothing later in the text may reach it."""
        return self._loop.objective.predicts_tokens

    def _refuse_untold(self, fact: str, instead: str) -> None:
        if not self.knows_boundaries:
            raise ProtocolRefused(
                f"protocol.boundaries: is none, but a method asks for {fact}, which tells where an experience begins; "
                f"{instead}"
            )

    @property
    def write_id(self) -> int:
        """Id of the write under way, for ownership of bank items.

        Raises:
            ProtocolRefused: boundaries are not told, and no method of the list declares `write_ids` in `needs`.
        """
        if not any("write_ids" in method.needs for method in self._loop.methods):
            self._refuse_untold("write_id", "a method whose items must have an owner says write_ids in `needs`")
        return len(self._loop.writes) - 1

    @property
    def experiences_learnt(self) -> int:
        """Experiences before the current one; 0 where the protocol does not tell of boundaries."""
        return len(self._loop.history) - 1 if self.knows_boundaries else 0

    @property
    def knows_boundaries(self) -> bool:
        return self._loop.protocol.boundaries == "train"

    @property
    def first_epoch(self) -> bool:
        """True while the rows of the current experience are seen for the first time; refused without boundaries."""
        self._refuse_untold("first_epoch", "`remember` takes rows in their first pass alone, whenever it is called")
        return self._loop.epoch == 0

    @property
    def step(self) -> int:
        """Optimizer steps taken in the whole run, this one not counted."""
        return self._loop.counters.steps

    @property
    def experience_step(self) -> int:
        """Optimizer steps taken in the current experience, this one not counted; refused without boundaries."""
        self._refuse_untold("experience_step", "use `step`")
        return self._loop.position.step

    @property
    def steps_planned(self) -> int:
        """Optimizer steps that the current experience takes in all; refused without boundaries."""
        self._refuse_untold("steps_planned", "an unbounded stream has no end to plan for")
        return self._loop.steps_planned

    def rate(self, parameter: nn.Parameter) -> float:
        """The learning rate, schedule included, that the optimizer's last step took for `parameter`.

        Raises:
            ValueError: it does not train.
        """
        found = self._loop.rate(parameter)
        if found is None:
            raise ValueError("rate: the parameter does not train")
        return found

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> id of all classes seen."""
        return self._loop.labels

    @property
    def methods(self) -> tuple[Method, ...]:
        """The whole list that the asking method stands in."""
        return tuple(self._loop.methods)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What trains by gradient now, heads included, by the names that `gradients` gives: `method/…`, `head/…`."""
        return self._loop.named_trainable()

    # ---- data
    def remember(self, batch: Batch, **kept: Tensor) -> None:
        """Offers the batch's rows to the replay buffer; of several processes all rows, so that the buffers agree.

        Each row once: later passes over an experience offer nothing.

        `kept` [B, n] are vectors that each row takes along under that name (`replay.unpack` reads them); their bytes
        count.
        """
        if self._loop.epoch:
            return
        if not kept:
            self.replay.add(*self._loop.rows_everywhere(batch))
            return
        assert batch.index is not None
        own = batch.index.clone()
        if not self.knows_boundaries:  # the batch itself does not say where its rows stand
            own[: len(self._loop.numbers_now)] = torch.tensor(self._loop.numbers_now)
        numbers = gather_rows(own.to(self.device), fill=-1)
        chosen = (numbers >= 0).nonzero()[:, 0].tolist()  # neither rehearsed rows nor fillers
        positions = numbers[chosen].tolist()
        columns = {name: gather_rows(values.detach()).cpu() for name, values in kept.items()}
        shown = [batch.rows[i] for i in chosen] if processes() == 1 else self._loop.rows_of(positions)
        rows = [
            {**row, **{name: pack(c[i]) for name, c in columns.items()}} for i, row in zip(chosen, shown, strict=True)
        ]
        self.replay.add(rows, positions)

    def extend(self, batch: Batch, rows: Sequence[Row]) -> Batch:
        """The batch with `rows` from the buffer appended and marked as rehearsed.

        Of several processes each takes its share: all must pass the same rows.

        Raises:
            ProtocolRefused: rows of the current experience that are not in the buffer, where passes are limited.
        """
        check_rehearsed(self._loop, rows)
        return self._with(batch, rows)

    def _with(self, batch: Batch, rows: Sequence[Row]) -> Batch:
        from .loading import derived_seed, joined, make_batch
        from .processors import pad_id, tokenizer_of

        loop = self._loop
        world, rank = loop.accelerator.num_processes, loop.accelerator.process_index
        share = -(-len(rows) // world)
        mine = list(rows)[rank * share : (rank + 1) * share]
        if not mine:
            return batch
        labels = loop.labels if loop.head is not None else None
        seeds = [derived_seed(loop.seed, "rehearsed", loop.counters.steps, rank, n) for n in range(len(mine))]
        more = make_batch(loop.objective, loop.processor, mine, labels, [-1] * len(mine), training=True, seeds=seeds)
        pad = pad_id(tokenizer_of(loop.processor)) if "input_ids" in more.inputs else 0
        old = len(batch)
        before = batch.rehearsed if batch.rehearsed is not None else torch.zeros(old, dtype=torch.bool)
        longer = joined(batch, more, pad)
        self._loop.rows_added += len(mine)
        return replace(longer, rehearsed=torch.cat([before, torch.ones(len(mine), dtype=torch.bool)]))

    def repeat(self, batch: Batch) -> Batch:
        """The batch with its own rows once more, each augmented anew; the copies count as rehearsed.

        Raises:
            ProtocolRefused: asked a second time in one step, where passes are limited.
        """
        self._loop.views += 1
        check_views(self._loop, self._loop.views)
        return self._with(batch, self._loop.rows_everywhere(batch)[0])

    # ---- passes
    def count(self, rows: int, passes: int = 0) -> None:
        """Counts rows of this process, and passes, that a method runs through the host beside the loop's own."""
        loop = self._loop
        loop.counters.extra_passes += passes
        loop.counters.extra_rows += rows * loop.accelerator.num_processes

    def count_in_step(self, rows: int) -> None:
        """Counts rows of this process that a method runs through the host in every step: one pass an experience."""
        self.count(rows, int(self._loop.begins))

    def capture(self, sites: Sequence[Site], rows: Rows) -> dict[str, InputMoments]:
        """Second moments of layer inputs over real tokens, by site name.

        One counted extra pass over `rows` in evaluation mode. Sites with the same input (query, key, value) share one.
        """
        from .bookkeeping import quiet

        loop = self._loop
        statistics: dict[str, InputMoments] = {}
        by_input: dict[tuple[Any, ...], str] = {}
        handles = []
        mask: list[Tensor | None] = [None]

        def listen(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].detach()
                fits = mask[0] is not None and mask[0].shape == x.shape[:-1]
                statistics[name].add(x, mask[0] if fits else None)

            return hook

        for site in sites:
            if input_key(site) in by_input:
                continue
            by_input[input_key(site)] = site.name
            statistics[site.name] = InputMoments(site.in_features, device=loop.device)
            handles.append(site.module.register_forward_pre_hook(listen(site.name)))
        try:
            with quiet(loop.model), torch.no_grad():
                for batch in chain(loop.batches(rows), loop.text_batches()):
                    found = batch.inputs.get("attention_mask")
                    mask[0] = None if found is None else found.bool()
                    loop.objective.forward(loop.model, None, batch, loop.pooling)
        finally:
            for handle in handles:
                handle.remove()
        loop.counters.extra_passes += 1
        loop.counters.extra_rows += len(rows)
        return {site.name: statistics[by_input[input_key(site)]] for site in sites}

    def gradients(
        self, rows: Rows, loss: Callable[[Batch, Output], Tensor] | None = None, per_sample: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of all trained parameters, one dict a batch (mean loss), or one a row with `per_sample`.

        For Fisher information, sensitivity masks and reference gradients. Evaluation mode; leaves `.grad` as it was.
        """
        loop = self._loop
        named = loop.named_trainable()
        loop.counters.extra_passes += 1
        loop.counters.extra_rows += len(rows)
        for batch in loop.batches(rows) if not per_sample else self._single(rows):
            yield self._gradient(batch, named, loss)

    def _gradient(
        self, batch: Batch, named: list[tuple[str, nn.Parameter]], loss: Callable[[Batch, Output], Tensor] | None
    ) -> dict[str, Tensor]:
        from .bookkeeping import quiet

        loop = self._loop
        asked = [p.requires_grad for _, p in named]  # before the first step nothing asks for gradients yet
        try:
            for _, parameter in named:
                parameter.requires_grad_(True)
            with quiet(loop.model), torch.enable_grad(), loop.own_passes.expected():
                output = loop.system(batch, True)
                if loss is not None:
                    value = loss(batch, output)
                else:
                    summed, count = self.loss_sum(batch, output)
                    value = summed / count.clamp(min=1)
                found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
        finally:
            for (_, parameter), wanted in zip(named, asked, strict=True):
                parameter.requires_grad_(wanted)
        return {
            name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in zip(named, found, strict=True)
        }

    def loss_sum(self, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
        """The objective's summed loss of a batch and the number of rows or tokens in it; all classes seen compete."""
        return self._loop.objective.loss(batch, output, self._seen_classes(output))

    def loss_among(self, batch: Batch, output: Output) -> Tensor:
        """The objective's mean loss over rows with a class, those of all processes together; all classes seen compete.

        The same number in every process, so that it may be returned as a loss of the method's own.
        """
        assert batch.labels is not None
        summed, _ = self._loop.objective.loss_among(batch, output, self._seen_classes(output))
        return self.mean(summed, (batch.labels != -100).sum())

    @staticmethod
    def mean(summed: Tensor, count: Tensor) -> Tensor:
        """Sum over count, both scalars of this process: those of all processes together, at least one counted."""
        return gather_rows(summed[None]).sum() / gather_rows(count[None]).sum().clamp(min=1)

    def _seen_classes(self, output: Output) -> Tensor | None:
        """Heads may have rows for classes that were only declared; these never compete here."""
        if self._loop.head is None or output.logits is None:
            return None
        return torch.arange(output.logits.shape[-1], device=output.logits.device) < len(self._loop.labels)

    def _single(self, rows: Rows) -> Iterator[Batch]:
        for row in rows:
            yield from self._loop.batches([row])

    def class_statistics(self, rows: Rows) -> dict[str, ClassStatistics]:
        """Mean and covariance of the features of each class in `rows`; one counted extra pass."""
        from .bookkeeping import quiet
        from .errors import BadInput

        loop = self._loop
        if loop.head is None:
            raise BadInput(
                f"class_statistics: objective {loop.objective.name!r} has no classes; use it for classification"
            )
        features, labels = [], []
        with quiet(loop.model), torch.no_grad():
            for batch in loop.batches(rows):
                output = loop.objective.forward(loop.model, None, batch, loop.pooling)
                assert output.features is not None and batch.labels is not None
                features.append(output.features.float())
                labels.append(batch.labels)
        loop.counters.extra_passes += 1
        loop.counters.extra_rows += len(rows)
        every, ids = torch.cat(features), torch.cat(labels)
        names = {number: name for name, number in loop.labels.items()}
        found = {}
        for number in ids.unique().tolist():
            mine = every[ids == number]
            mean = mine.mean(0)
            centred = mine - mean
            found[names[number]] = ClassStatistics(mean, centred.T @ centred / len(mine), len(mine))
        return found

    # ---- the old model
    def remember_model(self) -> None:
        """Takes a frozen copy of the system as it is now; what is frozen already is shared, not copied."""
        loop = self._loop
        tensors, values = loop.learnt_state()  # pyright: ignore[reportAttributeAccessIssue]  # it is a Learner
        self._previous_learnt = ({name: t.detach().clone() for name, t in tensors.items()}, copy.deepcopy(values))
        trained = {id(p) for _, p in loop.named_trainable()} | {id(p) for m in loop.methods for _, p in m.touched()}
        shared = {id(p): p for p in loop.model.parameters() if id(p) not in trained and not p.requires_grad}
        inner = copy.deepcopy(loop.model, shared)
        inner.requires_grad_(False).eval()
        head = loop.auxiliary_head or loop.head
        self._previous = inner
        self._previous_head = copy.copy(head)
        if head is not None and self._previous_head is not None:
            self._previous_head.module = copy.deepcopy(head.module).requires_grad_(False)
            loop.encode_classes(inner, self._previous_head)  # it stands still from here on

    def previous_state(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The learnt state at the last boundary, kept only while a method needs the old model."""
        return self._previous_learnt if self._previous is not None else ({}, None)

    def load_previous_state(
        self,
        tensors: dict[str, Tensor],
        values: dict[str, Any] | None,
        load: Callable[[dict[str, Tensor], dict[str, Any]], None],
    ) -> None:
        """Builds the old model again: `load` puts its state into the live one, which is then copied."""
        if values is not None:
            load(tensors, values)
            self.remember_model()

    @property
    def has_previous_model(self) -> bool:
        return self._previous is not None

    def previous_model(self, batch: Batch) -> Output:
        """What the model and head at the end of the last experience give for `batch`, without gradients."""
        from .errors import BadInput

        if self._previous is None:
            raise BadInput("previous_model: there is none before the second experience; ask `has_previous_model` first")
        loop = self._loop
        # Its banks are smaller than those of the live model, whose routing the log is about.
        with torch.no_grad(), observing(lambda _: None):
            return loop.objective.forward(self._previous, self._previous_head, batch, loop.pooling)

    def parameters_changed(self) -> None:
        """Tells the loop that parameters were added or replaced between steps."""
        self._loop.parameters_changed()
