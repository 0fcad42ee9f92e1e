"""DualGPM: the subspace of old layer inputs, kept as its basis or as that of its complement, whichever is smaller.

GPM (Saha et al. 2021) keeps a basis M of the directions that old inputs use. DualGPM (Liang and Li 2023, used by
InfLoRA) keeps the complement's basis as soon as M has more than half of the directions, and shrinks it from then on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Subspace(NamedTuple):
    """The span of old inputs.

    Attributes:
        basis: [d, m] orthonormal columns, m <= d / 2 after an update.
        retain: False if the basis spans the old inputs themselves ("remove"), True if it spans what they have left.
    """

    basis: Tensor
    retain: bool

    def outside(self, matrix: Tensor) -> Tensor:
        """The part of the columns of matrix [d, n] that is orthogonal to the old inputs."""
        basis = self.basis.to(matrix)
        inside = basis @ (basis.t() @ matrix)
        return inside if self.retain else matrix - inside

    def free(self) -> int:
        """How many directions old inputs have left."""
        return self.basis.shape[1] if self.retain else self.basis.shape[0] - self.basis.shape[1]


@torch.no_grad()
def update_subspace(old: Subspace | None, moment: Tensor, energy: float) -> Subspace | None:
    """Adds the inputs of one more experience to the subspace of old inputs.

    With C = Σ x xᵀ and the squared singular values of C as energy: at first the leading directions of C whose
    cumulative share stays below `energy`, at least one; later as many leading directions of the part of C outside as it
    takes to have `energy` of C inside, none if it is there already.

    Args:
        old: what earlier experiences span; None for the first one.
        moment: C [d, d] or any positive multiple of it.
        energy: share in (0, 1].
    Returns:
        The new subspace, in float32; `old` where no input was seen.
    Raises:
        ValueError: energy is out of its range, or the moment is not finite.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy: found {energy}; expected a share above 0 and at most 1")
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("moment: found a value that is not finite; the layer's inputs overflowed")
    exact = moment.double()
    total = exact.square().sum()
    if float(total) == 0:
        return old
    d = len(exact)
    left, sizes, _ = torch.linalg.svd(exact if old is None else old.outside(exact))
    shares = sizes.square() / total
    if old is None:
        number = max(1, int((shares.cumsum(0) < energy).sum()))
        basis, retain = left[:, :number], False
    else:
        inside = 1 - shares.sum()
        before = torch.cat([inside[None], inside + shares.cumsum(0)[:-1]])  # what is inside before each is added
        # Beyond the noise, where singular vectors may lie anywhere, nothing is left to add.
        number = int(((before < energy) & (sizes > _noise(exact))).sum())
        if number == 0:
            return old
        new, basis, retain = left[:, :number], old.basis.double().to(exact.device), old.retain
        if retain:
            rest = basis - new @ (new.t() @ basis)
            basis = torch.linalg.svd(rest, full_matrices=False).U[:, : max(0, basis.shape[1] - number)]
        else:
            basis = torch.linalg.qr(torch.cat([basis, new], 1)).Q
    if not retain and basis.shape[1] > d / 2:
        basis, retain = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :], True
    return Subspace(basis.float().contiguous(), retain)


@torch.no_grad()
def designed_rows(moment: Tensor, old: Subspace | None, rank: int) -> Tensor:
    """Down-projection along what new inputs have outside the old ones (InfLoRA): rows u_iᵀ / √3.

    u_i are the leading left singular vectors of C − M Mᵀ C. Rows for which the inputs have no direction left are zero,
    since a singular vector without a singular value may lie among the old inputs.

    Args:
        moment: C [d, d] of the new inputs, or any positive multiple of it. rank: r, at most d.
    Returns:
        [r, d] in float32, sign fixed by the largest entry of each row.
    Raises:
        ValueError: rank is out of its range, or the moment is not finite.
    """
    if not 1 <= rank <= len(moment):
        raise ValueError(f"rank: found {rank}; expected 1 to {len(moment)}")
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("moment: found a value that is not finite; the layer's inputs overflowed")
    exact = moment.double()
    left, sizes, _ = torch.linalg.svd(exact if old is None else old.outside(exact))
    rows = left[:, :rank].t()
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    rows = rows * torch.where(largest < 0, -1.0, 1.0) * (sizes[:rank, None] > _noise(exact))
    return (rows / 3**0.5).float()


def _noise(moment: Tensor) -> float:
    """Singular values up to here are rounding: the stored basis is float32, so is a batch's own product."""
    return float(torch.linalg.matrix_norm(moment)) * torch.finfo(torch.float32).eps
