"""L2 anchor: what trains is pulled back to where the last experience left it.

The L2 baseline of a rehearsal-free comparison ("Rehearsal-free closer look", second-hand; the
paper was not at hand): its ViT recipe trains query, key and value maps and the head, with L2 on the maps.

    L = L_now + λ Σ_j (θ[j] − θ*[j])²

θ* is θ at the last boundary, and with `from_start` in the first experience θ before it.

`where` says which parameters: `all` that trains, or those in the linear maps of some roles, the map's own or an
adapter's on it: `[query, key, value]` is the recipe above, `attention` also takes the output map.

| symbol | attribute |
|---|---|
| θ* | `tensors["anchor/…"]` |
| λ | `strength` |

As in `ewc`: parameters that stand still need no pull and are forgotten, new ones have no anchor yet (`_lasting.py`),
and a list in which nothing lives on is refused. The head is left free unless `head` is set (the recipe's L2 is on the
maps); then its old rows are held. The first step of an experience is taken without the pull, which is zero there.

Stored: one number for each held one. Cost: a step, one pass over what is held. Removal: rollback. INFERRED: λ, for
which our source gives no number. Deviation: the source's head is a sigmoid one with binary cross-entropy; any head
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import MethodConfig
from ..data import wide
from ..errors import BadInput
from ._lasting import Lasting, old_rows
from ._method import Method, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import Batch, Output
    from ..hosts import Host, Site
    from ..streams import Experience


@register("l2_anchor")
class L2Anchor(Method):
    """L2 anchor: what trains is pulled to its value at the last boundary."""

    class Config(MethodConfig):
        strength: float = Field(1.0, ge=0)
        """λ of λ Σ (θ − θ*)². No published number is known to us."""
        where: str | list[str] = "all"
        """`all` that trains, or roles of linear maps: a role, a group (attention, ffn), `re:` and a pattern, a list."""
        head: bool = False
        """Hold the head's rows of old classes too."""
        from_start: bool = False
        """Hold the first experience too, at the values before it: of a whole model the pretrained weights."""

    needs = frozenset({"boundaries"})
    status = "verified"
    citation = "L2 of the rehearsal-free comparison, second-hand"

    def attach(self, host: Host) -> None:
        self._host, self._sites = host, self._chosen_sites(host)
        self._lasting = Lasting(self, self._chosen)
        if hasattr(self, "loop"):  # absent under the public `attach`
            self._lasting.check(self.config.head)

    def _chosen_sites(self, host: Host) -> list[Site] | None:
        where = self.config.where
        if where in ("all", ["all"]):
            return None
        sites = host.sites(where)
        names = {site.name for site in sites}
        for site in sites:
            left = [s.role for s in host.sites("attention") if s.path == site.path and s.name not in names]
            if site.out_slice is not None and left:
                raise BadInput(
                    f"method.l2_anchor.where: {site.path} is query, key and value in one map, which is held as a "
                    f"whole; choose {' and '.join(left)} too, or none of the three"
                )
        return sites

    def _chosen(self, name: str, parameter: nn.Parameter) -> bool:
        if name.startswith("head/"):
            return self.config.head
        return self._inside is None or id(parameter) in self._inside

    @property
    def _inside(self) -> set[int] | None:
        """Parameters in the chosen maps as they are now, adapters on them included."""
        if self._sites is None:
            return None
        modules = dict(self._host.model.named_modules())  # PEFT puts its layer in the map's place
        return {id(p) for site in self._sites for p in modules.get(site.path, site.module).parameters()}

    # ---- the experience
    def before_step(self, batch: Batch) -> Batch:
        if self._lasting.begin():
            named = self._lasting.trained()
            if not any(not name.startswith("head/") for name, _ in named) and self._sites is not None:
                raise BadInput(
                    f"method.l2_anchor.where: nothing that trains lies in {self.config.where!r}; choose roles that the "
                    "method beside it adapts, or all"
                )
            if self.config.from_start and not self.loop.experiences_learnt:
                self._anchor(named)
                self.values["lasting"] = [name for name, _ in named]
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.loop.experience_step:
            return {}
        found: list[Any] = []
        reached = set(self.values.get("reached", []))
        for name, parameter in self._lasting.now("anchor"):
            if name in reached:
                anchor = wide(self._lasting.tensor("anchor", name, parameter))
                found.append((wide(old_rows(parameter, anchor)) - anchor).square().sum())
        return {"pull": self.config.strength * sum(found)} if found else {}

    def after_backward(self) -> None:
        # What no loss reaches stands still; several processes must agree beforehand on what has a gradient.
        if not self.loop.experience_step:
            self.values["reached"] = [name for name, p in self.loop.trained() if p.grad is not None]

    def after_experience(self, experience: Experience) -> None:
        named = self._lasting.trained()
        if not experience.last and named:
            self._anchor(named)
            self._lasting.leave(named)

    def _anchor(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.tensors |= {f"anchor/{name}": parameter.detach().clone() for name, parameter in named}

    def plasticity(self) -> dict[str, float]:
        """`held_share`: share of the trained numbers that were held in the last experience."""
        return {"held_share": self.values["held_share"]} if "held_share" in self.values else {}
