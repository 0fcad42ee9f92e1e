"""Sums over processes, and their rows as one tensor with a gradient, for losses that contrast rows with each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, without a gradient; the tensor itself where there is one."""
    if processes() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


def gather_rows(tensor: Tensor, fill: float = 0.0) -> Tensor:
    """Rows [B, ...] of every process below each other, [processes · B', ...], B' the largest B; `fill` pads the rest.

    Every process gets the same values. The gradient of a process's own rows is the sum of what all processes send back.
    """
    if processes() == 1:
        return tensor
    size = torch.tensor(len(tensor), device=tensor.device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    missing = int(size) - len(tensor)
    if missing:
        tensor = torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), fill)])
    return _Gather.apply(tensor)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(processes())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        start = dist.get_rank() * ctx.rows
        return summed[start : start + ctx.rows]
