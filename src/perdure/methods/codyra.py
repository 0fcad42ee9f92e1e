"""CoDyRA: low-rank components whose gates decide which of them are merged.

"CoDyRA", arXiv 2412.01004; v8 (May 2026) carries the title "Take Only What You Need: Rank Minimization as an Implicit
Forgetting Regularizer in CL", Findings of EMNLP 2026. Formulas from the authors' project page [P], the rest from their
released code [C]; the paper's full text was not at hand, so its equation numbers are not given. Per adapted map, in
experience t:

    y  = W x + b + Σ_i w_i B_i (A_i x)              i = 1 … r; W holds all earlier experiences        [P]
    objective  L + λ Σ_maps ‖w‖₁                                                                    [P]
    ŵ  = w − η ∇L                                   the optimizer's step                              [P]
    w  ← T_κ(ŵ),  T_κ(x) = 1[|x| > κ] (x − κ sign x)                                                  [P]
    W  ← W + B diag(w) A over the components with w_i ≠ 0, after the experience; then all anew        [C]

A U(−1/√d_in, 1/√d_in), B zero, w N(0, 1) [C]. No threshold in the dense phase; then κ ramps to κ_max, as
`memory.proximal.ramp` says [C]. The operator runs after every optimizer step, so that momentum cannot carry a gate past
it.

| symbol | attribute |
|---|---|
| A, B | `bank.new_keys`, `bank.new_values` (rows are B_i) |
| w | `gates` |
| r, κ_max, λ | `rank`, `threshold`, `l1` |
| η | the rate that the step really took for the gates, schedule included |

`operator: released` is the code's: it shrinks and then cuts at κ, so w stays only where |w| ≥ 2 κ. `l1: λ` takes the
objective at its word: κ_t = λ η_t after the dense phase in place of the ramp (the code has no λ and no η in κ).

Stored: a copy of W0 of the adapted maps in memory, which saved states are bound to by hash; in the state
Σ_t ρ_t (d_in + d_out) numbers a map, ρ_t the components kept. Cost per token and map: r (d_in + d_out) multiply-adds
while an experience trains, none afterwards. Removal: structural (`forget` subtracts one write's components; later ones
were learnt in their presence).

INFERRED, by simulation and arithmetic, not from the paper: with the released numbers (500 steps, rate 5e-4, N(0, 1))
Σ κ is 0.65 and a gate can move by about 0.13, so that the first draw decides nearly alone what stays. `random_prune` is
the control. Σ κ grows with the steps, about 0.26 · κ_max · steps at dense .5: set κ_max for the steps you take.

Deviations: kept components stay stored by write (the release stores them too, unused), which gives `forget`; W is
computed from W0 each time, not added to. With AdamW κ is not divided by the second moment, as in the release. The
X-TAIL release trains CLIP's image-text loss; here the loss is the objective's. Optimizer new for each experience.
`l1` and `gate_init: ones` are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ._gated import GatedConfig, MergedComponents
from ._method import register

if TYPE_CHECKING:
    from torch import Tensor


@register("codyra")
class CoDyRA(MergedComponents):
    """CoDyRA: gated rank-1 components, small gates set to zero by proximal steps, the rest merged."""

    class Config(GatedConfig):
        threshold: float = Field(0.005, ge=0)
        """κ_max, which the threshold on the gates ramps up to. Published: .005 at 500 steps an experience."""
        operator: Literal["soft", "released"] = "soft"
        """`soft` is the paper's T_κ; `released` is the code's, which also cuts what it has shrunk below κ."""
        l1: float | None = Field(None, ge=0)
        """λ: the threshold is λ times the rate that the step took, instead of the ramp. Ours, after the objective."""

    status = "unverified"

    def after_update(self, before: dict[str, Tensor]) -> None:
        from ..memory.proximal import OPERATORS

        kappa = self._kappa()
        if kappa > 0:
            for each in self.components.values():
                each.gates.copy_(OPERATORS[self.config.operator](each.gates, kappa))

    def _kappa(self) -> float:
        """The threshold that belongs to the step just taken."""
        from ..memory.proximal import dense_steps, ramp

        config, step, total = self.config, self.loop.experience_step, self.loop.steps_planned
        if config.l1 is None:
            return ramp(step, total, config.dense, config.threshold)
        if step <= dense_steps(total, config.dense):
            return 0.0
        return config.l1 * self.loop.rate(next(iter(self.components.values())).gates)
