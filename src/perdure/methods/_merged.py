"""What methods share that train low-rank branches beside their maps and merge them into the weights afterwards.

W0 of every adapted map is copied at `attach`. After an experience the branch becomes frozen (its factors folded into B)
and the weight is written anew as W0 + Σ_t B_t A_t over all experiences t so far, summed in float64 on the CPU and
rounded once. It is thus a function of W0 and of the stored branches alone: the same after a load, and without an error
that grows from merge to merge. Nothing stands beside the map then, so that the model between two experiences has its
own architecture, cost and `state_dict` keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ._method import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..hosts import Handle, Host, Site
    from ..memory import AtomBank
    from ..streams import Experience
    from ._updates import Update


class Branch(Protocol):
    """What stands beside a map while it trains: frozen rows of its bank are in the weight and answer nothing."""

    bank: AtomBank

    def fold(self) -> int: ...
    def drop(self, owner: int, /) -> int: ...


class MergedBranches(Method):
    """Branches in and out of the host, merging, state; a subclass says what they are, how they grow and train."""

    needs = frozenset({"boundaries"})
    adapts = True
    uses_host_weights = True
    renews = True
    removal = "structural"

    def attach(self, host: Host) -> None:
        self._sites = host.sites(self.config.targets, layers=self.config.layers)
        # All of them first: a weight that cannot be written is refused before anything is changed.
        self._weights: dict[str, nn.Parameter] = {s.path: s.parameter("merging an update") for s in self._sites}
        self._w0 = {path: weight.detach().to("cpu", copy=True) for path, weight in self._weights.items()}
        self._handles: list[Handle] = []
        for site in self._sites:
            self.modules[site.name] = self._branch(site)

    def _branch(self, site: Site) -> nn.Module:
        """An empty `Branch` for one map."""
        raise NotImplementedError

    def _grow(self) -> None:
        """Gives every branch the rows of a new experience."""
        raise NotImplementedError

    @property
    def _branches(self) -> dict[str, Branch]:
        return self.modules  # type: ignore[return-value]

    def detach(self, host: Host) -> None:
        import torch

        self._close()
        with torch.no_grad():
            for path, weight in self._weights.items():
                weight.copy_(self._w0[path])
        self.modules = {}

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

    # ---- the experience
    def before_experience(self, experience: Experience) -> None:
        self._merge()  # what an experience that was abandoned, or had no rows to train on, has left
        self._grow()
        self._open()

    def after_experience(self, experience: Experience) -> None:
        self._merge()

    def _merge(self) -> int:
        """Folds what trains into the weights and takes it out of the host; returns how many rows stayed."""
        if not self._handles:
            return 0
        kept = sum(each.fold() for each in self._branches.values())
        self._close()
        self._write()
        return kept

    def _write(self) -> None:
        """Every adapted weight from W0 and the frozen rows; where there are none, W0 bit for bit."""
        import torch

        from ..memory.effects import low_rank_update

        by_path: dict[str, list[Site]] = {}
        for site in self._sites:
            by_path.setdefault(site.path, []).append(site)
        with torch.no_grad():
            for path, sites in by_path.items():
                banks = {site: self._branches[site.name].bank for site in sites}
                merged = self._w0[path]
                if any(bank.frozen_size for bank in banks.values()):
                    merged = merged.to(torch.float64, copy=True)
                for site, bank in banks.items():
                    if bank.frozen_size:
                        site.part(merged).add_(low_rank_update(bank.frozen_keys, bank.frozen_values))
                self._weights[path].copy_(merged)

    # ---- use
    merged = True

    def updates(self) -> list[Update]:
        from ._updates import at_site

        banks = [(site, self._branches[site.name].bank) for site in self._sites]
        return [at_site(site, bank.frozen_keys, bank.frozen_values) for site, bank in banks]

    def on_request(self, kind: str, payload: Any) -> Any:
        """`forget` with {"write": id}: subtracts the rows of that write; returns how many went."""
        if kind != "forget":
            return super().on_request(kind, payload)
        gone = sum(each.drop(int(payload["write"])) for each in self._branches.values())
        if not any(each.bank.new_size for each in self._branches.values()):
            self._close()
        self._write()
        return gone

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        if any(each.bank.new_size for each in self._branches.values()):
            self._open()
        else:
            self._close()
        self._write()
