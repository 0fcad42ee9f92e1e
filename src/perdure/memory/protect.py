"""Keeps new keys out of the directions that old inputs use, from second moments and no stored example.

An atom whose key is orthogonal to x has response a . x = 0 and writes nothing. Keys (or the down-projections of any
low-rank adapter) in the null space of the leading eigenvectors of sum x x^T therefore leave old inputs nearly
untouched. (GPM, Saha et al. 2021, and InfLoRA, Liang and Li 2024, protect by the same subspace.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class InputMoments(nn.Module):
    """Running sum of x x^T and the number of x, for the inputs of one layer.

    Args:
        features: d.
        dtype: precision of the sum over batches; float64 by default, because a sum over a stream loses small
            directions in float32. A batch's own product has the precision of the inputs, at least float32.
    Attributes:
        moment: [d, d] buffer. count: float64 scalar buffer.
    """

    moment: Tensor
    count: Tensor

    def __init__(self, features: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None):
        super().__init__()
        if features < 1:
            raise ValueError(f"features: found {features}; at least 1 is needed")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: found {dtype}; sums need torch.float32 or torch.float64")
        self.features = features
        self.register_buffer("moment", torch.zeros(features, features, dtype=dtype, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Adds inputs x [..., d]; with mask [...] bool only those where it is True.

        Raises:
            ValueError: the last dimension is not d, or the mask does not fit.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"x: found {x.shape[-1]} features; expected {self.features}")
        rows = x.reshape(-1, self.features)
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"mask: found shape {tuple(mask.shape)}; expected {tuple(x.shape[:-1])}")
            rows = rows[mask.reshape(-1)]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        with torch.autocast(device_type=rows.device.type, enabled=False):
            # One batch's product in the inputs' precision (at least float32), the sum over batches in the moment's.
            self.moment += (rows.t() @ rows).to(self.moment)
        self.count += rows.shape[0]

    @torch.no_grad()
    def merge(self, other: InputMoments) -> None:
        """Adds what another one has seen: sums over disjoint data are exact."""
        self.moment += other.moment.to(self.moment)
        self.count += other.count.to(self.count)

    def basis(self, energy: float, reserve: int = 1) -> Tensor:
        """`leading_basis` of what was seen; [d, 0] before anything was."""
        return leading_basis(self.moment, energy, reserve)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputMoments:
        # A model that is cast to half precision must not take its statistics along.
        moment, count = self.moment, self.count
        super()._apply(fn, recurse)
        self.moment, self.count = moment.to(self.moment.device), count.to(self.count.device)
        return self


@torch.no_grad()
def leading_basis(moment: Tensor, energy: float, reserve: int = 1) -> Tensor:
    """The fewest leading eigenvectors of a second moment that hold a share of its trace.

    Args:
        moment: [d, d], symmetric positive semi-definite up to rounding (it is symmetrised here).
        energy: share of the trace, in (0, 1).
        reserve: directions that always stay free, the least used ones: with a flat spectrum the share could ask for
            all d, and new keys would be projected to nothing. 0 allows that.
    Returns:
        [d, q] orthonormal columns in falling order of eigenvalue, sign fixed by the largest entry, q <= d - reserve;
        q = 0 for a zero moment. In the moment's dtype, decomposed in its precision (float32 at least).
    Raises:
        ValueError: a value is out of its range, or the moment is not finite.
    """
    if not 0 < energy < 1:
        raise ValueError(f"energy: found {energy}; expected a share between 0 and 1, both excluded")
    d = moment.shape[0]
    if not 0 <= reserve <= d:
        raise ValueError(f"reserve: found {reserve}; expected 0 to {d}")
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("moment: found a value that is not finite; the layer's inputs overflowed")
    exact = moment.to(torch.promote_types(moment.dtype, torch.float32))
    eigenvalues, vectors = torch.linalg.eigh((exact + exact.t()) / 2)
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0.0), vectors.flip(1)
    total = eigenvalues.sum()
    if float(total) <= 0:
        return moment.new_zeros(d, 0)
    share = eigenvalues.cumsum(0) / total
    q = min(int((share < energy).sum()) + 1, d - reserve)
    chosen = vectors[:, :q]
    if q:
        largest = chosen.abs().argmax(0, keepdim=True)
        chosen = chosen * torch.where(chosen.gather(0, largest) < 0, -1.0, 1.0)
    return chosen.to(moment.dtype).contiguous()


def project(keys: Tensor, basis: Tensor) -> Tensor:
    """keys - (keys U) U^T: the part of each row that is orthogonal to the basis.

    Differentiable in the keys. Applied twice it changes nothing more, up to rounding. If the basis spans all d
    directions (possible only with `reserve=0`), the result is exactly zero: such items never answer and never learn.

    Args:
        keys: [r, d], rows of keys or of a down-projection. basis: U [d, q] with orthonormal columns.
    Returns:
        [r, d] in the keys' dtype, computed in the wider of the two.
    Raises:
        ValueError: the widths differ.
    """
    if keys.shape[-1] != basis.shape[0]:
        raise ValueError(f"basis: found {basis.shape[0]} features; the keys have {keys.shape[-1]}")
    if basis.shape[1] == 0:
        return keys
    if basis.shape[1] >= basis.shape[0]:
        return keys * 0.0
    dtype = torch.promote_types(keys.dtype, basis.dtype)
    with torch.autocast(device_type=keys.device.type, enabled=False):
        wide, u = keys.to(dtype), basis.to(dtype)
        return (wide - (wide @ u) @ u.t()).to(keys.dtype)


def overlap(keys: Tensor, old: Tensor) -> Tensor:
    """Σ_jk |old_j . key_k|, the entrywise L1 norm of A_old Aᵀ (O-LoRA): a scalar, 0 where the rows are orthogonal.

    Computed in float32 at least, also under autocast. Gradients reach `old` only where it asks for them.

    Args:
        keys: A [r, d]. old: A_old [n, d]; n may be 0.
    Raises:
        ValueError: the widths differ.
    """
    if keys.shape[-1] != old.shape[-1]:
        raise ValueError(f"old: found {old.shape[-1]} features; the keys have {keys.shape[-1]}")
    dtype = torch.promote_types(torch.promote_types(keys.dtype, old.dtype), torch.float32)
    with torch.autocast(device_type=keys.device.type, enabled=False):
        return (old.to(dtype) @ keys.to(dtype).t()).abs().sum()


def free_directions(basis: Tensor) -> int:
    """d - q: how many directions new keys still have."""
    return basis.shape[0] - basis.shape[1]
