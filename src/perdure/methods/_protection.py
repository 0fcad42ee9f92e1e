"""Protected keys: new keys or down-projections live in the null space of old layer inputs.

For each adapted layer the second moment S = Σ x xᵀ of the inputs of all past experiences is kept (no example is). Its
leading eigenvectors M [d, m] up to a share of the energy span what old inputs look like; a key a is replaced by
a − (a M) Mᵀ. The replacement happens after every update, so it is exact whatever the optimizer does.
Old inputs then hardly answer new keys: features of old rows keep still while new rows are learnt.
Related: GPM (Saha et al. 2021) and InfLoRA project gradients or fix the down-projection; both citations from memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..config import ProtectConfig
    from ..data import Rows
    from ..hosts import Site
    from ._method import Method


class InputProtection:
    """Second moments and bases of one method's layers, kept in that method's `tensors`.

    Args:
        owner: the method whose state holds the statistics.
        config: the share of energy that is protected.
    """

    def __init__(self, owner: Method, config: ProtectConfig):
        self.owner = owner
        self.energy = config.inputs
        self._bases: dict[str, Tensor] = {}

    def observe(self, sites: Sequence[Site], rows: Rows) -> None:
        """Adds the layer inputs of one learnt experience to the statistics: one counted extra pass."""
        tensors = self.owner.tensors
        holder: dict[int, str] = {}  # sites with the same input share a statistic, kept under the first one's name
        sharing: dict[str, str] = {}
        for name, moments in self.owner.loop.capture(sites, rows).items():
            sharing[name] = holder.setdefault(id(moments), name)
            if sharing[name] == name:
                key, found = f"moment/{name}", moments.moment.float()
                tensors[key] = tensors[key] + found if key in tensors else found
        self.owner.values["sharing"] = sharing
        self.reload()

    def reload(self) -> None:
        """Computes the bases from the statistics, at a boundary and after a state was loaded."""
        from ..memory.protect import leading_basis

        moments = {key[len("moment/") :]: t for key, t in self.owner.tensors.items() if key.startswith("moment/")}
        self._bases = {name: leading_basis(moment, self.energy) for name, moment in moments.items()}

    def project(self, keys: Mapping[str, Tensor]) -> None:
        """Projects keys [r, d] in place, by site name; nothing is protected before the first boundary."""
        import torch

        from ..memory.protect import project

        if not self._bases:
            return
        sharing = self.owner.values["sharing"]
        with torch.no_grad():
            for name, key in keys.items():
                key.copy_(project(key, self._bases[sharing[name]].to(key.dtype)))

    def directions(self) -> dict[str, float]:
        """Share of each layer's input dimensions that is protected."""
        return {name: basis.shape[1] / basis.shape[0] for name, basis in self._bases.items()}
