"""Rows split over processes: each keeps some, all come together where they are read, and again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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
            dist.all_gather(list(found.chunk(self.processes)), padded)
        return found[:rows]

    def _height(self, rows: int) -> int:
        return -(-rows // self.processes)


def refetched(fetched: Mapping[Tensor, Callable[[], Tensor]]) -> AbstractContextManager[Any]:
    """Inside, autograd keeps of these tensors only how to fetch them again; every process must then go backward."""
    known = {tensor.untyped_storage().data_ptr(): fetch for tensor, fetch in fetched.items() if tensor.numel()}

    def pack(tensor: Tensor) -> Any:
        fetch = known.get(tensor.untyped_storage().data_ptr())
        layout = tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor if fetch is None else (fetch, layout)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        fetch, layout = packed
        return fetch().as_strided(*layout)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
