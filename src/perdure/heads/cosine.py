"""Cosine head: class scores are scaled cosines between features and class vectors. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..config import HeadConfig
from ..data import wide
from ._head import Head, register
from .linear import new_rows

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("cosine")
class CosineHead(Head):
    """Cosine classifier with a learnable scale.

    logits = η · (f/‖f‖) (W/‖W‖ row by row)ᵀ, Hou et al. 2019, "Learning a Unified Classifier Incrementally via
    Rebalancing" (LUCIR): without norms and biases, new classes cannot outweigh old ones by magnitude alone.
    η is one learnable scalar as there. LUCIR's code starts it at 1, where the softmax over many classes is flat at
    first; the default here is the start of Gidaris & Komodakis 2018, "Dynamic Few-Shot Visual Learning without
    Forgetting": 10.
    """

    class Config(HeadConfig):
        scale: float = Field(10.0, gt=0)
        """Start value of η, or its value for good when it is not learnt."""
        learn_scale: bool = True

    config: CosineHead.Config

    def build(self, width: int, seed: int) -> nn.Module:
        import torch

        self.width, self.seed, self.classes = width, seed, 0
        self.module = torch.nn.Module()
        self.module.register_parameter("weight", torch.nn.Parameter(torch.empty(0, width)))
        scale = torch.tensor([float(self.config.scale)])
        self.module.register_parameter("scale", torch.nn.Parameter(scale, requires_grad=self.config.learn_scale))
        return self.module

    def grow(self, classes: int) -> None:
        if classes <= self.classes:
            return
        import torch

        old = self.module.get_parameter("weight")
        rows = new_rows(self.width, self.seed, range(self.classes, classes)).to(old)
        self.module.weight = torch.nn.Parameter(torch.cat([old.detach(), rows]), requires_grad=old.requires_grad)
        self.classes = classes

    def logits(self, features: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import normalize

        with torch.autocast(features.device.type, enabled=False):
            features = wide(features)
            weight = normalize(self.module.get_parameter("weight").to(features.dtype), dim=-1)
            cosines = torch.nn.functional.linear(normalize(features, dim=-1), weight)
            return self.module.get_parameter("scale").to(features.dtype) * cosines
