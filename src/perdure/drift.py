"""What corrects a head's statistics when learning has moved the features: passes before and after it.

Only heads with the settings `recentre` or `refresh` are asked for, and only where something besides the head trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bookkeeping import quiet
from .data import Rows
from .heads._fitted import FittedHead
from .loading import derived_seed, take
from .passes import features_of

if TYPE_CHECKING:
    from .loop import Loop


def keep_features(loop: Loop, rows: Rows) -> None:
    """Before an experience is learnt: the head keeps features of its rows, to compare them with those after it."""
    head = loop.head
    if not isinstance(head, FittedHead):
        return
    head.before = None  # of an experience that was given up
    if head.recentre_rows and head.started and _features_move(loop):
        head.before = _features(loop, _compared(loop, head, rows))


def correct_statistics(loop: Loop, rows: Rows) -> None:
    """After an experience was learnt, before its rows are summed: statistics of old classes follow the features."""
    head = loop.head
    if not isinstance(head, FittedHead):
        return
    if head.before is not None:
        head.recentre(_features(loop, _compared(loop, head, rows)))
        head.before = None
    buffered = loop.replay.rows
    if head.refreshes and head.started and _features_move(loop) and len(buffered):
        ids = torch.tensor([loop.labels[str(row["label"])] for row in buffered])
        head.refresh(_features(loop, buffered), ids)


def _features_move(loop: Loop) -> bool:
    named = [] if loop.optimization is None else loop.optimization.named
    return any(name.startswith("method/") for name, _ in named)


def _compared(loop: Loop, head: FittedHead, rows: Rows) -> Rows:
    """The rows to compare: all, or as many as the head asks for, the same before and after."""
    seed = derived_seed(loop.seed, "compared", loop.position.experience)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return take(rows, order[: head.recentre_rows].sort().values.tolist())


def _features(loop: Loop, rows: Rows) -> Tensor:
    """Pooled features [rows, D] float32 on the CPU; one counted pass."""
    loop.counters.extra_passes += 1
    loop.counters.extra_rows += len(rows)
    with quiet(loop.model), torch.no_grad(), loop.autocast():
        return torch.cat([
            features_of(loop.objective.forward(loop.model, None, batch, loop.pooling))
            for batch in loop.batches(rows, unlabelled=True)
        ])  # fmt: skip
