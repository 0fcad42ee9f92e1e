"""Gated rank-1 components beside a linear map while they train, and those of the past that its weight has taken in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..memory.bank import AtomBank
from ..memory.effects import gated_low_rank


class GatedComponents(nn.Module):
    """dy = Σ_i g_i (a_i . x) b_i over the components that train (CoDyRA).

    Old components answer nothing here: they are in the host's weight. The bank keeps them, gates folded into their
    values, so that this weight can be computed from the original one at any time.

    Args:
        in_features, out_features: d_in, d_out of the linear map.
        site: name under which the size of the output is reported.

    Attributes:
        bank: new rows a_i, b_i train, frozen rows are merged.
        gates: g [r], as many as the bank has new rows.
    """

    def __init__(self, in_features: int, out_features: int, *, site: str = ""):
        super().__init__()
        self.bank = AtomBank(in_features, out_features)
        self.gates = nn.Parameter(torch.empty(0))
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        return gated_low_rank(x, self.bank.new_keys, self.bank.new_values, self.gates)

    def grow(self, r: int, owner: int, generator: torch.Generator, *, normal: bool) -> None:
        """r new components of write `owner`: a_i U(-1/sqrt(d_in), 1/sqrt(d_in)), b_i zero, g_i N(0, 1) or one."""
        self.bank.grow(r, owner, generator)
        gates = torch.randn(r, generator=generator) if normal else torch.ones(r)
        self._set_gates(gates.to(self.gates))

    @torch.no_grad()
    def fold(self) -> int:
        """Makes the components that train old ones, b_i times g_i; those with gate 0 go. Returns how many stayed."""
        before = self.bank.frozen_size
        self.bank.new_values.mul_(self.gates[:, None])
        self.bank.freeze()
        self._set_gates(self.gates.new_empty(0))
        return self.bank.frozen_size - before

    def drop(self, owner: int) -> int:
        """Removes the components of one write; returns how many. All that train are of one write."""
        gone = self.bank.drop(owner)
        if not self.bank.new_size:
            self._set_gates(self.gates.detach().new_empty(0))
        return gone

    def _set_gates(self, gates: Tensor) -> None:
        self.gates = nn.Parameter(gates, requires_grad=self.gates.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}gates")
        if found is not None and found.shape != self.gates.shape:
            self._set_gates(self.gates.detach().new_empty(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
