"""Optimizers in which a row of a parameter that got no gradient stands still, to the bit.

AdamW's decay shrinks every row in every step, and its momentum moves a row long after it was last used. Where rows
are items of a memory, each should rather be optimized by itself: here a row has moments and a step count of its own,
and a step in which its gradient is all zero is no step for it. It is then neither decayed nor moved, and its moments
wait. Gradients are complete when the optimizer steps, so rows used in any micro-batch or process count as used.

The count is a row's own because a common one would correct the bias of young moments too little: a row first used
late would step up to (1 - β1) / sqrt(1 - β2) times too far (3.2 for .9 and .999), which is what a "lazy" Adam does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def used_rows(gradient: Tensor) -> Tensor:
    """[R, ...] -> bool [R], True where a row's gradient is not all zero."""
    return (gradient != 0).reshape(gradient.shape[0], -1).any(1)


class _ByRows(torch.optim.Optimizer):
    """Steps groups marked `rows` row by row, and leaves the others to the class behind it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("rows")]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        with torch.no_grad():
            for group in groups:
                for parameter in group["params"] if group.get("rows") else ():
                    if parameter.grad is not None:
                        used = used_rows(parameter.grad)
                        self._step_rows(parameter, parameter.grad, used, group)

    def _step_rows(self, parameter: Tensor, gradient: Tensor, used: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


def _along(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))


@contextmanager
def _rows(used: Tensor, gradient: Tensor, *changed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows in use, to be changed in place all but the gradient's; the others are neither read nor written."""
    rows = used.nonzero().flatten()
    if len(rows) == len(used):
        yield gradient, *changed
        return
    parts = tuple(tensor[rows] for tensor in changed)
    yield gradient[rows], *parts
    for tensor, part in zip(changed, parts, strict=True):
        tensor[rows] = part


class RowAdamW(_ByRows, torch.optim.AdamW):
    """AdamW; in groups marked `rows` every row is an AdamW of its own that sees only the steps in which it is used."""

    def _step_rows(self, parameter: Tensor, gradient: Tensor, used: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), rate = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state["visits"] = parameter.new_zeros(parameter.shape[0], dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        with _rows(used, gradient, parameter, state["exp_avg"], state["exp_avg_sq"], state["visits"]) as parts:
            g, p, mean, square, visits = parts
            visits += 1
            mean.lerp_(g, 1 - beta1)
            square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            count = _along(visits.to(p.dtype), p)
            root = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
            p.mul_(1 - rate * group["weight_decay"]).sub_((mean / (1 - beta1**count)).div_(root), alpha=rate)


class RowSGD(_ByRows, torch.optim.SGD):
    """Plain SGD; in groups marked `rows` a row that is not used is not decayed either."""

    def _step_rows(self, parameter: Tensor, gradient: Tensor, used: Tensor, group: dict[str, Any]) -> None:
        with _rows(used, gradient, parameter) as (g, p):
            p.sub_(g + group["weight_decay"] * p, alpha=group["lr"])
