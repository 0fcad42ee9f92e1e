"""Ridge head: streaming ridge regression on random ReLU features, in closed form. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ..errors import NonFiniteLoss
from ._fitted import BLOCK, DriftConfig, FittedHead, displacement, factor, joined, longer, packed, taken, unpacked
from ._head import register, seeded_generator

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("ridge")
class RidgeHead(FittedHead):
    """Streaming ridge regression on random features.

    z = relu(f̂ P), f̂ = f/‖f‖ [B, D], P [D, M] ~ N(0, 1) drawn once;  G = Σ z zᵀ [M, M], C = Σ z yᵀ [M, classes] with
    one-hot y;  W = (G + λI)⁻¹ C;  logits = z W. Sources: RAIL (Xu et al., NeurIPS 2024, primal form: unit-norm f, ReLU
    of a random map) and RanPAC (McDonnell et al., NeurIPS 2023: G and C summed over the stream, λ from a grid by
    the squared error on one fifth of each experience). The sums commute: the order of experiences does not matter, and
    nothing is forgotten as long as the features keep still.

    λ is chosen at the end of each experience: the held-aside rows are left out of G and C, the grid is walked downhill
    from the last λ, then the held-aside rows are added, and W is solved anew from all rows. One Cholesky factorisation
    and solution for each λ tried is cheaper than one eigendecomposition for all (two slow cores, 150 classes: 0.15 s
    against 1.3 s at M = 2000, 0.94 s against 11.7 s at M = 4000; a walk tries 3 once λ has settled).

    `recentre` is after Semantic Drift Compensation, in the space of z: with n_c rows of class c and δ_c the estimated
    drift of its mean z, C_c += n_c δ_c and G += Σ_c (C_c δ_cᵀ + δ_c C_cᵀ + n_c δ_c δ_cᵀ), C_c as before. That is exact
    if every z of class c moved by δ_c. Where row i moved by δ_c + e_i, C_c is off by no more than Σ ‖e_i‖, and G by no
    more than Σ (2 ‖z_i + δ_c‖ ‖e_i‖ + ‖e_i‖²). `refresh` replaces the part of each old class that has rows in the
    replay buffer by theirs, each row weighted with n_c / (buffered rows of c): exact where the buffer holds all of
    them. C of other old classes is kept, and of G their share of the rows, as G is not kept by class.

    State: G as its upper triangle, C (float64), W, P (float32), λ, with a correction the rows of each class; in the
    middle of a pass also the rows not yet summed. z is computed in float32, the sums in float64.
    Deviation from RanPAC: features of unit norm (its features are as the network gives them), so that one grid fits all
    hosts.
    """

    closed_form = True

    class Config(DriftConfig):
        features: int = Field(2000, ge=1)
        """Random features M. Memory and state grow with M², time with M³."""
        normalize: bool = True
        """Features to unit norm before the random map."""
        lambdas: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)
        """Ascending grid of λ."""
        start: float = Field(1.0, gt=0)
        """λ where the first search begins, and λ for good when nothing is held aside."""
        holdout: float = Field(0.2, ge=0, lt=1)
        """Share of each experience's rows held aside while λ is chosen; they are added to the sums afterwards."""
        max_holdout: int = Field(2000, ge=1)
        """Held-aside rows of one experience at the most: their features are kept until its end."""

        @field_validator("lambdas")
        @classmethod
        def _ascending(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
            if not grid or min(grid) <= 0 or list(grid) != sorted(set(grid)):
                raise ValueError("give positive, ascending values")
            return grid

    config: RidgeHead.Config
    _held: list[tuple[Tensor, Tensor]]

    # ---- shape
    def build(self, width: int, seed: int) -> nn.Module:
        import torch

        size = self.config.features
        self.width, self.seed, self.classes = width, seed, 0
        self.values = {"lambda": self.config.start, "chosen": False, "rows": 0, "pass": None}
        self.module = torch.nn.Module()
        projection = torch.randn(width, size, generator=seeded_generator(seed, width, size))
        self.module.register_buffer("projection", projection)
        self.module.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.module.register_buffer("cross", torch.zeros(size, 0, dtype=torch.float64))
        self.module.register_buffer("weight", torch.zeros(size, 0))
        if self.config.recentre is not None or self.config.refresh:
            self.module.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        self._close()
        return self.module

    def grow(self, classes: int) -> None:
        if classes <= self.classes:
            return
        import torch

        for name in ("cross", "weight"):
            old = self.module.get_buffer(name)
            new = old.new_zeros(old.shape[0], classes - self.classes)
            setattr(self.module, name, torch.cat([old, new], dim=1))
        if self._counts is not None:
            longer(self.module, "counts", classes)
        self.classes = classes

    @property
    def _gram(self) -> Tensor:
        return self.module.get_buffer("gram")

    @property
    def _cross(self) -> Tensor:
        return self.module.get_buffer("cross")

    @property
    def _counts(self) -> Tensor | None:
        """Rows of each class [classes], kept where sums are corrected."""
        return getattr(self.module, "counts", None)

    # ---- use
    def logits(self, features: Tensor) -> Tensor:
        import torch

        with torch.autocast(features.device.type, enabled=False):
            return self.random_features(features) @ self.module.get_buffer("weight")

    def random_features(self, features: Tensor) -> Tensor:
        """z [B, M] float32 of features [B, D]."""
        import torch

        features = features.float()
        if self.config.normalize:
            features = torch.nn.functional.normalize(features, dim=-1)
        return torch.relu(features @ self.module.get_buffer("projection"))

    @property
    def ridge(self) -> float:
        """λ of the present weights."""
        return self.values["lambda"]

    # ---- the pass over one experience
    def _open(self, rows: int, seed: int, seen: int) -> None:
        import torch

        super()._open(rows, seed, seen)
        count = min(round(self.config.holdout * rows), self.config.max_holdout)
        if self.config.holdout and not count and rows > 1:
            count = 1
        chosen = torch.randperm(rows, generator=seeded_generator(self.seed, seed, rows))[:count]
        self._aside = torch.zeros(rows, dtype=torch.bool)
        self._aside[chosen] = True

    def _close(self) -> None:
        super()._close()
        self._held = []

    def _take(self, features: Tensor, labels: Tensor) -> None:
        import torch

        seen = self.values["pass"]["seen"]
        aside = torch.zeros(len(labels), dtype=torch.bool)
        # Rows beyond the announced number are all fitted.
        known = self._aside[seen : seen + len(labels)]
        aside[: len(known)] = known
        aside = aside.to(features.device)
        if aside.any():
            self._held.append((features[aside], labels[aside]))
        super()._take(features[~aside], labels[~aside])

    def _last_rows(self) -> None:
        if self._held:
            features, labels = joined(self._held)
            if self.started:
                self.values["lambda"], self.values["chosen"] = self._choose(features, labels), True
            self._waiting, self._held = [(features, labels)], []
            self._flush(1)

    def _fit(self, seed: int) -> None:
        # Row-major like a loaded one: another layout takes another kernel, with other roundings.
        self.module.weight = self._solve(self.ridge).float().contiguous()

    def _add(self, features: Tensor, labels: Tensor) -> None:
        import torch

        z = self.random_features(features).double()
        self._gram.addmm_(z.T, z)
        # A product, not index_add_: the same sum on every device in every run.
        target = torch.nn.functional.one_hot(labels, self.classes).double()
        self._cross.addmm_(z.T, target)
        if self._counts is not None:
            self._counts.add_(target.sum(0))

    # ---- sums that have gone stale
    def recentre(self, after: Tensor) -> None:
        assert self.before is not None and self.config.recentre is not None and self._counts is not None
        old, counts = self._counts > 0, self._counts
        means = (self._cross[:, old] / counts[old]).T
        before, after = (self.random_features(each.to(self.device)) for each in (self.before, after))
        shift = self._cross.new_zeros(self._cross.shape)
        shift[:, old] = displacement(means, before, after, self.config.recentre.sigma).T
        turned = self._cross @ shift.T
        self._gram.add_(turned + turned.T + (shift * counts) @ shift.T)
        self._cross.add_(shift * counts)

    def refresh(self, features: Tensor, labels: Tensor) -> None:
        import torch

        assert self._counts is not None
        features, labels = self._checked(features, labels)
        here = torch.bincount(labels, minlength=self.classes).double()
        fresh = (here > 0) & (self._counts > 0)
        weights = torch.where(fresh, self._counts / here.clamp(min=1), 0.0)
        self._gram.mul_(1 - self._counts[fresh].sum() / self._counts.sum())
        self._cross[:, fresh] = 0.0
        for start in range(0, len(labels), BLOCK):
            rows, ids = features[start : start + BLOCK], labels[start : start + BLOCK]
            z = self.random_features(rows).double()
            weighted = z * weights[ids][:, None]
            self._gram.addmm_(weighted.T, z)
            self._cross.addmm_(weighted.T, torch.nn.functional.one_hot(ids, self.classes).double())

    # ---- solving
    def _factor(self, ridge: float) -> tuple[Tensor, bool]:
        gram = self._gram.clone()
        gram.diagonal().add_(ridge)
        return factor(gram)

    def _solve(self, ridge: float) -> Tensor:
        """W [M, classes] float64; λ rises tenfold where G + λI is not positive definite in float64.

        Raises:
            NonFiniteLoss: the sums have overflowed, so that no λ helps.
        """
        import torch

        diagonal = self._gram.diagonal()  # no entry of G is larger than the largest of these
        while math.isfinite(ridge) and bool(torch.isfinite(diagonal).all()):
            upper, good = self._factor(ridge)
            if good:
                self.values["lambda"] = ridge
                return torch.cholesky_solve(self._cross, upper, upper=True)
            ridge *= 10
        raise NonFiniteLoss(
            "ridge head: the sums over the features are no longer finite; set head.ridge.normalize to true, or look at "
            "what makes the features so large"
        )

    def _error(self, ridge: float, z: Tensor, target: Tensor) -> float:
        """Mean squared error of held-aside rows z [R, M], target [R, classes]; infinite where there is no solution."""
        import torch

        upper, good = self._factor(ridge)
        if not good:
            return float("inf")
        cross = self._cross
        # Solve for the narrower side of zᵀ (G + λI)⁻¹ C.
        if len(z) < cross.shape[1]:
            predicted = torch.cholesky_solve(z.T.contiguous(), upper, upper=True).T @ cross
        else:
            predicted = z @ torch.cholesky_solve(cross, upper, upper=True)
        return float((predicted - target).square().mean())

    def _choose(self, features: Tensor, labels: Tensor) -> float:
        import torch

        grid = self.config.lambdas
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            z = self.random_features(features).double()
        target = torch.nn.functional.one_hot(labels, self.classes).double()
        errors: dict[int, float] = {}

        def error(i: int) -> float:
            if not 0 <= i < len(grid):
                return float("inf")
            if i not in errors:
                errors[i] = self._error(grid[i], z, target)
            return errors[i]

        at = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / self.ridge)))
        # On a tie the larger λ: it is the smoother solution.
        while True:
            best = min((at + 1, at, at - 1), key=error)
            if error(best) == float("inf"):
                return grid[-1]
            if best == at:
                return grid[at]
            at = best

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As the base; `gram` is the upper triangle, row after row [M (M + 1) / 2]."""
        tensors, values = super().state_dict()
        tensors["gram"] = packed(tensors["gram"])
        if self._held:
            tensors["held_features"], tensors["held_labels"] = joined(self._held)
        return tensors, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        tensors = dict(tensors)
        held = taken(tensors, "held", self.device)
        tensors["gram"] = unpacked(tensors["gram"], tensors["projection"].shape[1])
        super().load_state_dict(tensors, values)
        self._held = held
