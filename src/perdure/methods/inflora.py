"""InfLoRA: a LoRA branch per experience whose down-projection is designed from the new inputs and does not train.

Liang and Li 2024, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR. Formulas from the
authors' released code; the paper's full text was not at hand, so its equation numbers are not given. Per adapted map,
in experience t (from 0):

    y   = W0 x + b + Σ_{k<t} B_k A_k x + B_t A_t x            A_t stands still, B_t trains from zero
    C   = mean x xᵀ over the inputs of the new rows, through the model as it is before training
    C'  = C − M Mᵀ C                                          M: basis of old inputs; C' = C at t = 0
    A_t = the r leading left singular vectors of C', as rows, divided by √3
    ε_t = λ + (λ_e − λ) t / T

After training M takes in the inputs of the experience, through the model as it is then (DualGPM): at t = 0 the leading
directions of C whose cumulative share of σ² stays below ε_0, at least one; later leading directions of C − M Mᵀ C until
M holds ε_t of the σ² of C. Where M has more than d / 2 columns its complement is kept instead and shrinks. So old
inputs, as far as M holds them, do not answer a new branch.

| symbol | attribute |
|---|---|
| A_t, B_tᵀ | `bank.new_keys` [r, d_in], `bank.new_values` [r, d_out] |
| A_k, B_kᵀ, k < t | `bank.frozen_keys`, `bank.frozen_values` |
| M or its complement | `tensors["basis/<map>"]`, which of the two in `values["retain"]` |
| r, λ, λ_e, T | `rank`, `energy`, `final_energy`, `experiences` |

Stored: r (d_in + d_out) numbers a map and experience, and at most d_in² / 2 a kind of input. Cost per token and map:
t r (d_in + d_out) multiply-adds in experience t; two counted extra passes over the rows of an experience and a singular
value decomposition [d_in, d_in] for each kind of input. Removal: structural (`forget` drops one write's branch; M keeps
its inputs protected).

Deviations: T is unknown in a stream that goes on, so that without `experiences` ε stays λ. Where the inputs have no r
directions outside M the rest of A_t is zero; the release takes what its decomposition returns. At t = 0 the release
keeps the leading directions as if they were the complement where they are d / 2 or more; here they are turned into it.
M is not updated after the last experience. Rows count alike in C, padding not at all. The classes that compete are the
protocol's (`mask: current` as published); rate and optimizer are the training's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..config import MethodConfig
from ..errors import BadInput
from ._lora_branches import LoRABranches
from ._method import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Rows
    from ..hosts import Host
    from ..memory import Subspace
    from ..streams import Experience


@register("inflora")
class InfLoRA(LoRABranches):
    """InfLoRA: LoRA branches whose fixed down-projections avoid the inputs of earlier experiences."""

    class Config(MethodConfig):
        rank: int = Field(10, ge=1)
        """r of each experience's branch, at most the width of a map's input. Published: 10."""
        energy: float = Field(0.95, gt=0, lt=1)
        """λ: share of the energy of old inputs that is protected. Published: .95 (CIFAR-100), .98 (ImageNet-R)."""
        final_energy: float = Field(1.0, gt=0, le=1)
        """λ_e, which the share grows to over `experiences`. Published: 1."""
        experiences: int | None = Field(None, ge=1)
        """T of the growing share; it stays at `energy` when absent. Published: the number of experiences."""
        targets: str | list[str] = Field(default_factory=lambda: ["key", "value"])
        """Roles of the adapted maps, a group (attention, ffn, all) or `re:` and a pattern. Published: k and v."""
        layers: list[int] | None = None

        @model_validator(mode="after")
        def _growing(self) -> InfLoRA.Config:
            if self.experiences is not None and self.final_energy < self.energy:
                raise ValueError(
                    f"final_energy is {self.final_energy}, below energy {self.energy}; the share grows, so raise it"
                )
            return self

    needs = frozenset({"boundaries", "input_statistics"})
    status = "unverified"
    citation = "Liang and Li 2024, InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning"

    def attach(self, host: Host) -> None:
        for site in host.sites(self.config.targets, layers=self.config.layers):
            if site.in_features < self.config.rank:
                raise BadInput(
                    f"method.inflora.rank: is {self.config.rank}, but {site.path} has {site.in_features} inputs and so "
                    "no more directions; lower it"
                )
        super().attach(host)

    def parameter_groups(self) -> list[dict[str, Any]]:
        banks = {name: branch.bank for name, branch in self.branches.items()}
        return [{"params": [(f"{name}.B", bank.new_values) for name, bank in banks.items() if bank.new_size]}]

    def before_experience(self, experience: Experience) -> None:
        from ..memory import designed_rows

        super().before_experience(experience)
        for names, moment in self._moments(experience.train):
            rows = designed_rows(moment, self._subspace(names[0]), self.config.rank)
            for name in names:
                self.branches[name].bank.new_keys.data.copy_(rows)

    def after_experience(self, experience: Experience) -> None:
        from ..memory import update_subspace

        super().after_experience(experience)
        if experience.last:
            return
        retain = dict(self.values.get("retain", {}))
        for names, moment in self._moments(experience.train):
            new = update_subspace(self._subspace(names[0]), moment, self._share())
            if new is not None:
                self.tensors[f"basis/{names[0]}"], retain[names[0]] = new
        self.values["retain"] = retain

    def _moments(self, rows: Rows) -> list[tuple[list[str], Tensor]]:
        """Names of the maps that read one tensor, the first of which the subspace is kept under, and mean x xᵀ."""
        found: dict[int, tuple[list[str], Tensor]] = {}
        for name, moments in self.loop.capture(self._sites, rows).items():
            mean = moments.moment / moments.count.clamp(min=1)
            found.setdefault(id(moments), ([], mean))[0].append(name)
        return list(found.values())

    def _subspace(self, name: str) -> Subspace | None:
        from ..memory import Subspace

        basis = self.tensors.get(f"basis/{name}")
        return None if basis is None else Subspace(basis, self.values["retain"][name])

    def _share(self) -> float:
        """ε_t."""
        config = self.config
        if config.experiences is None:
            return config.energy
        t = min(self.loop.experiences_learnt, config.experiences - 1)
        return config.energy + (config.final_energy - config.energy) * t / config.experiences

    def left_by_forget(self) -> list[str]:
        return ["the subspace of old inputs, to which its rows belong"] * bool(self.values.get("retain"))

    def plasticity(self) -> dict[str, float]:
        """`free_directions`: share of the input dimensions that old inputs have left, in the mean over the maps."""
        kept = [self._subspace(name) for name in self.values.get("retain", {})]
        shares = [each.free() / each.basis.shape[0] for each in kept if each is not None]
        return {"free_directions": sum(shares) / len(shares)} if shares else {}
