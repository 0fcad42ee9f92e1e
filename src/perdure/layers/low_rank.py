"""Low-rank branches beside a linear map: those of past experiences, which stand still, and the one that trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory.bank import AtomBank
from ..memory.effects import gated_low_rank


class LowRankBranches(nn.Module):
    """dy = Σ_{k<t} B_k A_k x + s · B_t A_t x, dropout on x in training.

    The rows of all A_k stand in one bank, so that they have an owner, can be taken back and load in any number.

    Args:
        in_features, out_features: d_in, d_out of the linear map.
        site: name under which the size of the output is reported.
        scale: s; folded into B_t when the branch freezes.
        dropout: probability, in training, of an input feature to be dropped.
        merged: True if the host's weight has taken in the frozen branches, so that they answer nothing here.

    Attributes:
        bank: new rows are A_t [r, d_in] and B_tᵀ [r, d_out], frozen ones those of all A_k and B_kᵀ.
    """

    def __init__(
        self, in_features: int, out_features: int, *, site: str = "", scale: float = 1.0, dropout: float = 0.0,
        merged: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.bank = AtomBank(in_features, out_features)
        self.site, self.scale, self.dropout, self.merged = site, scale, dropout, merged

    def extra_repr(self) -> str:
        return f"site={self.site!r}, scale={self.scale}, dropout={self.dropout}"

    def gates(self) -> Tensor:
        """Factor on each row that answers, frozen rows first: 1 for old ones, s for new ones."""
        new = self.bank.frozen_keys.new_full((self.bank.new_size,), self.scale)
        return new if self.merged else torch.cat([new.new_ones(self.bank.frozen_size), new])

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        bank = self.bank
        keys, values = (bank.new_keys, bank.new_values) if self.merged else (bank.keys(), bank.values())
        return gated_low_rank(F.dropout(x, self.dropout, self.training), keys, values, self.gates())

    def grow(self, rank: int, owner: int, generator: torch.Generator) -> None:
        """Freezes what trains and adds a branch of write `owner`: A U(-1/sqrt(d_in), 1/sqrt(d_in)), B zero."""
        self.bank.grow(rank, owner, generator, self.scale)

    def fold(self) -> int:
        """Makes the branch that trains an old one, B times s; rows that never learnt go. Returns how many stayed."""
        before = self.bank.frozen_size
        self.bank.freeze(self.scale)
        return self.bank.frozen_size - before

    def drop(self, owner: int) -> int:
        """Removes the branch of one write; returns how many rows went."""
        return self.bank.drop(owner)
