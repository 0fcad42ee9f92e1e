"""SD-LoRA: directions of earlier LoRA branches stand still, their magnitudes go on learning.

Wu et al. 2025, "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", ICLR, arXiv
2501.13198. The formula is second-hand, with the released code looked at in a copy; the paper's full text was not at
hand, so its equation numbers are not given. Per adapted map, in experience t:

    y = W0 x + b + Σ_{k<t} α_k B_k A_k x / (‖B_k‖_F ‖A_k‖_F) + α_t B_t A_t x

A_k, B_k stand still for k < t; A_t, B_t and all α train. A U(−1/√d_in, 1/√d_in), B zero. The branch that trains is not
divided by its norms, as released: B_t = 0 has none.

| symbol | attribute |
|---|---|
| A_t, B_tᵀ | `bank.new_keys` [r, d_in], `bank.new_values` [r, d_out] |
| A_k / ‖A_k‖_F, B_kᵀ / ‖B_k‖_F, k < t | `bank.frozen_keys`, `bank.frozen_values` |
| α | `magnitudes.alpha` |
| r, start of α | `rank`, `magnitude` |

What α_k of an old direction starts from when experience t begins, the formula leaves open:

- `magnitudes: shared`, the released code's: one α_k for all maps, and every α, old ones too, is set to `magnitude`
  again. So the model jumps at a boundary: the product of norms leaves the branch that was trained last, and what all α
  had learnt is dropped. Training of experience t then starts from there.
- `magnitudes: per_map`, ours, after the formula as it is written for one map: α_k of each map, and what has trained
  becomes α_k ← α_k ‖B_k‖_F ‖A_k‖_F. Nothing jumps, and magnitudes keep what they have learnt.

Between two experiences the newest branch is as it was trained; it is normalised when the next one begins.

Stored: r (d_in + d_out) numbers a map and experience, and the magnitudes. Cost per token and map: t r (d_in + d_out)
multiply-adds in experience t. Removal: structural (`forget` drops one write's branch and magnitude; later ones, and the
magnitudes of earlier ones, were learnt in its presence).

Deviations: the evaluation layer of the released code overwrites its sum with the last branch alone; here evaluation is
the formula. The variants that lower the rank (RR) or distil (KD) are not here. The release trains with SGD of momentum
.9; here rate and optimizer are the training's, without weight decay on α. The classes that compete are the protocol's
(`mask: current` as published).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..config import MethodConfig
from ._lora_branches import LoRABranches
from ._method import register

if TYPE_CHECKING:
    from ..hosts import Host, Site
    from ..layers import Directions, LowRankBranches, Magnitudes
    from ..streams import Experience


@register("sd_lora")
class SDLoRA(LoRABranches):
    """SD-LoRA: frozen normalised LoRA directions of all experiences, each with a magnitude that trains on."""

    class Config(MethodConfig):
        rank: int = Field(10, ge=1)
        """r of each experience's branch. Published: 10."""
        magnitude: float = 0.8
        """Start of α. Published code: .8."""
        magnitudes: Literal["shared", "per_map"] = "shared"
        """`shared`: one α an experience for all maps, all set back at each boundary, as released. `per_map`: one a map,
        which takes over the norms of its branch, so that nothing jumps; ours."""
        targets: str | list[str] = Field(default_factory=lambda: ["query", "value"])
        """Roles of the adapted maps, a group (attention, ffn, all) or `re:` and a pattern. Published: q and v."""
        layers: list[int] | None = None

    status = "unverified"
    citation = "Wu et al. 2025, SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning"

    def attach(self, host: Host) -> None:
        from ..layers import Magnitudes

        self._shared = Magnitudes() if self.config.magnitudes == "shared" else None
        super().attach(host)

    def _branch(self, site: Site) -> LowRankBranches:
        from ..layers import Directions, Magnitudes

        magnitudes = self._shared if self._shared is not None else Magnitudes()
        return Directions(site.in_features, site.out_features, magnitudes, site=site.name)

    @property
    def directions(self) -> dict[str, Directions]:
        return self.modules  # type: ignore[return-value]

    def _magnitudes(self) -> dict[str, Magnitudes]:
        """Each once, under the name that its parameter has."""
        if self.config.magnitudes == "shared":
            return {"magnitudes": next(iter(self.directions.values())).magnitudes}
        return {f"{name}.magnitudes": each.magnitudes for name, each in self.directions.items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        alphas = [(name, each.alpha) for name, each in self._magnitudes().items() if len(each.writes)]
        return [*super().parameter_groups(), {"params": alphas, "weight_decay": 0.0}]

    def before_experience(self, experience: Experience) -> None:
        import torch

        for each in self.directions.values():
            if not each.bank.new_size:  # nothing was trained, or it was forgotten
                continue
            norm = each.normalise()
            if self.config.magnitudes == "per_map":
                with torch.no_grad():
                    each.magnitudes.alpha[-1] *= norm.to(each.magnitudes.alpha)
        super().before_experience(experience)
        for each in self._magnitudes().values():
            each.add(self.loop.write_id, self.config.magnitude)
            if self.config.magnitudes == "shared":
                each.alpha.data.fill_(self.config.magnitude)

    def after_experience(self, experience: Experience) -> None:
        """The branch stays as it was trained until the next experience begins."""

    def on_request(self, kind: str, payload: Any) -> Any:
        gone = super().on_request(kind, payload)
        for each in self._magnitudes().values():
            each.drop(int(payload["write"]))
        return gone
