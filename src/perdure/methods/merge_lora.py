"""Merge and reset: LoRA trains on one experience, is merged into the weight, and starts anew for the next.

No paper of its own: the plain form of what CoDyRA does with gates and SEFE with a penalty, and so the control for such
methods. LoRA is Hu et al. 2022. Per adapted map, in experience t:

    y = W x + b + (alpha / r) B_t A_t x                W = W0 + Σ_{k<t} (alpha / r) B_k A_k
    W ← W + (alpha / r) B_t A_t                        after the experience; then A, B anew

A U(−1/√d_in, 1/√d_in), B zero. It is `lora` with `grow` but for rounding and for what the model costs between
experiences, and `codyra` without gates.

| symbol | attribute |
|---|---|
| A_t, B_tᵀ | `bank.new_keys` [r, d_in], `bank.new_values` [r, d_out] |
| A_k, (alpha / r) B_kᵀ, k < t | `bank.frozen_keys`, `bank.frozen_values`; they answer in the weight alone |
| r, alpha | `rank`, `alpha` |

W is computed from a copy of W0 and all stored branches in float64 on the CPU and rounded once, so that no error grows
from merge to merge, a loaded state has the same weights bit for bit, one write can be subtracted, and `detach` gives W0
back bit for bit.

Stored: a copy of W0 of the adapted maps in memory, which saved states are bound to by hash; in the state
r (d_in + d_out) numbers a map and experience. Cost per token and map: r (d_in + d_out) multiply-adds while an
experience trains, none afterwards. Removal: structural (`forget` subtracts one write's branch; later ones were learnt
in its presence).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import MethodConfig
from ._lora_branches import factors
from ._merged import MergedBranches
from ._method import register

if TYPE_CHECKING:
    from torch import nn

    from ..hosts import Site
    from ..layers import LowRankBranches


@register("merge_lora")
class MergeLoRA(MergedBranches):
    """Merge and reset: LoRA merged into the weight after each experience, W0 kept apart."""

    class Config(MethodConfig):
        rank: int = Field(8, ge=1)
        """r of each experience's branch."""
        alpha: float = Field(16.0, gt=0)
        """The branch is multiplied by alpha / r, which is folded into B at merging."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """On the branch's input while it trains."""
        targets: str | list[str] = "all"
        """Roles of the adapted linear maps, a group (attention, ffn, all) or `re:` and a pattern."""
        layers: list[int] | None = None

    status = "unverified"

    def _branch(self, site: Site) -> nn.Module:
        from ..layers import LowRankBranches

        config = self.config
        return LowRankBranches(
            site.in_features, site.out_features, site=site.name, scale=config.alpha / config.rank,
            dropout=config.dropout, merged=True,
        )  # fmt: skip

    @property
    def branches(self) -> dict[str, LowRankBranches]:
        return self.modules  # type: ignore[return-value]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": factors(self.branches)}]

    def _grow(self) -> None:
        for branch in self.branches.values():
            branch.grow(self.config.rank, self.loop.write_id, self.loop.generator)
