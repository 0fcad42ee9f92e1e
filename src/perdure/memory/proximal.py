"""Proximal steps on gates: the operators that set small gates to zero, and the threshold's way through a training."""

from __future__ import annotations

import torch
from torch import Tensor

STAGES = 50
"""Points of the ramp in the released code."""


def soft_threshold(gates: Tensor, kappa: float) -> Tensor:
    """T_κ(g) = 1[|g| > κ] (g − κ sign g): the minimiser of (z − g)² / 2 + κ |z| over z, element by element.

    Args:
        gates: any shape. kappa: κ, at least 0.
    """
    return torch.sign(gates) * (gates.abs() - kappa).clamp_min(0)


def double_threshold(gates: Tensor, kappa: float) -> Tensor:
    """g − κ sign g where |g| ≥ 2 κ, else 0: CoDyRA's released operator, which shrinks first and then cuts at κ.

    Args:
        gates: any shape. kappa: κ, at least 0.
    """
    left = gates.abs() - kappa
    return torch.where(left >= kappa, torch.sign(gates) * left, torch.zeros_like(gates))


OPERATORS = {"soft": soft_threshold, "released": double_threshold}


def dense_steps(total: int, dense: float) -> int:
    """d = ⌊dense · total⌋: the threshold begins after step number d, counted from 0."""
    return int(dense * total)


def ramp(step: int, total: int, dense: float, top: float) -> float:
    """κ after 0-based `step` of `total`: 0 while step ≤ d, then j · top / 49 with j = 1 + ⌊50 (step − d) / (total − d)⌋
    but at most 49, and d = `dense_steps`. With 500 steps and dense .5 that is CoDyRA's released schedule, where j rises
    every 5 steps and Σ κ = 130 · top.

    Args:
        dense: share of the steps without a threshold, in [0, 1].
        top: κ_max.
    """
    begin = dense_steps(total, dense)
    if step <= begin:
        return 0.0
    stage = 1 + STAGES * (step - begin) // max(1, total - begin)
    return min(stage, STAGES - 1) * top / (STAGES - 1)
