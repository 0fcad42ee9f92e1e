"""Low-rank directions and their magnitudes, kept apart, beside a linear map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .low_rank import LowRankBranches


class Magnitudes(nn.Module):
    """One magnitude for each write, as many maps may share.

    Attributes:
        alpha: [t], trained. writes: int64 [t], the write that each belongs to, rising.
    """

    writes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(0))
        self.register_buffer("writes", torch.empty(0, dtype=torch.int64))

    def of(self, owners: Tensor) -> Tensor:
        """The magnitude of each owner [n]; every one must have one."""
        return self.alpha[torch.searchsorted(self.writes, owners)]

    def add(self, write: int, value: float) -> None:
        """A magnitude for `write`, if it has none."""
        if not bool((self.writes == write).any()):
            self._set(torch.cat([self.alpha.detach(), self.alpha.new_full((1,), value)]))
            self.writes = torch.cat([self.writes, self.writes.new_full((1,), write)])

    def drop(self, write: int) -> None:
        """Takes out the magnitude of `write`; a second call does nothing."""
        kept = self.writes != write
        if not bool(kept.all()):
            self._set(self.alpha.detach()[kept])
            self.writes = self.writes[kept]

    def _set(self, alpha: Tensor) -> None:
        self.alpha = nn.Parameter(alpha, requires_grad=self.alpha.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}alpha")
        if found is not None and found.shape != self.alpha.shape:
            self._set(self.alpha.detach().new_empty(found.shape))
            self.writes = self.writes.new_empty(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Directions(LowRankBranches):
    """dy = Σ_{k<t} α_k B̂_k Â_k x + α_t B_t A_t x with Â_k = A_k / ‖A_k‖_F, B̂_k = B_k / ‖B_k‖_F (SD-LoRA).

    Args:
        magnitudes: α, of this map alone or shared with others.
    """

    def __init__(self, in_features: int, out_features: int, magnitudes: Magnitudes, *, site: str = ""):
        super().__init__(in_features, out_features, site=site)
        self.magnitudes = magnitudes

    def gates(self) -> Tensor:
        return self.magnitudes.of(self.bank.owners)

    @torch.no_grad()
    def normalise(self) -> Tensor:
        """Makes the branch that trains an old direction; returns ‖A_t‖_F ‖B_t‖_F, 0 if it never learnt and goes."""
        bank = self.bank
        norms = [torch.linalg.vector_norm(part) for part in (bank.new_keys, bank.new_values)]
        for part, norm in zip((bank.new_keys, bank.new_values), norms, strict=True):
            part.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))
        bank.freeze()
        return norms[0] * norms[1]
