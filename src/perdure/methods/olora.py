"""O-LoRA: a LoRA branch per experience, its down-projection kept orthogonal to those of all earlier ones by a penalty.

Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP. Formulas from
the authors' released code; the paper's full text was not at hand, so its equation numbers are not given. Per adapted
map, in experience t:

    y  = W0 x + b + s Σ_{i<t} B_i A_i x + s B_t A_t x       s = alpha / r; old A_i, B_i stand still
    L  = L_task + λ1 Σ_maps Σ_{i<t} Σ_{jk} |A_i A_tᵀ|_jk + λ2 Σ_maps (‖A_t‖_F + ‖B_t‖_F)

A Kaiming-uniform, U(−1/√d_in, 1/√d_in), B zero. The norms of λ2 are not squared, as released.

| symbol | attribute |
|---|---|
| A_t, B_tᵀ | `bank.new_keys` [r, d_in], `bank.new_values` [r, d_out] |
| A_i, s B_iᵀ, i < t | `bank.frozen_keys`, `bank.frozen_values`, all i one below the other |
| r, alpha, λ1, λ2 | `rank`, `alpha`, `lambda1`, `lambda2` |

The sum needs the old A_i. In the TRACE code released with other papers the step that puts them beside the new one is
commented out: the sum is empty, the penalty 0 and one adapter is reused, so that their O-LoRA row is sequential LoRA.
Here the old rows are the frozen part of the same bank; the log shows the penalty as `olora.orthogonal`.

The penalty sums over maps and entries and is not divided by their number, so that it can be a thousand times the task
loss at the start: λ1 belongs to a rank, a width and a number of maps.

Stored: r (d_in + d_out) numbers a map and experience. Cost per token and map: t r (d_in + d_out) multiply-adds in
experience t; the penalty costs t r² d_in a step. Removal: structural (`forget` drops one write's branch; later ones
were learnt in its presence).

Deviations: s is folded into B when a branch freezes; one dropout mask for old and new branches (INFERRED); λ2 counts
the adapter alone, as released. Parameters and optimizer are new for each experience.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import MOST_RATE, MethodConfig
from ._lora_branches import LoRABranches
from ._method import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Batch, Output
    from ..hosts import Site
    from ..layers import LowRankBranches


@register("olora")
class OLoRA(LoRABranches):
    """O-LoRA: a LoRA branch per experience, penalised where it overlaps with earlier ones."""

    class Config(MethodConfig):
        rank: int = Field(8, ge=1)
        """r of each experience's branch. Published: 8."""
        alpha: float = Field(32.0, gt=0)
        """The branch is multiplied by alpha / r. Published: 32."""
        dropout: float = Field(0.1, ge=0, lt=1)
        """On the branches' input. Published: .1."""
        lambda1: float = Field(0.5, ge=0)
        """λ1 of the overlap with earlier down-projections. Published: .5, in long streams up to 5; searched 0 to 5."""
        lambda2: float = Field(0.0, ge=0)
        """λ2 of the norms of the branch that trains. Published: 0, in long streams up to .3."""
        later_learning_rate: float | None = Field(None, gt=0, le=MOST_RATE)
        """Peak rate from the second experience on. Published for LLaMA: 1e-4 after 1e-3; else the rate stays."""
        targets: str | list[str] = Field(default_factory=lambda: ["query", "value"])
        """Roles of the adapted maps, a group (attention, ffn, all) or `re:` and a pattern. Published: q and v."""
        layers: list[int] | None = None

    status = "unverified"
    citation = "Wang et al. 2023, Orthogonal Subspace Learning for Language Model Continual Learning"

    def _branch(self, site: Site) -> LowRankBranches:
        from ..layers import LowRankBranches

        config = self.config
        return LowRankBranches(
            site.in_features, site.out_features, site=site.name, scale=config.alpha / config.rank,
            dropout=config.dropout,
        )  # fmt: skip

    def parameter_groups(self) -> list[dict[str, Any]]:
        later = self.config.later_learning_rate
        own = {"lr": later} if later is not None and self.loop.experiences_learnt > 0 else {}
        return [{**group, **own} for group in super().parameter_groups()]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        import torch

        from ..memory.protect import overlap

        config, found = self.config, {}
        banks = [branch.bank for branch in self.branches.values() if branch.bank.new_size]
        if config.lambda1 and any(bank.frozen_size for bank in banks):
            parts = [overlap(bank.new_keys, bank.frozen_keys) for bank in banks]
            found["orthogonal"] = config.lambda1 * torch.stack(parts).sum()
        if config.lambda2 and banks:
            norms = [torch.linalg.vector_norm(part) for bank in banks for part in (bank.new_keys, bank.new_values)]
            found["norm"] = config.lambda2 * torch.stack(norms).sum()
        return found
