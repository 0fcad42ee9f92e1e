"""Passes without gradients over rows, for evaluation, statistics and cached features. Base of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .assembly import caches_features
from .bookkeeping import Unlearnt, quiet
from .data import Batch, Rows, without_answers
from .errors import BadInput
from .loading import make_batch, take
from .memory.observe import RouterLog, observing

if TYPE_CHECKING:
    from .config import ProtocolConfig, TrainingConfig
    from .heads import Head
    from .holdings import Marks
    from .hosts import Host
    from .methods import Method
    from .objectives import Objective
    from .services import Services
    from .streams.experience import Experience


class Passes:
    """What every pass needs: host, head, settings, labels."""

    training: TrainingConfig
    protocol: ProtocolConfig
    objective: Objective
    methods: list[Method]
    model: nn.Module
    processor: Any
    seed: int
    host: Host
    pooling: str | None
    head: Head | None
    auxiliary_head: Head | None
    labels: dict[str, int]
    accelerator: Any
    services: Services
    _features: dict[tuple[str, str], Tensor]
    _marked: dict[tuple[str, str], Marks]

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def caches_features(self) -> bool:
        return self.head is not None and caches_features(self.methods)

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
        if isinstance(rows, (str, Mapping)):
            raise BadInput(f"rows: expected a list of rows, found one {type(rows).__name__}; put a row into a list")
        size = self.training.per_device_eval_batch_size
        known = (labels if labels is not None else self.labels) if self.head is not None and not unlabelled else None
        numbers = list(range(len(rows)))
        field = next((name for name in ("text", "prompt") if len(rows) and name in rows[0]), None)
        if by_length and field:
            numbers.sort(key=lambda number: len(rows[number].get(field) or ""))
        for start in range(0, len(rows), size):
            chosen = numbers[start : start + size]
            picked = take(rows, chosen)
            for number, row in zip(chosen, picked, strict=True):
                if not isinstance(row, Mapping):
                    raise BadInput(f"row {number}: expected a mapping of fields, found {type(row).__name__}")
            batch = make_batch(self.objective, self.processor, picked, known, chosen, training=False, seeds=None)
            yield batch.to(self.device)

    def scored_batches(self, experience: Experience, split: str, rows: Rows) -> Iterator[Batch]:
        """Evaluation batches of rows of one split, the shortest first, with the task id where it is granted at test."""
        task = experience.task if self.protocol.task_id == "test" else None
        labels = Unlearnt((name, number) for number, name in enumerate(self.class_names))
        if not self.caches_features:
            for batch in self.batches(rows, labels, by_length=True):
                yield self.with_task(batch, task)
            return
        features = self._cached_features(experience, split, rows)
        ids = torch.tensor([labels[str(row["label"])] for row in rows])
        picked = take(rows, range(len(rows)))
        yield self.with_task(Batch({}, ids, picked, features=features).to(self.device), task)

    def with_task(self, batch: Batch, task: int | None) -> Batch:
        """The batch with the task id of each row; as it is where there is none."""
        if task is None:
            return batch
        return replace(batch, task=torch.full((len(batch),), task, device=self.device))

    def _cached_features(self, experience: Experience, split: str, rows: Rows) -> Tensor:
        key = (experience.hash, split)  # the content, not the index: another stream may be scored too
        if key not in self._features:
            with quiet(self.model), torch.no_grad(), self.autocast():
                self._features[key] = torch.cat([
                    features_of(self.objective.forward(self.model, None, without_answers(batch), self.pooling))
                    for batch in self.batches(rows, unlabelled=True)
                ])  # fmt: skip
        return self._features[key]

    def _forget_features(self, experience: Experience) -> None:
        self._features.pop((experience.hash, "train"), None)

    # ---- classes known by their names
    @property
    def class_names(self) -> list[str]:
        """Classes among which rows are classified, by id: those learnt, then the others of a declared label space."""
        return list(self.labels)

    def encode_classes(self, model: nn.Module, head: Head | None) -> None:
        """Encodes all class texts once, for the passes that follow; nothing for heads that know no names."""
        if head is not None and head.by_text and head.classes:
            with quiet(model), torch.no_grad(), self.autocast():
                head.ready = self.objective.class_features(model, head)  # type: ignore[attr-defined]

    @contextmanager
    def classes_encoded(self) -> Iterator[None]:
        """Class texts are encoded once for all passes inside, in which the model must not change."""
        self.encode_classes(self.model, self.head)
        try:
            yield
        finally:
            if self.head is not None and self.head.by_text:
                self.head.ready = None  # type: ignore[attr-defined]

    def text_batches(self) -> Iterator[Batch]:
        """Texts of the classes of the current experience, each once, for statistics of the text tower."""
        if self.head is not None and self.head.by_text:
            for batch in self.head.current_texts(self.training.per_device_eval_batch_size):  # type: ignore[attr-defined]
                yield batch.to(self.device)

    @contextmanager
    def observing(self, batch: Batch, log: RouterLog | None = None) -> Iterator[None]:
        """Adds the routing of the passes inside to `log`, the loop's own when absent; padding does not count."""
        log = log or self.services.router_log
        log.mask = batch.inputs.get("attention_mask")
        with observing(log.add):
            yield

    def autocast(self) -> Any:
        if not self.training.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def features_of(output: Any) -> Tensor:
    return output.features.float().cpu()
