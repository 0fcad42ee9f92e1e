"""Linear head that is aligned after each experience on features drawn from class Gaussians. Imports no torch."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import HeadConfig
from ..data import wide
from ..errors import NonFiniteLoss
from ._fitted import ClassMeansHead, RecentreConfig, factor, longer, packed, unpacked
from ._head import register, seeded_generator
from .linear import LinearHead

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DRAWS = 11
"""Sets the draws of the alignment apart from others of the same seed."""


@register("slca")
class AlignedHead(ClassMeansHead, LinearHead):
    """Linear classifier, aligned on features drawn from class Gaussians (SLCA).

    Zhang et al., ICCV 2023, "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained
    Model" (arXiv 2303.05118); formulas from the project's notes and the released code, equation numbers not checked.

    Trained by gradient as `linear`. One pass at an experience's end gives μ_c and Σ_c (+ jitter I) of its classes.
    From the second experience T on, W and b are trained further, `samples` rows of each class and epoch being drawn:
        f ~ N(s_c μ_c, Σ_c),  s_c = 1 − d + d t_c / T,  t_c the experience of the class, counted from 1,
        loss = CE(z / (τ n(z))),  z = f Wᵀ + b,  n(z) = mean over experiences t of ‖z_t‖, z_t the scores of t's classes,
    in batches of `samples` rows by SGD with momentum, the rate on half a cosine over the epochs.
    The aligned W and b predict; training goes on from those before the alignment, as in the released code.

    The slow learner is no part of the head: set `training.learning_rate` far below `training.head_learning_rate`, the
    paper by a factor of 100; preset `slca`.

    Deviations: new rows start as in `linear`; a class that comes again adds to its Gaussian (the paper has no such
    stream); a Σ_c that is not positive definite in float64 gets ten times the jitter; float32 rows are drawn on the
    CPU by a generator of (seed, experience). `recentre` is not in SLCA: it moves μ_c as in `ncm`.

    State: W, b, aligned W and b, scatter of each class as its upper triangle (float32), means and counts (float64).
    """

    needs_boundaries = True

    class Config(HeadConfig):
        bias: bool = True
        """Whether each class has a bias."""
        epochs: int = Field(5, ge=0)
        """Epochs of alignment; 0 for none. Released code: 5."""
        samples: int = Field(256, ge=1)
        """Features drawn for each class and epoch, and rows of a batch. Released code: 256."""
        learning_rate: float = Field(0.01, gt=0)
        """Peak rate of the alignment. Released code: 0.01."""
        momentum: float = Field(0.9, ge=0, lt=1)
        """Released code: 0.9."""
        weight_decay: float = Field(5e-4, ge=0)
        """Released code: 5e-4."""
        temperature: float | None = Field(0.1, gt=0)
        """τ of the logit normalisation; none at all when null. Released code: 0.1."""
        mean_decay: float = Field(0.1, ge=0, le=1)
        """d: the mean of the oldest class is drawn towards zero by almost this share. Released code: 0.1."""
        jitter: float = Field(1e-4, gt=0)
        """Added to the diagonal of Σ_c. Released code: 1e-4."""
        recentre: RecentreConfig | None = None
        """Move means of old classes by the drift estimated on the current experience's rows; two counted passes over
        them."""

    config: AlignedHead.Config
    learning = False
    """True for the view of the training loss: it goes on from before the alignment."""

    # ---- shape
    def build(self, width: int, seed: int) -> nn.Module:
        LinearHead.build(self, width, seed)
        self._build_statistics()
        return self.module

    def _build_statistics(self) -> None:
        import torch

        super()._build_statistics()
        self.values |= {"experiences": 0, "of": []}
        self.module.register_buffer("scatter", torch.zeros(0, self.width, self.width))
        self.module.register_buffer("aligned_weight", torch.zeros(0, self.width))
        self.module.register_buffer("aligned_bias", torch.zeros(0))

    def grow(self, classes: int) -> None:
        if classes > self.classes:
            self._grow_statistics(classes)
            LinearHead.grow(self, classes)

    def _grow_statistics(self, classes: int) -> None:
        super()._grow_statistics(classes)
        longer(self.module, "scatter", classes)

    # ---- use
    def in_training(self) -> AlignedHead:
        view = copy.copy(self)
        view.learning = True
        return view

    def logits(self, features: Tensor) -> Tensor:
        import torch

        weight, bias = self.module.get_parameter("weight"), getattr(self.module, "bias", None)
        aligned = self.module.get_buffer("aligned_weight")
        if not self.learning and len(aligned):  # classes that came since are not aligned yet
            weight = torch.cat([aligned, weight[len(aligned) :]])
            bias = None if bias is None else torch.cat([self.module.get_buffer("aligned_bias"), bias[len(aligned) :]])
        with torch.autocast(features.device.type, enabled=False):
            features = wide(features)
            bias = None if bias is None else bias.to(features.dtype)
            return torch.nn.functional.linear(features, weight.to(features.dtype), bias)

    # ---- the Gaussians
    def _add_class(self, number: int, rows: Tensor, order: Tensor) -> None:
        """Chan's formula: scatter within the block, and that between its mean and the one before."""
        scatter, count, own = self.module.get_buffer("scatter"), self.counts[number], rows.mean(0)
        gap = own - self.means[number]
        inner = (rows - own).T @ (rows - own) + count * len(rows) / (count + len(rows)) * gap[:, None] * gap
        scatter[number] += inner.float()
        super()._add_class(number, rows, order)

    def _factor(self, number: int) -> Tensor:
        """U [D, D] float32 with UᵀU = Σ_c + jitter I."""
        import torch

        covariance = self.module.get_buffer("scatter")[number].double() / (self.counts[number] - 1).clamp(min=1)
        jitter = self.config.jitter
        identity = torch.eye(self.width, dtype=torch.float64, device=self.device)
        good = False
        while not good:
            upper, good = factor(covariance + jitter * identity)
            jitter *= 10
        return upper.float()

    # ---- the alignment
    def _fit(self, seed: int) -> None:
        import torch

        if not torch.isfinite(self.module.get_buffer("scatter").diagonal(dim1=-2, dim2=-1)).all():
            raise NonFiniteLoss(
                "slca head: the features of a class are too large for its covariance; look at what makes them so"
            )
        self.values["experiences"] += 1
        known = self.counts > 0
        of = self.values["of"] + [0] * (self.classes - len(self.values["of"]))
        self.values["of"] = [
            self.values["experiences"] if not number and here else number
            for number, here in zip(of, known.tolist(), strict=True)
        ]
        if self.values["experiences"] > 1 and self.config.epochs:
            self._align(known.nonzero().flatten(), seeded_generator(self.seed, seed, DRAWS))

    def _align(self, known: Tensor, generator: torch.Generator) -> None:
        import torch

        weight, bias = self.module.get_parameter("weight").detach().clone(), getattr(self.module, "bias", None)
        bias = weight.new_zeros(0) if bias is None else bias.detach().clone()
        trained = [part[known].requires_grad_() for part in (weight, bias) if len(part)]
        of = torch.tensor(self.values["of"], device=self.device)[known]
        means = (self.means[known] * self._decay(of)[:, None]).float()
        factors = [self._factor(number) for number in known.tolist()]
        config, samples = self.config, self.config.samples
        optimizer = torch.optim.SGD(trained, config.learning_rate, config.momentum, weight_decay=config.weight_decay)
        with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            for epoch in range(config.epochs):
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
                features, labels = self._draw(means, factors, generator)
                for start in range(0, len(labels), samples):
                    scores = torch.nn.functional.linear(features[start : start + samples], *trained)
                    optimizer.zero_grad()
                    self.alignment_loss(scores, labels[start : start + samples], of).backward()
                    optimizer.step()
        for whole, part in zip((weight, bias), trained, strict=False):
            whole[known] = part.detach()
        self.module.aligned_weight, self.module.aligned_bias = weight, bias

    def _decay(self, of: Tensor) -> Tensor:
        """s_c of classes that came in the experiences `of` [K]."""
        return 1 - self.config.mean_decay + self.config.mean_decay * of.double() / self.values["experiences"]

    def _draw(self, means: Tensor, factors: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features [K · samples, D] of all classes in random order, and their places [K · samples] in `means`."""
        import torch

        drawn = []
        for mean, upper in zip(means, factors, strict=True):
            noise = torch.randn(self.config.samples, self.width, generator=generator)
            drawn.append(mean + noise.to(upper.device) @ upper)
        labels = torch.arange(len(means)).repeat_interleave(self.config.samples)
        order = torch.randperm(len(labels), generator=generator)
        return torch.cat(drawn)[order.to(self.device)], labels[order].to(self.device)

    def alignment_loss(self, scores: Tensor, labels: Tensor, of: Tensor) -> Tensor:
        """Cross-entropy of normalised scores [B, K]; class k came in the experience `of[k]`."""
        import torch

        if self.config.temperature is not None:
            norms = [scores[:, of == number].norm(dim=1) + 1e-7 for number in of.unique().tolist()]
            scores = scores / (self.config.temperature * torch.stack(norms).mean(0)[:, None])
        return torch.nn.functional.cross_entropy(scores, labels)

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state_dict()
        values["values"]["of"] = list(values["values"]["of"])
        return tensors | {"scatter": packed(tensors["scatter"])}, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors | {"scatter": unpacked(tensors["scatter"], self.width)}, values)
