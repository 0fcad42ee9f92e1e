"""Streaming linear discriminant analysis: class means and one covariance for all classes. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..data import wide
from ..errors import NonFiniteLoss
from ._fitted import ClassMeansHead, DriftConfig, factor, longer, packed, unpacked
from ._head import register

if TYPE_CHECKING:
    from torch import Tensor


@register("slda")
class StreamingLDA(ClassMeansHead):
    """Streaming linear discriminant analysis.

    Hayes & Kanan 2020, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis" (arXiv 1909.01520).
    A row x of class y, the n_y-th after μ_y was made of n_y − 1 rows, the t-th of the stream after t − 1:
    S += w (x − μ_y)(x − μ_y)ᵀ, then μ_y += (x − μ_y) / n_y;  Σ = S / t.
    Λ = ((1 − ε) Σ + ε I)⁻¹, w_c = Λ μ_c, b_c = −½ μ_cᵀ Λ μ_c, scores = f w_c + b_c; no class priors.

    `covariance: exact` has w = (n_y − 1) / n_y (Welford): S is the scatter within classes of all rows, to rounding, so
    the head is the batch LDA of the whole stream in one pass. `published` has the paper's w = (t − 1) / t for every
    class, as the released code does: a class's first row, compared with a mean of zero, then counts almost in full,
    and Σ depends on the order of rows.

    Deviations: sums and the inverse in float64 by Cholesky factorisation where the released code has float32 and a
    pseudo-inverse; no base phase with an OAS estimate of Σ, the stream begins at its first row.

    `recentre` moves the means alone: the scatter within a class is what it was if all its rows move alike. `refresh`
    takes means of old classes from the buffer, and S as their scatter there times (N − K) / (B − K), N rows seen and B
    buffered of K classes; what classes without a buffered row brought to S is kept as their share of the rows. With all
    rows in the buffer that is exact, else an estimate.

    State: means, counts, S as its upper triangle (float64), weights and biases (float32).
    """

    closed_form = True

    class Config(DriftConfig):
        shrinkage: float = Field(1e-4, gt=0, le=1)
        """ε. Released code: 1e-4."""
        covariance: Literal["exact", "published"] = "exact"
        """Weight of a row's deviation: by the rows of its class (equals the batch LDA), or of the stream (paper)."""

    config: StreamingLDA.Config

    def _build_statistics(self) -> None:
        import torch

        super()._build_statistics()
        self.module.register_buffer("scatter", torch.zeros(self.width, self.width, dtype=torch.float64))
        self.module.register_buffer("weight", torch.zeros(0, self.width))
        self.module.register_buffer("bias", torch.zeros(0))

    def _grow_statistics(self, classes: int) -> None:
        super()._grow_statistics(classes)
        for name in ("weight", "bias"):
            longer(self.module, name, classes)

    @property
    def scatter(self) -> Tensor:
        """S [D, D]."""
        return self.module.get_buffer("scatter")

    def logits(self, features: Tensor) -> Tensor:
        import torch

        weight, bias = self.module.get_buffer("weight"), self.module.get_buffer("bias")
        with torch.autocast(features.device.type, enabled=False):
            features = wide(features)
            scores = features @ weight.to(features.dtype).T + bias.to(features.dtype)
            return self.among_known(scores)

    # ---- the sums
    def _add_class(self, number: int, rows: Tensor, order: Tensor) -> None:
        import torch

        seen = self.counts[number] + torch.arange(len(rows), device=rows.device)
        away = rows - self.means[number]
        away -= (away.cumsum(0) - away) / seen.clamp(min=1)[:, None]  # each from the mean of all rows before it
        before = seen if self.config.covariance == "exact" else self.values["rows"] + order.double()
        self.scatter.addmm_((away * (before / (before + 1))[:, None]).T, away)
        super()._add_class(number, rows, order)

    def _fit(self, seed: int) -> None:
        import torch

        epsilon = self.config.shrinkage
        shrunk = (1 - epsilon) * self.scatter / self.values["rows"]
        shrunk.diagonal().add_(epsilon)
        upper, good = factor(shrunk)
        if not good:
            raise NonFiniteLoss(
                "slda head: the covariance has no inverse in float64; raise head.slda.shrinkage, or look at what makes "
                "the features so large"
            )
        weight = torch.cholesky_solve(self.means.T.contiguous(), upper, upper=True).T
        self.module.weight = weight.float().contiguous()
        self.module.bias = (-0.5 * (self.means * weight).sum(1)).float()

    def refresh(self, features: Tensor, labels: Tensor) -> None:
        import torch

        old = self._old_rows(*self._checked(features, labels))
        buffered = sum(len(rows) for _, rows in old)
        if buffered <= len(old):  # one row a class tells nothing of a covariance
            return super().refresh(features, labels)
        seen = float(self.counts[[number for number, _ in old]].sum())
        inner = torch.zeros_like(self.scatter)
        for number, rows in old:
            rows = rows.double()
            self.means[number] = rows.mean(0)
            inner.addmm_((rows - self.means[number]).T, rows - self.means[number])
        kept = 1 - seen / float(self.counts.sum())
        self.module.scatter = kept * self.scatter + (seen - len(old)) / (buffered - len(old)) * inner

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state_dict()
        return tensors | {"scatter": packed(tensors["scatter"])}, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors | {"scatter": unpacked(tensors["scatter"], self.width)}, values)
