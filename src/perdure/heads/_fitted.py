"""Heads that are fitted to statistics of features in a pass at each experience's end. Imports no torch.

What they share: the pass, summed in blocks of rows, and two remedies for statistics that an adapter has made stale.

Recentring, after Semantic Drift Compensation (Yu et al., CVPR 2020, arXiv 2004.00440; formula as in the released code):
with z_i, z'_i the features of row i of the current experience before and after learning it, a class mean μ moves by

    δ(μ) = Σ_i w_i (z'_i − z_i) / Σ_i w_i,   w_i = exp(−‖z_i − μ‖² / (2 σ²)).

That every row of a class moves by δ is the model; the drift of old classes is not seen, so this is an estimate.
Deviations: SDC has features of unit norm and σ in their unit (0.3 in the released script), here σ is a multiple of the
spread √(mean_i ‖z_i − z̄‖²), so that one value fits all hosts; no more than `rows` rows are compared; where all weights
would underflow, which is 0/0 there, the nearest rows count.

Refreshing (ours): statistics of old classes are taken anew from the rows in the replay buffer, under the features of
now. A class without a row there keeps its old ones.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import HeadConfig, Strict
from ..errors import NonFiniteLoss
from ._head import Head

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BLOCK = 512
"""Rows per update of the statistics. Blocks, not batches, so that the sums do not depend on the batch size."""


class RecentreConfig(Strict):
    """Moves the statistics of old classes by the drift that the current experience's rows show."""

    sigma: float = Field(0.3, gt=0)
    """σ of the Gaussian weights, in units of the spread of the rows' features before learning."""
    rows: int = Field(2000, ge=1)
    """Rows of an experience that are compared, drawn at random; their features are kept while it is learnt."""


class DriftConfig(HeadConfig):
    """Settings of heads whose statistics may go stale."""

    recentre: RecentreConfig | None = None
    """Move the statistics of old classes by the drift estimated on the current experience's rows; two counted passes
    over them."""
    refresh: bool = False
    """Take the statistics of old classes anew from the replay buffer after each experience; one counted pass over it.
    Needs a method that rehearses."""


class FittedHead(Head):
    """The pass at an experience's end: `_add` sums a block, `_fit` makes weights of the sums."""

    fits = True
    before: Tensor | None
    """Features [R, D] of rows of the current experience before it was learnt, while they wait for those after it."""
    _waiting: list[tuple[Tensor, Tensor]]

    def __init__(self, config: Any):
        super().__init__(config)
        self.before = None

    # ---- what a head gives
    @abstractmethod
    def _add(self, features: Tensor, labels: Tensor) -> None:
        """Adds a block of rows (features [B, D], labels [B]) to the sums; `values["rows"]` counts those before it."""

    @abstractmethod
    def _fit(self, seed: int) -> None:
        """Makes weights of the sums; `seed` is that of the pass."""

    def recentre(self, after: Tensor) -> None:
        """Moves the sums of old classes by the drift from `before` to `after` [R, D]."""

    def refresh(self, features: Tensor, labels: Tensor) -> None:
        """Takes the sums of old classes anew from rows of the replay buffer."""

    # ---- what the loop asks
    @property
    def recentre_rows(self) -> int:
        """Rows to compare before and after learning; 0 for none."""
        recentre = getattr(self.config, "recentre", None)
        return 0 if recentre is None else recentre.rows

    @property
    def refreshes(self) -> bool:
        return getattr(self.config, "refresh", False)

    @property
    def started(self) -> bool:
        """Whether there are statistics that could go stale."""
        return self.values["rows"] > 0

    @property
    def device(self) -> torch.device:
        return next(self.module.buffers()).device

    # ---- the pass over one experience
    def begin_fit(self, rows: int, seed: int) -> None:
        self._close()
        self._open(rows, seed, 0)

    def _open(self, rows: int, seed: int, seen: int) -> None:
        self.values["pass"] = {"rows": rows, "seed": seed, "seen": seen}

    def _close(self) -> None:
        self.values["pass"] = None
        self._waiting = []

    def update(self, features: Tensor, labels: Tensor) -> None:
        state = self._pass("update")
        features, labels = self._checked(features, labels)
        self._take(features, labels)
        state["seen"] += len(labels)

    def _pass(self, what: str) -> dict[str, int]:
        state = self.values["pass"]
        if state is None:
            raise RuntimeError(f"{self.name} head: {what} outside a pass; call begin_fit first")
        return state

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that count, on the head's device.

        Raises:
            NonFiniteLoss: a feature is not finite.
        """
        import torch

        features, labels = features.detach().float().to(self.device), labels.to(self.device)
        real = labels != -100
        features, labels = features[real], labels[real]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise RuntimeError(
                f"{self.name} head: label {int(labels.max())} with room for {self.classes} classes; call grow first"
            )
        if not torch.isfinite(features).all():
            raise NonFiniteLoss(
                f"{self.name} head: features hold NaN or infinity; the statistics were not touched by this batch"
            )
        return features, labels

    def _take(self, features: Tensor, labels: Tensor) -> None:
        self._waiting.append((features, labels))
        self._flush(BLOCK)

    def end_fit(self) -> None:
        seed = self._pass("end_fit")["seed"]
        self._flush(1)
        self._last_rows()
        self._close()
        if self.started:
            self._fit(seed)

    def _last_rows(self) -> None:
        """All announced rows were taken; adds what was kept aside."""

    def _flush(self, least: int) -> None:
        """Adds waiting rows in blocks, until fewer than `least` wait."""
        import torch

        if sum(len(labels) for _, labels in self._waiting) < least:
            return
        features, labels = joined(self._waiting)
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            while len(labels) >= least:
                self._add(features[:BLOCK], labels[:BLOCK])
                self.values["rows"] += len(labels[:BLOCK])
                features, labels = features[BLOCK:], labels[BLOCK:]
        self._waiting = [(features.clone(), labels.clone())] if len(labels) else []

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As the base, with rows that wait for their block and features that wait for those after learning."""
        tensors = dict(self.module.state_dict())
        if self._waiting:
            tensors["waiting_features"], tensors["waiting_labels"] = joined(self._waiting)
        if self.before is not None:
            tensors["before"] = self.before
        values = {key: dict(v) if isinstance(v, dict) else v for key, v in self.values.items()}
        return tensors, {"classes": self.classes, "values": values}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        tensors = dict(tensors)
        self.before = tensors.pop("before", None)
        waiting = taken(tensors, "waiting", self.device)
        super().load_state_dict(tensors, values)
        opened = self.values.get("pass")
        self._close()
        if opened is not None:
            self._open(opened["rows"], opened["seed"], opened["seen"])
            self._waiting = waiting


class ClassMeansHead(FittedHead):
    """Running means μ_c [C, D] and counts n_c [C], both float64.

    Without an adapter that moves the features they are those of all rows seen: μ += Σ (x − μ) / (n + rows).
    """

    def build(self, width: int, seed: int) -> nn.Module:
        import torch

        self.width, self.seed, self.classes = width, seed, 0
        self.module = torch.nn.Module()
        self._build_statistics()
        return self.module

    def _build_statistics(self) -> None:
        import torch

        self.values = {"rows": 0, "pass": None}
        self.module.register_buffer("means", torch.zeros(0, self.width, dtype=torch.float64))
        self.module.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        self._close()

    def grow(self, classes: int) -> None:
        if classes > self.classes:
            self._grow_statistics(classes)
            self.classes = classes

    def _grow_statistics(self, classes: int) -> None:
        for name in ("means", "counts"):
            longer(self.module, name, classes)

    @property
    def means(self) -> Tensor:
        return self.module.get_buffer("means")

    @property
    def counts(self) -> Tensor:
        return self.module.get_buffer("counts")

    def among_known(self, scores: Tensor) -> Tensor:
        """Scores [B, C] in which a class without a row loses against every other."""
        import torch

        return torch.where(self.counts > 0, scores, torch.finfo(scores.dtype).min)

    def _add(self, features: Tensor, labels: Tensor) -> None:
        features = features.double()
        for number in labels.unique().tolist():
            mine = (labels == number).nonzero().flatten()
            self._add_class(number, features[mine], mine)

    def _add_class(self, number: int, rows: Tensor, order: Tensor) -> None:
        """Adds rows [n, D] of one class, which are the rows `order` [n] of the block."""
        self.means[number] += (rows - self.means[number]).sum(0) / (self.counts[number] + len(rows))
        self.counts[number] += len(rows)

    def recentre(self, after: Tensor) -> None:
        assert self.before is not None
        old = self.counts > 0
        before, after = self.before.to(self.device), after.to(self.device)
        self.means[old] += displacement(self.means[old], before, after, self.config.recentre.sigma)

    def refresh(self, features: Tensor, labels: Tensor) -> None:
        for number, rows in self._old_rows(*self._checked(features, labels)):
            self.means[number] = rows.double().mean(0)

    def _old_rows(self, features: Tensor, labels: Tensor) -> list[tuple[int, Tensor]]:
        """(class, its rows) of classes of which there are statistics."""
        return [(n, features[labels == n]) for n in labels.unique().tolist() if self.counts[n] > 0]


def displacement(points: Tensor, before: Tensor, after: Tensor, sigma: float) -> Tensor:
    """How far points [C, D] of the old feature space have moved [C, D], by rows [R, D] before and after."""
    import torch

    before, after, points = before.double(), after.double(), points.double()
    centre = before.mean(0)
    near, points = before - centre, points - centre
    spread = near.square().sum(1).mean().clamp(min=torch.finfo(torch.float64).tiny)
    # ‖z − μ‖² less ‖μ‖², which is the same for all rows; softmax is w / Σ w without an underflow.
    distance = near.square().sum(1) - 2 * points @ near.T
    return torch.softmax(-distance / (2 * sigma**2 * spread), dim=1) @ (after - before)


def longer(module: nn.Module, name: str, classes: int) -> None:
    """Gives a buffer whose first dimension is the classes room for `classes`, with zeros for the new ones."""
    import torch

    old = module.get_buffer(name)
    setattr(module, name, torch.cat([old, old.new_zeros(classes - len(old), *old.shape[1:])]))


def joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    import torch

    return torch.cat([features for features, _ in pairs]), torch.cat([labels for _, labels in pairs])


def taken(tensors: dict[str, Tensor], name: str, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Takes rows that were waiting out of a state."""
    features, labels = tensors.pop(f"{name}_features", None), tensors.pop(f"{name}_labels", None)
    return [] if features is None or labels is None else [(features.to(device), labels.to(device))]


def packed(square: Tensor) -> Tensor:
    """The upper triangle [..., M (M + 1) / 2] of symmetric matrices [..., M, M], row after row."""
    import torch

    return torch.cat([square[..., i, i:] for i in range(square.shape[-1])], dim=-1)


def unpacked(flat: Tensor, size: int) -> Tensor:
    """Symmetric matrices [..., size, size] of what `packed` gave."""
    import torch

    upper = flat.new_zeros(*flat.shape[:-1], size, size)
    start = 0
    for i in range(size):
        upper[..., i, i:] = flat[..., start : start + size - i]
        start += size - i
    return torch.triu(upper, 1).transpose(-1, -2) + upper


def factor(square: Tensor) -> tuple[Tensor, bool]:
    """U with UᵀU = `square`, and whether it is positive definite. Only the upper triangle is read: it is the state."""
    import torch

    upper, info = torch.linalg.cholesky_ex(square, upper=True)
    return upper, not bool(info)
