"""TreeLoRA: one LoRA for all experiences, pulled to the adapter that a similar past experience left behind.

Qian et al. 2025, "TreeLoRA: Efficient Continual Learning via Layer-Wise LoRAs Guided by a Hierarchical
Gradient-Similarity Tree", ICML, arXiv 2506.10355. The paper's text was not at hand, so no equation numbers are given:
[A] its abstract, [C] the released code (the search in a copy of it), [2nd] summaries by others, INFERRED ours.

    y   = W0 x + b + s B A x                                    s = alpha / r; the same A, B in all experiences [C]
    g_k = mean gradient of the loss w.r.t. A over experience k, one vector a map                        [2nd], A [C]
    d   = mean over maps of ½ ‖g/‖g‖₁ − g'/‖g'‖₁‖₁              L1 distance of directions [2nd], its scale INFERRED

Tree [2nd]: the root holds all past experiences; a node at depth l is split at the median by the vectors of map l, here
by the L1 distance to the node's mean direction (INFERRED). Each step chooses one past experience k by walking down from
the root into the child with the lower bound, n counting choices, t all of them, μ the mean distance seen:

    leaf   LCB = μ − 2 √(log t / n)                                                                     [2nd]
    node   LCB = max(μ − 2 √(log t / n) − δ, least LCB of its children)    δ: diameter of the node; INFERRED

and adds to the loss, at step s of S,

    λ (s / S) · mean over maps of ‖A − A_k‖₁ / ‖A_k‖₁           A_k: A as experience k left it; INFERRED

The summaries give ‖ĝ − ĝ_k‖₁ of gradients [2nd]; its derivative would ask for second derivatives. They also say that
the adapter stands for the gradient, and A − A_k is the gradients summed up since (times the rates). So the search is by
gradients, the pull by what they have added up to. The low rank is the sparsity of the update [2nd].

`form: released` is the code instead [C]: g is the mean of A itself, the tree splits differences of successive g by
inner products, each map draws its own k (`drawn_as_released`; farther is likelier), and −λ (s / S) L P / P is added
with P = Σ_maps ⟨A, g_k⟩ and L the loss, both held fixed but for P above: a term without information in its value.

| symbol | attribute |
|---|---|
| A, Bᵀ | `bank.new_keys` [r, d_in], `bank.new_values` [r, d_out] |
| g_k, A_k | `tensors["signature/<map>"]`, `tensors["adapter/<map>"]` [N, r d_in] |
| g so far; n, n μ | `tensors["running/<map>"]`; `tensors["choices"]`, `tensors["gaps"]` [N, maps] |
| r, alpha, λ, the 2 | `rank`, `alpha`, `strength`, `exploration` |

Stored: 2 r d_in numbers a map and experience (`released`: r d_in) beside A and B. Cost: that of `lora`; a step compares
one stored vector a map and waits once for the device. Removal: rollback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..config import MethodConfig
from ._lora_branches import LoRABranches
from ._method import Method, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import Batch, Output
    from ..hosts import Host, Site
    from ..layers import LowRankBranches
    from ..memory import TaskNode
    from ..streams import Experience


@register("tree_lora")
class TreeLoRA(LoRABranches):
    """TreeLoRA: one LoRA, pulled to the adapter of the past experience whose gradients are most alike."""

    class Config(MethodConfig):
        rank: int = Field(8, ge=1)
        """r of the adapter. Released: 8."""
        alpha: float = Field(32.0, gt=0)
        """The adapter is multiplied by alpha / r. Released: 32."""
        dropout: float = Field(0.1, ge=0, lt=1)
        """On the adapter's input. Released: .1."""
        strength: float = Field(0.5, ge=0)
        """λ of the pull, reached at the end of an experience. Released: .5, of another term."""
        exploration: float = Field(2.0, ge=0)
        """Factor on √(log t / n) of the confidence bounds; of the form `paper` alone. Second-hand: 2."""
        form: Literal["paper", "released"] = "paper"
        """`paper`: gradients, lower confidence bounds, an L1 pull. `released`: what the published code does."""
        targets: str | list[str] = Field(default_factory=lambda: ["query", "value"])
        """Roles of the adapted maps, a group (attention, ffn, all) or `re:` and a pattern. Released: q and v."""
        layers: list[int] | None = None

        @model_validator(mode="after")
        def _explores(self) -> TreeLoRA.Config:
            if self.form == "released" and self.exploration != 2:
                raise ValueError("exploration is of the form paper; remove it, the released draw has its own width")
            return self

    renews = False
    removal = "rollback"
    status = "unverified"
    citation = "Qian et al. 2025, TreeLoRA, arXiv 2506.10355"
    on_request = Method.on_request

    _tree: TaskNode | None = None

    def attach(self, host: Host) -> None:
        self._tree = None
        super().attach(host)

    def _branch(self, site: Site) -> LowRankBranches:
        from ..layers import LowRankBranches

        config = self.config
        return LowRankBranches(
            site.in_features, site.out_features, site=site.name, scale=config.alpha / config.rank,
            dropout=config.dropout,
        )  # fmt: skip

    @property
    def _released(self) -> bool:
        return self.config.form == "released"

    def _downs(self) -> dict[str, nn.Parameter]:
        return {name: branch.bank.new_keys for name, branch in self.branches.items()}

    def _stored(self, kind: str, name: str, like: Tensor) -> Tensor:
        return self.tensors[f"{kind}/{name}"].to(like.device)

    # ---- the experience
    def before_experience(self, experience: Experience) -> None:
        import torch

        if not self.parameter_groups()[0]["params"]:
            super().before_experience(experience)
        downs = self._downs()
        self.tensors |= {f"running/{name}": torch.zeros_like(a.detach()).flatten() for name, a in downs.items()}
        past = len(self.tensors.get(f"signature/{next(iter(downs))}", ()))
        if past:
            self.tensors |= {name: torch.zeros(past, len(downs), dtype=torch.float64) for name in ("choices", "gaps")}
        self.values["chosen"] = None

    def before_step(self, batch: Batch) -> Batch:
        if self.values["chosen"] is None and "choices" in self.tensors:
            self.values["chosen"] = self._choose()
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        import torch

        if not self.values["chosen"]:
            return {}
        if not self._released:
            return {"pull": self._pull()}
        from ..memory import released_alignment

        with torch.no_grad():
            summed, count = self.loop.loss_sum(batch, output)
        downs = self._downs()
        term = released_alignment([a.flatten() for a in downs.values()], self._targets("signature"))
        return {"align": -self._weight() * summed / count.clamp(min=1) * term}

    def after_backward(self) -> None:
        import torch

        from ..memory import direction_gap

        share, gaps = 1 / (self.loop.experience_step + 1), []
        now = {name: a.detach() for name, a in self._downs().items()} if self._released else self._gradients()
        chosen = self.values["chosen"]
        targets = self._targets("signature") if chosen else [None] * len(now)
        with torch.no_grad():
            for (name, each), target in zip(now.items(), targets, strict=True):
                mean = self._stored("running", name, each)
                mean = self.tensors[f"running/{name}"] = mean + (each.flatten() - mean) * share
                if target is not None:
                    gaps.append((mean - target).abs().sum() if self._released else direction_gap(mean, target))
        if chosen:
            where = (torch.tensor(chosen), torch.arange(len(chosen)))
            for name, seen in (("choices", torch.tensor(1.0)), ("gaps", torch.stack(gaps).cpu())):
                self.tensors[name] = self.tensors[name].cpu().index_put(where, seen.double(), accumulate=True)

    def after_step(self) -> None:
        self.values["chosen"] = None

    def after_experience(self, experience: Experience) -> None:
        import torch

        for name, a in self._downs().items():
            left = {"signature": self.tensors.pop(f"running/{name}")}
            if not self._released:
                left["adapter"] = a.detach().flatten().clone()
            for kind, row in left.items():
                old = [self._stored(kind, name, a)] if f"{kind}/{name}" in self.tensors else []
                self.tensors[f"{kind}/{name}"] = torch.cat([*old, row.to(a.device)[None]])
        self._tree = None
        choices = self.tensors.pop("choices", None)
        self.tensors.pop("gaps", None)
        if choices is not None:
            self.values["focus"] = float(choices.sum(1).max() / choices.sum().clamp(min=1))

    # ---- the choice
    def _choose(self) -> list[int]:
        """The past experience of this step, for each map."""
        from ..memory import drawn_as_released, least_bound

        loop, choices = self.loop, self.tensors["choices"].cpu()
        gaps = self.tensors["gaps"].cpu() / choices.clamp(min=1)
        if self._released:
            step, steps = loop.experience_step, loop.steps_planned
            return drawn_as_released(self._root(), choices, gaps, step, steps, loop.generator)
        seen = choices[:, 0].tolist(), gaps.mean(1).tolist()  # all maps choose the same
        return [least_bound(self._root(), *seen, self.config.exploration)] * choices.shape[1]

    def _root(self) -> TaskNode:
        from ..memory import tree_of_changes, tree_of_directions

        if self._tree is None:
            rows = [self._stored("signature", name, a) for name, a in self._downs().items()]
            self._tree = tree_of_changes(rows) if self._released else tree_of_directions(rows)
        return self._tree

    # ---- the pull
    def _weight(self) -> float:
        return self.config.strength * self.loop.experience_step / self.loop.steps_planned

    def _targets(self, kind: str) -> list[Tensor]:
        """What the chosen experiences have left in each map."""
        downs = zip(self._downs().items(), self.values["chosen"], strict=True)
        return [self._stored(kind, name, a)[task] for (name, a), task in downs]

    def _pull(self) -> Tensor:
        from ..memory import relative_pull

        return self._weight() * relative_pull([a.flatten() for a in self._downs().values()], self._targets("adapter"))

    def _gradients(self) -> dict[str, Tensor]:
        """Of all that trains A but the pull."""
        import torch

        downs = self._downs()
        found = {name: torch.zeros_like(a) if a.grad is None else a.grad for name, a in downs.items()}
        if not self.values["chosen"]:
            return found
        with torch.enable_grad():
            pulls = torch.autograd.grad(self._pull(), list(downs.values()))
        return {name: each - pull for (name, each), pull in zip(found.items(), pulls, strict=True)}

    # ---- report and state
    def plasticity(self) -> dict[str, float]:
        """`focus`: share of the last experience's choices that fell on the past experience chosen most."""
        return {"focus": self.values["focus"]} if "focus" in self.values else {}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        self._tree = None
