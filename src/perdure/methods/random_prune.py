"""Control for CoDyRA: the same components, merged after each experience, but chance decides which are kept.

Ours, after our reading of CoDyRA's released code, by which the gates' first draw decides nearly alone what stays (see
`codyra`). Layers, start, optimizer, dense phase and merging are CoDyRA's. At the start of an experience
K = round(`kept_rank` · maps) of all components are drawn to stay; once the dense phase is over the gates of the others
are set to zero after every update, so that they neither answer nor come back.

| symbol | attribute |
|---|---|
| A, B | `bank.new_keys`, `bank.new_values` (rows are B_i) |
| w | `gates` |
| ρ = K / maps | `kept_rank` |

What differs from CoDyRA beside the choice: all go at once after the dense phase, and the gates that stay are not
shrunk. For the same rank set `kept_rank` to the `kept_rank` in the report of the CoDyRA run.

Stored, cost and removal: as `codyra`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ._gated import GatedConfig, MergedComponents
from ._method import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..streams import Experience


@register("random_prune")
class RandomPrune(MergedComponents):
    """Random pruning to a given rank, the control for CoDyRA."""

    class Config(GatedConfig):
        kept_rank: float = Field(8.3, gt=0)
        """Components kept per map and experience, in the mean over the maps. CoDyRA's page reports 8.3 of 16."""

        @model_validator(mode="after")
        def _no_more_than_there_are(self) -> RandomPrune.Config:
            if self.kept_rank > self.rank:
                raise ValueError(
                    f"kept_rank is {self.kept_rank}, but a map has {self.rank} components; lower it or raise rank"
                )
            return self

    status = "control"

    def before_experience(self, experience: Experience) -> None:
        import torch

        super().before_experience(experience)
        rank, names = self.config.rank, list(self.components)
        order = torch.randperm(rank * len(names), generator=self.loop.generator)
        dropped = sorted(order[round(self.config.kept_rank * len(names)) :].tolist())
        self.values["dropped"] = {
            name: [number % rank for number in dropped if number // rank == row] for row, name in enumerate(names)
        }

    def after_update(self, before: dict[str, Tensor]) -> None:
        from ..memory.proximal import dense_steps

        if self.loop.experience_step > dense_steps(self.loop.steps_planned, self.config.dense):
            self._prune()

    def _prune(self) -> None:
        for name, numbers in self.values["dropped"].items():
            self.components[name].gates.detach()[numbers] = 0.0

    def _merge(self) -> int:
        if self._handles:
            self._prune()  # a training of few steps may have no step after the dense phase
        return super()._merge()
