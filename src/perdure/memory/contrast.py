"""Where new inputs differ from old ones: directions from two second moments and no stored example.

The quotient (vᵀ S_new v) / (vᵀ S_old v) says how much more energy inputs have along v now than before. Its largest
values belong to the leading generalised eigenvectors of the pair, the subspace of common spatial patterns and of
linear discriminants (Fukunaga 1990; from memory). Keys along them answer new inputs and hardly old ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def contrast_directions(
    new: Tensor, old: Tensor, count: int, *, shrink: float = 0.01, iterations: int = 30
) -> Tensor | None:
    """The `count` directions with the most energy in new inputs for that in old ones.

    Generalised eigenvectors of (S_new, S_old + shrink · mean eigenvalue of S_old · I), by subspace iteration on the
    whitened S_new from a fixed start: a function of its inputs alone. The part added to S_old keeps directions that no
    input ever used from winning. Scales of the two moments do not matter.

    Args:
        new, old: second moments Σ x xᵀ [d, d].
        count: at most d.
    Returns:
        [count, d] in float64, rows of unit norm in falling order of the quotient; None where old inputs were all zero
        or new ones are.
    Raises:
        ValueError: the shapes differ, count is not in 1..d, shrink is not positive, or a moment is not finite.
    """
    d = old.shape[0]
    if new.shape != old.shape or old.shape != (d, d):
        raise ValueError(f"new: found shape {tuple(new.shape)} beside {tuple(old.shape)}; expected two square ones")
    if not 1 <= count <= d:
        raise ValueError(f"count: found {count}; expected 1 to {d}")
    if not shrink > 0:
        raise ValueError(f"shrink: found {shrink}; must be above 0")
    a, b = (((m + m.t()) / 2).to(torch.float64) for m in (new, old))
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("new, old: found a value that is not finite; the layer's inputs overflowed")
    size = b.trace() / d
    if float(size) <= 0 or float(a.trace()) <= 0:
        return None
    eye = torch.eye(d, dtype=b.dtype, device=b.device)
    root = torch.linalg.cholesky(b / size + shrink * eye)
    a = a / (a.trace() / d)

    def whitened(v: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(root.t(), v, upper=True)
        return torch.linalg.solve_triangular(root, a @ inner, upper=False)

    generator = torch.Generator().manual_seed(0)
    width = min(d, count + 8)  # more than asked for, so that the last of them settles too
    v = torch.randn(d, width, generator=generator, dtype=b.dtype).to(b.device)
    for _ in range(iterations):
        v, _ = torch.linalg.qr(whitened(v))
    values, rotation = torch.linalg.eigh(v.t() @ whitened(v))
    chosen = (v @ rotation).flip(1)[:, :count]
    found = torch.linalg.solve_triangular(root.t(), chosen, upper=True)
    found = found / found.norm(dim=0, keepdim=True)
    largest = found.abs().argmax(0, keepdim=True)
    return (found * torch.where(found.gather(0, largest) < 0, -1.0, 1.0)).t().contiguous()


def paired(directions: Tensor, count: int) -> Tensor:
    """Each direction and its opposite, [count, d]: scores are signed, and inputs lie on both sides."""
    return torch.stack([directions, -directions], 1).flatten(0, 1)[:count]
