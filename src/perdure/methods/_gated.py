"""What CoDyRA and its control share: gated low-rank components that are merged after each experience.

W0 of every adapted map is copied at `attach`. After an experience the components whose gate is not zero become frozen
(gate folded into b) and the weight is written anew as W0 + Σ_t Σ_i g_i b_i a_iᵀ over all experiences t so far, summed
in float64 on the CPU and rounded once. It is thus a function of W0 and of the stored components alone: the same after a
load, and without an error that grows from merge to merge. Nothing stands beside the map then, so that the model between
two experiences has its own architecture, cost and `state_dict` keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..config import MOST_RATE, MethodConfig
from ._method import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..hosts import Handle, Host, Site
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


class MergedComponents(Method):
    """Base of the two: components in and out of the host, merging, state."""

    needs = frozenset({"boundaries"})
    adapts = True
    renews = True
    removal = "structural"

    def attach(self, host: Host) -> None:
        from ..layers.gated import GatedComponents

        self._sites = host.sites(self.config.targets, layers=self.config.layers)
        # All of them first: a weight that cannot be written is refused before anything is changed.
        self._weights: dict[str, nn.Parameter] = {s.path: s.parameter("merging an update") for s in self._sites}
        self._w0 = {path: weight.detach().to("cpu", copy=True) for path, weight in self._weights.items()}
        self._handles: list[Handle] = []
        for site in self._sites:
            self.modules[site.name] = GatedComponents(site.in_features, site.out_features, site=site.name)

    def detach(self, host: Host) -> None:
        import torch

        self._close()
        with torch.no_grad():
            for path, weight in self._weights.items():
                weight.copy_(self._w0[path])
        self.modules = {}

    @property
    def components(self) -> dict[str, GatedComponents]:
        return self.modules  # type: ignore[return-value]

    def _open(self) -> None:
        """Puts the components that train beside their maps; a second call does nothing."""
        if not self._handles:
            self._handles = [site.add(self.name, self.modules[site.name]) for site in self._sites]

    def _close(self) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []

    def touched(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{path}.weight", weight) for path, weight in self._weights.items()]

    def originals(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(weight, self._w0[path]) for path, weight in self._weights.items()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        components, gates = [], []
        for name, each in self.components.items():
            if each.bank.new_size:
                components += [(f"{name}.keys", each.bank.new_keys), (f"{name}.values", each.bank.new_values)]
                gates.append((f"{name}.gates", each.gates))
        rate = self.config.gate_learning_rate
        own: dict[str, Any] = {} if rate is None else {"lr": rate}
        return [{"params": components, "weight_decay": 0.0}, {"params": gates, "weight_decay": 0.0, **own}]

    # ---- the experience
    def before_experience(self, experience: Experience) -> None:
        self._merge()  # what an experience that was abandoned, or had no rows to train on, has left
        for each in self.components.values():
            each.grow(
                self.config.rank, self.loop.write_id, self.loop.generator, normal=self.config.gate_init == "normal"
            )
        self._open()

    def after_experience(self, experience: Experience) -> None:
        kept = self._merge() / len(self.components)
        self.values["kept"] = [*self.values.get("kept", []), kept]

    def _merge(self) -> int:
        """Folds what trains into the weights and takes it out of the host; returns how many components stayed."""
        if not self._handles:
            return 0
        kept = sum(each.fold() for each in self.components.values())
        self._close()
        self._write()
        return kept

    def _write(self) -> None:
        """Every adapted weight from W0 and the frozen components; where there are none, W0 bit for bit."""
        import torch

        from ..memory.effects import low_rank_update

        by_path: dict[str, list[Site]] = {}
        for site in self._sites:
            by_path.setdefault(site.path, []).append(site)
        with torch.no_grad():
            for path, sites in by_path.items():
                banks = {site: self.components[site.name].bank for site in sites}
                merged = self._w0[path]
                if any(bank.frozen_size for bank in banks.values()):
                    merged = merged.to(torch.float64, copy=True)
                for site, bank in banks.items():
                    if bank.frozen_size:
                        site.part(merged).add_(low_rank_update(bank.frozen_keys, bank.frozen_values))
                self._weights[path].copy_(merged)

    # ---- use
    def on_request(self, kind: str, payload: Any) -> Any:
        """`forget` with {"write": id}: subtracts the components of that write; returns how many went."""
        if kind != "forget":
            return super().on_request(kind, payload)
        gone = sum(each.drop(int(payload["write"])) for each in self.components.values())
        if not any(each.bank.new_size for each in self.components.values()):
            self._close()
        self._write()
        return gone

    def plasticity(self) -> dict[str, float]:
        """`kept_rank`: components merged per map, in the mean over maps and experiences (ρ)."""
        kept = self.values.get("kept", [])
        return {"kept_rank": sum(kept) / len(kept)} if kept else {}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        if any(each.bank.new_size for each in self.components.values()):
            self._open()
        else:
            self._close()
        self._write()
