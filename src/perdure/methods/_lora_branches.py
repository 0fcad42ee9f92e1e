"""What methods share that give every experience a LoRA branch of its own: y = W0 x + Σ_{k<t} B_k A_k x + s · B_t A_t x.

Old branches stand still, only the newest trains. A branch freezes when its experience ends, its scale folded into B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._method import Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ..hosts import Handle, Host, Site
    from ..layers import LowRankBranches
    from ..streams import Experience
    from ._updates import Update


def factors(branches: Mapping[str, LowRankBranches]) -> list[tuple[str, nn.Parameter]]:
    """A and B of the branches that train, by name."""
    named = []
    for name, branch in branches.items():
        if branch.bank.new_size:
            named += [(f"{name}.A", branch.bank.new_keys), (f"{name}.B", branch.bank.new_values)]
    return named


class LoRABranches(Method):
    """Branches in and out of the host, growth, removal; the settings are `rank`, `targets` and `layers`."""

    needs = frozenset({"boundaries"})
    adapts = True
    renews = True
    removal = "structural"

    def attach(self, host: Host) -> None:
        self._sites = host.sites(self.config.targets, layers=self.config.layers)
        self._handles: list[Handle] = []
        for site in self._sites:
            self.modules[site.name] = self._branch(site)
            self._handles.append(site.add(self.name, self.modules[site.name]))

    def _branch(self, site: Site) -> LowRankBranches:
        from ..layers import LowRankBranches

        return LowRankBranches(site.in_features, site.out_features, site=site.name)

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self.modules = {}

    @property
    def branches(self) -> dict[str, LowRankBranches]:
        return self.modules  # type: ignore[return-value]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": factors(self.branches)}]

    def before_experience(self, experience: Experience) -> None:
        for branch in self.branches.values():
            branch.grow(self.config.rank, self.loop.write_id, self.loop.generator)

    def after_experience(self, experience: Experience) -> None:
        for branch in self.branches.values():
            branch.fold()

    def updates(self) -> list[Update]:
        from ._updates import at_site

        found = [(site, self.branches[site.name]) for site in self._sites]
        return [at_site(site, b.bank.keys(), b.bank.values() * b.gates()[:, None]) for site, b in found]

    def on_request(self, kind: str, payload: Any) -> Any:
        """`forget` with {"write": id}: drops the branches of that write; returns how many rows went."""
        if kind != "forget":
            return super().on_request(kind, payload)
        return sum(branch.drop(int(payload["write"])) for branch in self.branches.values())
