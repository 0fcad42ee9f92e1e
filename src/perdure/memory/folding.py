"""Replaces what atoms answer by one linear map, with the loss stated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fold(NamedTuple):
    """A linear map in place of routed atoms.

    Attributes:
        delta: D [d_out, d_in], float64: y ~ D x.
        fitted: ||Y - X D^T||_F / ||Y||_F over the inputs that D was fitted on.
        held_out: the same over every `EVERY`-th input, which D was not fitted on: the loss to go by.
    """

    delta: Tensor
    fitted: float
    held_out: float


EVERY = 5
"""Every which input is held out."""


@torch.no_grad()
def fold(inputs: Tensor, outputs: Tensor, ridge: float = 1e-2) -> Fold:
    """The linear map that is nearest to what a memory answered: min_D ||Y - X D^T||² + ridge · tr(XᵀX)/d · ||D||².

    Routing makes the answers depend on the input; what a linear map cannot say of that is the loss.

    Args:
        inputs: X [n, d_in], real tokens. outputs: Y [n, d_out], the memory's answers to them.
        ridge: share of the mean eigenvalue of XᵀX added to its diagonal, above 0.
    Raises:
        ValueError: the numbers of rows differ or are below 2, or ridge is not above 0.
    """
    if inputs.shape[0] != outputs.shape[0] or inputs.shape[0] < 2:
        raise ValueError(f"outputs: found {outputs.shape[0]} rows for {inputs.shape[0]} inputs; expected as many, 2 up")
    if not ridge > 0:
        raise ValueError(f"ridge: found {ridge}; must be above 0")
    x, y = inputs.double(), outputs.double()
    held = torch.arange(x.shape[0], device=x.device) % EVERY == EVERY - 1
    if not bool(held.any()):
        held[-1] = True
    a, b = x[~held], y[~held]
    moment = a.t() @ a
    scale = moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    moment.diagonal().add_(ridge * scale)
    delta = torch.linalg.solve(moment, a.t() @ b).t()
    return Fold(delta, _loss(a, b, delta), _loss(x[held], y[held], delta))


def _loss(x: Tensor, y: Tensor, delta: Tensor) -> float:
    tiny = torch.finfo(torch.float64).tiny
    return float((y - x @ delta.t()).norm() / y.norm().clamp_min(tiny))
