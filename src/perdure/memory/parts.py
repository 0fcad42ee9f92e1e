"""Rows split over processes: each keeps some, and all come together where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_AS_HELD: ContextVar[bool] = ContextVar("as_held", default=False)


class Share(NamedTuple):
    """Which rows a process keeps: ceil(n / processes) each in the order of their ranks, the last ones fewer."""

    rank: int
    processes: int

    def part(self, whole: Tensor) -> Tensor:
        """Own rows of [n, ...], as a copy that lets the rest go."""
        height = self._height(len(whole))
        return whole[self.rank * height : (self.rank + 1) * height].detach().clone()

    @torch.no_grad()
    def whole(self, part: Tensor, rows: int) -> Tensor:
        """[rows, ...] of the parts of all processes, which must all call it."""
        height = self._height(rows)
        found = part.new_empty(height * self.processes, *part.shape[1:])
        if rows:
            padded = part.new_zeros(height, *part.shape[1:])
            padded[: len(part)] = part
            _gather(found, padded)
        return found[:rows]

    def _height(self, rows: int) -> int:
        return -(-rows // self.processes)


def _gather(into: Tensor, own: Tensor) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # older torch has the older name
    gather(into, own)


@contextmanager
def as_held() -> Iterator[None]:
    """Inside, a state holds the rows that this process keeps and is read back so; nothing is exchanged."""
    token = _AS_HELD.set(True)
    try:
        yield
    finally:
        _AS_HELD.reset(token)


def is_as_held() -> bool:
    return _AS_HELD.get()
