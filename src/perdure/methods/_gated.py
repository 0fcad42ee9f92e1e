"""What CoDyRA and its control share: gated low-rank components that are merged after each experience.

The gate is folded into b then; merging itself is that of `_merged`: W0 + Σ_t Σ_i g_i b_i a_iᵀ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..config import MOST_RATE, MethodConfig
from ._merged import MergedBranches

if TYPE_CHECKING:
    from torch import nn

    from ..hosts import Site
    from ..layers.gated import GatedComponents
    from ..streams import Experience


class GatedConfig(MethodConfig):
    rank: int = Field(16, ge=1)
    """Components that each experience begins with in each map. Published: 16."""
    gate_init: Literal["normal", "ones"] = "normal"
    """Gates at the start of an experience: N(0, 1), as released, or 1."""
    gate_learning_rate: float | None = Field(None, gt=0, le=MOST_RATE)
    """Peak rate of the gates; the learning rate when absent, as released."""
    dense: float = Field(0.5, ge=0, le=1)
    """Share of an experience's steps before the first component goes. Published: .5."""
    targets: str | list[str] = "all"
    """Roles of the adapted linear maps, a group (attention, ffn, all) or `re:` and a pattern."""
    layers: list[int] | None = None


class MergedComponents(MergedBranches):
    """Base of the two: gated components, what of them trains, how many were kept."""

    def _branch(self, site: Site) -> nn.Module:
        from ..layers.gated import GatedComponents

        return GatedComponents(site.in_features, site.out_features, site=site.name)

    @property
    def components(self) -> dict[str, GatedComponents]:
        return self.modules  # type: ignore[return-value]

    def parameter_groups(self) -> list[dict[str, Any]]:
        components, gates = [], []
        for name, each in self.components.items():
            if each.bank.new_size:
                components += [(f"{name}.keys", each.bank.new_keys), (f"{name}.values", each.bank.new_values)]
                gates.append((f"{name}.gates", each.gates))
        rate = self.config.gate_learning_rate
        own: dict[str, Any] = {} if rate is None else {"lr": rate}
        return [{"params": components, "weight_decay": 0.0}, {"params": gates, "weight_decay": 0.0, **own}]

    def _grow(self) -> None:
        normal = self.config.gate_init == "normal"
        for each in self.components.values():
            each.grow(self.config.rank, self.loop.write_id, self.loop.generator, normal=normal)

    def after_experience(self, experience: Experience) -> None:
        kept = self._merge() / len(self.components)
        self.values["kept"] = [*self.values.get("kept", []), kept]

    def plasticity(self) -> dict[str, float]:
        """`kept_rank`: components merged per map, in the mean over maps and experiences (ρ)."""
        kept = self.values.get("kept", [])
        return {"kept_rank": sum(kept) / len(kept)} if kept else {}
