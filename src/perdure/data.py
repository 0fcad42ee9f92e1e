"""What flows through the loop: rows, a batch, an output. Shapes: B rows, T tokens, D features, C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Row = Mapping[str, Any]
"""One example: `text` or `image` with `label`; `prompt` with `answer`; `image` with `text`; or `text` alone."""
Rows = Sequence[Row]


@dataclass(frozen=True)
class Batch:
    """A batch as the model takes it.

    Attributes:
        inputs: keyword arguments of the host's forward (`input_ids` [B, T], `attention_mask` [B, T],
            `pixel_values` [B, 3, H, W] ...). Image-text pairs carry both kinds.
        labels: class ids [B], or token ids [B, T] with -100 where no loss is taken (language modelling, the prompt
            part of instruction rows). A class id of -100 marks a row that fills a process up and counts nothing.
        rows: the examples themselves, for rehearsal and generation.
        index: position of each row in its experience [B], -1 for rows from elsewhere.
        rehearsed: True for rows that come from the replay buffer [B]; absent when there are none.
        task: experience ids [B], only where the protocol grants them.
        features: cached frozen features [B, D] that replace the host's forward.
        extra: what a method adds for its own losses.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    rows: Rows = ()
    index: Tensor | None = None
    rehearsed: Tensor | None = None
    task: Tensor | None = None
    features: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to(self, device: Any) -> Batch:
        def move(x: Any) -> Any:
            return x.to(device, non_blocking=True) if hasattr(x, "to") else x

        return replace(
            self,
            inputs={k: move(v) for k, v in self.inputs.items()},
            labels=move(self.labels),
            index=move(self.index),
            rehearsed=move(self.rehearsed),
            task=move(self.task),
            features=move(self.features),
            extra={k: move(v) for k, v in self.extra.items()},
        )

    def __len__(self) -> int:
        for tensor in (self.labels, self.features, *self.inputs.values()):
            if tensor is not None:
                return tensor.shape[0]
        return len(self.rows)


def wide(tensor: Tensor) -> Tensor:
    """At least float32: half precision is widened, float64 stays, so that a float64 host is exact to the loss."""
    return tensor if tensor.dtype.itemsize >= 8 else tensor.float()


@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: class scores [B, C] before any mask, or token scores [B, T, V].
        features: pooled features [B, D] that the head saw (classification), image features (image-text).
        other_features: text features of image-text pairs [B, D].
        host: the host's own output object.
        texts: what the model wrote for each row, where it is scored on that.
    """

    logits: Tensor | None = None
    features: Tensor | None = None
    other_features: Tensor | None = None
    host: Any = None
    texts: Sequence[str] | None = None


def without_answers(batch: Batch) -> Batch:
    """What a method may see of rows that are scored or predicted."""
    return replace(batch, labels=None, rows=[question(row) for row in batch.rows])


def question(row: Row) -> Row:
    """A row without its label or answer."""
    kept = {key: value for key, value in row.items() if key not in ("label", "answer")}
    if kept.get("messages") is not None:
        turns = list(kept["messages"])
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        kept["messages"] = turns
    return kept
