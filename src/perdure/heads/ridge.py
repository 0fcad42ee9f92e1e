"""Ridge head: streaming ridge regression on random ReLU features, in closed form. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ..config import HeadConfig
from ..errors import NonFiniteLoss
from ._head import Head, register, seeded_generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BLOCK = 512
"""Rows per rank update of the statistics. Blocks, not batches, so that the sums do not depend on the batch size."""


@register("ridge")
class RidgeHead(Head):
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

    State: G as its upper triangle, C (float64), W, P (float32), λ; in the middle of a pass also the rows not yet
    summed. z is computed in float32, the sums in float64.
    Deviation from RanPAC: features of unit norm (its features are as the network gives them), so that one grid fits all
    hosts.
    """

    closed_form = True

    class Config(HeadConfig):
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
    _waiting: list[tuple[Tensor, Tensor]]

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
        self.classes = classes

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
    def begin_fit(self, rows: int, seed: int) -> None:
        self._close()
        self._open(rows, seed, 0)

    def _open(self, rows: int, seed: int, seen: int) -> None:
        import torch

        self.values["pass"] = {"rows": rows, "seed": seed, "seen": seen}
        count = min(round(self.config.holdout * rows), self.config.max_holdout)
        if self.config.holdout and not count and rows > 1:
            count = 1
        chosen = torch.randperm(rows, generator=seeded_generator(self.seed, seed, rows))[:count]
        self._aside = torch.zeros(rows, dtype=torch.bool)
        self._aside[chosen] = True

    def _close(self) -> None:
        self.values["pass"] = None
        self._held, self._waiting = [], []

    def update(self, features: Tensor, labels: Tensor) -> None:
        import torch

        state = self.values["pass"]
        if state is None:
            raise RuntimeError("ridge head: update outside a pass; call begin_fit first")
        device = self.module.get_buffer("gram").device
        features, labels = features.detach().float().to(device), labels.to(device)
        real = labels != -100
        features, labels = features[real], labels[real]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise RuntimeError(
                f"ridge head: label {int(labels.max())} with room for {self.classes} classes; call grow first"
            )
        if not torch.isfinite(features).all():
            raise NonFiniteLoss(
                "ridge head: features hold NaN or infinity; the statistics were not touched by this batch"
            )
        aside = torch.zeros(len(labels), dtype=torch.bool)
        # Rows beyond the announced number are all fitted.
        known = self._aside[state["seen"] : state["seen"] + len(labels)]
        aside[: len(known)] = known
        aside = aside.to(device)
        state["seen"] += len(labels)
        if aside.any():
            self._held.append((features[aside], labels[aside]))
        self._waiting.append((features[~aside], labels[~aside]))
        self._flush(BLOCK)

    def end_fit(self) -> None:
        if self.values["pass"] is None:
            raise RuntimeError("ridge head: end_fit outside a pass; call begin_fit first")
        self._flush(1)
        if self._held:
            features, labels = _join(self._held)
            if self.values["rows"]:
                self.values["lambda"], self.values["chosen"] = self._choose(features, labels), True
            self._waiting, self._held = [(features, labels)], []
            self._flush(1)
        self._close()
        if self.values["rows"]:
            # Row-major like a loaded one: another layout takes another kernel, with other roundings.
            self.module.weight = self._solve(self.ridge).float().contiguous()

    def _flush(self, least: int) -> None:
        """Sums waiting rows in blocks, until fewer than `least` wait."""
        if sum(len(labels) for _, labels in self._waiting) < least:
            return
        features, labels = _join(self._waiting)
        while len(labels) >= least:
            self._add(features[:BLOCK], labels[:BLOCK])
            features, labels = features[BLOCK:], labels[BLOCK:]
        self._waiting = [(features.clone(), labels.clone())] if len(labels) else []

    def _add(self, features: Tensor, labels: Tensor) -> None:
        import torch

        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            z = self.random_features(features).double()
            self.module.get_buffer("gram").addmm_(z.T, z)
            # A product, not index_add_: the same sum on every device in every run.
            target = torch.nn.functional.one_hot(labels, self.classes).double()
            self.module.get_buffer("cross").addmm_(z.T, target)
        self.values["rows"] += len(labels)

    # ---- solving
    def _factor(self, ridge: float) -> tuple[Tensor, bool]:
        import torch

        gram = self.module.get_buffer("gram").clone()
        gram.diagonal().add_(ridge)
        # Only the upper triangle is read: it is what the state keeps.
        factor, info = torch.linalg.cholesky_ex(gram, upper=True)
        return factor, not bool(info)

    def _solve(self, ridge: float) -> Tensor:
        """W [M, classes] float64; λ rises tenfold where G + λI is not positive definite in float64.

        Raises:
            NonFiniteLoss: the sums have overflowed, so that no λ helps.
        """
        import torch

        diagonal = self.module.get_buffer("gram").diagonal()  # no entry of G is larger than the largest of these
        while math.isfinite(ridge) and bool(torch.isfinite(diagonal).all()):
            factor, good = self._factor(ridge)
            if good:
                self.values["lambda"] = ridge
                return torch.cholesky_solve(self.module.get_buffer("cross"), factor, upper=True)
            ridge *= 10
        raise NonFiniteLoss(
            "ridge head: the sums over the features are no longer finite; set head.ridge.normalize to true, or look at "
            "what makes the features so large"
        )

    def _error(self, ridge: float, z: Tensor, target: Tensor) -> float:
        """Mean squared error of held-aside rows z [R, M], target [R, classes]; infinite where there is no solution."""
        import torch

        factor, good = self._factor(ridge)
        if not good:
            return float("inf")
        cross = self.module.get_buffer("cross")
        # Solve for the narrower side of zᵀ (G + λI)⁻¹ C.
        if len(z) < cross.shape[1]:
            predicted = torch.cholesky_solve(z.T.contiguous(), factor, upper=True).T @ cross
        else:
            predicted = z @ torch.cholesky_solve(cross, factor, upper=True)
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
        import torch

        tensors = dict(self.module.state_dict())
        gram = tensors["gram"]
        tensors["gram"] = torch.cat([gram[i, i:] for i in range(len(gram))])
        for name in ("held", "waiting"):
            pairs = getattr(self, f"_{name}")
            if pairs:
                tensors[f"{name}_features"], tensors[f"{name}_labels"] = _join(pairs)
        values = {key: dict(v) if isinstance(v, dict) else v for key, v in self.values.items()}
        return tensors, {"classes": self.classes, "values": values}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        import torch

        tensors = dict(tensors)
        pairs = {}
        device = self.module.get_buffer("gram").device
        for name in ("held", "waiting"):
            features, labels = tensors.pop(f"{name}_features", None), tensors.pop(f"{name}_labels", None)
            pairs[name] = [] if features is None or labels is None else [(features.to(device), labels.to(device))]
        packed = tensors["gram"]
        size = tensors["projection"].shape[1]
        gram = torch.zeros(size, size, dtype=packed.dtype, device=packed.device)
        start = 0
        for i in range(size):
            gram[i, i:] = packed[start : start + size - i]
            start += size - i
        tensors["gram"] = torch.triu(gram, 1).T + gram
        super().load_state_dict(tensors, values)
        opened = self.values.get("pass")
        self._close()
        if opened is not None:
            self._open(opened["rows"], opened["seed"], opened["seen"])
            self._held, self._waiting = pairs["held"], pairs["waiting"]


def _join(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.cat([features for features, _ in pairs]), torch.cat([labels for _, labels in pairs])
