"""Linear head: one weight row and one bias per class. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from ..config import HeadConfig
from ..data import wide
from ._head import Head, register, seeded_generator

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("linear")
class LinearHead(Head):
    """Linear classifier.

    logits = f Wᵀ + b with f [B, D], W [C, D], b [C]. New rows are drawn from U(-1/√D, 1/√D), the bound of
    `torch.nn.Linear`, each from its own generator: growing one by one or all at once gives the same weights. New
    biases are zero, so that no class starts with an advantage.
    """

    class Config(HeadConfig):
        bias: bool = Field(True)
        """Whether each class has a bias."""

    config: LinearHead.Config

    def build(self, width: int, seed: int) -> nn.Module:
        import torch

        self.width, self.seed, self.classes = width, seed, 0
        self.module = torch.nn.Module()
        self.module.register_parameter("weight", torch.nn.Parameter(torch.empty(0, width)))
        self.module.register_parameter("bias", torch.nn.Parameter(torch.empty(0)) if self.config.bias else None)
        return self.module

    def grow(self, classes: int) -> None:
        if classes <= self.classes:
            return
        import torch

        old = self.module.get_parameter("weight")
        rows = new_rows(self.width, self.seed, range(self.classes, classes)).to(old)
        self.module.weight = torch.nn.Parameter(torch.cat([old.detach(), rows]), requires_grad=old.requires_grad)
        if self.config.bias:
            old = self.module.get_parameter("bias")
            zeros = old.new_zeros(classes - self.classes)
            self.module.bias = torch.nn.Parameter(torch.cat([old.detach(), zeros]), requires_grad=old.requires_grad)
        self.classes = classes

    def logits(self, features: Tensor) -> Tensor:
        import torch

        weight, bias = self.module.get_parameter("weight"), getattr(self.module, "bias", None)
        with torch.autocast(features.device.type, enabled=False):
            features = wide(features)
            bias = None if bias is None else bias.to(features.dtype)
            return torch.nn.functional.linear(features, weight.to(features.dtype), bias)


def new_rows(width: int, seed: int, ids: range) -> Tensor:
    """Rows of U(-1/√D, 1/√D) for the class ids [len(ids), D]; each depends on the seed and its own id only."""
    import torch

    bound = 1 / math.sqrt(width)
    rows = [torch.empty(width).uniform_(-bound, bound, generator=seeded_generator(seed, i)) for i in ids]
    return torch.stack(rows) if rows else torch.empty(0, width)
