"""The base of every objective: from rows to a batch, to a loss, to a score. Imports no torch.

An objective keeps no state and draws no random number of its own: what it encodes depends on the rows and the
seeds given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..config import ObjectiveConfig
from ..data import Batch, Output, Rows, wide
from ..errors import BadInput
from ..registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

    from ..heads import Head
    from ..hosts import Host

register = OBJECTIVES.register


class Objective(ABC):
    """One kind of task. Shapes: B rows, T tokens, C classes, V token ids.

    Class attributes:
        metric: what `finish` returns.
        higher_is_better: direction of the metric.
        needs_head: whether a head of ours maps features to class scores.
        default_head: the head where none is named.
        own_head: whether the host's own head scores classes and trains with the method (Hugging Face Trainer).
        writes: whether it is scored on what the model writes: then it has `write(model, processor, batch)`, an Output
            with texts, and `grade(rows, texts, experience)`, parts of the metric as those of `score`.
        predicts_tokens: whether the loss at a token asks for the next one, so that nothing later may reach it.
        by_text: whether it encodes the names of classes, which a head with `by_text` needs; only such a head fits then.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    metric: ClassVar[Literal["accuracy", "perplexity", "score"]]
    higher_is_better: ClassVar[bool]
    needs_head: ClassVar[bool]
    default_head: ClassVar[str] = "cosine"
    own_head: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    by_text: ClassVar[bool] = False

    def __init__(self, config: Any):
        self.config = config

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("title") and cls.__doc__:
            cls.title = cls.__doc__.strip().splitlines()[0].rstrip(".")

    @property
    def scores_classes(self) -> bool:
        """Whether features go through a head, ours or the host's, that learns classes."""
        return self.needs_head or self.own_head

    @abstractmethod
    def check(self, rows: Rows, processor: Any) -> None:
        """Raises BadInput where a row lacks a field or holds a wrong type; names the row and the field."""

    @abstractmethod
    def check_model(self, model: Any, processor: Any) -> None:
        """Raises BadInput where model and processor do not fit each other or this objective."""

    @abstractmethod
    def encode(
        self, rows: Rows, processor: Any, training: bool = False, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Lists and arrays of each row: a pure function of the rows, and of one seed per row where it augments."""

    @abstractmethod
    def collate(
        self,
        encoded: Sequence[Mapping[str, Any]],
        rows: Rows,
        labels: Mapping[str, int] | None = None,
        index: Sequence[int] | None = None,
    ) -> Batch:
        """A padded batch of CPU tensors. `labels` maps class names to ids; without it class labels are left out."""

    @abstractmethod
    def forward(self, model: Any, head: Head | None, batch: Batch, pooling: str | None = None) -> Output:
        """Runs the host, and the head where there is one. Logits are unmasked and float32 where a head makes them."""

    @abstractmethod
    def loss(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Summed loss (float32 scalar) and what it was summed over (int64 scalar).

        `allowed`, [C] or [B, C] bool, says which classes compete. The two are apart so that the loop can divide by the
        count over all processes and accumulated batches.
        """

    def loss_among(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """This process's part of the loss where several share the rows of a step; the parts are summed.

        As `loss`, unless rows are contrasted with each other: those of the other processes then take part.
        """
        return self.loss(batch, output, allowed)

    @abstractmethod
    def score(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Parts of the metric that add up over batches: a float64 and an int64 scalar."""

    def width(self, host: Host) -> int:
        """Width D of the features that a head sees."""
        return host.width

    def unlabelled(self, rows: Rows) -> bool:
        """Whether rows of an objective with a head have no class: they are then scored all at once, see `gathered`."""
        return False

    def gathered(self, parts: Sequence[tuple[Batch, Output]]) -> tuple[Batch, Output]:
        """Batches of rows without a class as one, for `score`; only features are needed."""
        raise NotImplementedError

    @abstractmethod
    def finish(self, total: float, count: int) -> float:
        """The metric from the sums of `score`; NaN where nothing was counted."""


def right(batch: Batch, output: Output, allowed: Tensor | None = None) -> Tensor:
    """Which rows [B] are given their own class among the allowed ones ([C] or [B, C]); never one without a class."""
    assert output.logits is not None and batch.labels is not None
    logits = wide(output.logits)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.argmax(-1) == batch.labels


def require(row: Any, position: int, field: str, kind: type | tuple[type, ...], remedy: str) -> Any:
    """The row's field, of the right type; BadInput names row and field otherwise."""
    if not isinstance(row, Mapping):
        raise BadInput(f"row {position}: expected a mapping of fields, found {type(row).__name__}; {remedy}")
    if row.get(field) is None:
        found = ", ".join(map(str, row)) or "no field"
        raise BadInput(f"row {position}: field {field!r} is missing (found: {found}); {remedy}")
    if not isinstance(row[field], kind):
        raise BadInput(f"row {position}: field {field!r} is of type {type(row[field]).__name__}; {remedy}")
    return row[field]


def index_tensor(rows: Rows, index: Sequence[int] | None) -> Tensor:
    """Positions in the experience [B]; -1 where unknown."""
    import torch

    return torch.tensor([-1] * len(rows) if index is None else list(index), dtype=torch.int64)


def pad_right(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Token ids [B, T] padded at the end to the longest sequence."""
    import torch

    out = torch.full((len(sequences), max(map(len, sequences), default=0)), value, dtype=torch.int64)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
    return out
