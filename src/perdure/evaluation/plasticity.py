"""Plasticity beside forgetting: how far features moved and how much a memory wrote. Pure functions on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor


def feature_drift(before: Tensor, after: Tensor) -> float:
    """Mean of 1 - cos(before_n, after_n) over rows: 0 where the features of old inputs kept their direction, 2 at most.

    Args:
        before: features [N, D] of old inputs before learning.
        after: features [N, D] of the same inputs in the same order after learning.

    Raises:
        BadInput: shapes differ or there is no row.
    """
    import torch

    if before.shape != after.shape or before.dim() != 2:
        raise BadInput(
            f"features: found shapes {list(before.shape)} and {list(after.shape)}; need two of the same [N, D]"
        )
    if before.shape[0] == 0:
        raise BadInput("features: found no row; drift needs at least one old input")
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    # Rounding may leave a cosine a hair above 1.
    return float((1 - cosine).clamp(0, 2).mean())


def output_ratio(adapter: Tensor, base: Tensor, mask: Tensor | None = None) -> float:
    """Mean over tokens of ‖adapter output‖ / ‖base output‖: how large the memory's answer is beside the host's.

    Args:
        adapter: what the memory adds, [..., D].
        base: the module's own output, [..., D].
        mask: [...] bool, True for tokens that count (padding excluded).

    Raises:
        BadInput: shapes do not fit or no token counts.
    """
    if adapter.shape != base.shape:
        raise BadInput(f"adapter: found shape {list(adapter.shape)}; must be the base output's {list(base.shape)}")
    top, bottom = adapter.double().norm(dim=-1), base.double().norm(dim=-1)
    ratio = top / bottom.clamp_min(1e-12)
    return float(_kept(ratio, mask).mean())


def closed_share(weights: Tensor, mask: Tensor | None = None) -> float:
    """Share of tokens with no item open: all k routing weights are zero.

    Args:
        weights: routing weights [..., k] after the threshold; an item that is shut has weight 0.
        mask: [...] bool, True for tokens that count.

    Raises:
        BadInput: the mask does not fit or no token counts.
    """
    return float(_kept((weights == 0).all(dim=-1), mask).double().mean())


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        if mask.shape != values.shape:
            raise BadInput(f"mask: found shape {list(mask.shape)}; must be {list(values.shape)}")
        values = values[mask.bool()]
    if values.numel() == 0:
        raise BadInput("mask: leaves no token; at least one must count")
    return values
