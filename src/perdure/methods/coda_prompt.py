"""CODA-Prompt: prompts as weighted sums of components, attended by the query; new ones per experience, old ones frozen.

Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning",
CVPR 2023 (citation from memory; the paper was not at hand, formulas follow the authors' code, GT-RIPL/CODA-Prompt).
In each of the first five blocks, with the frozen host's feature q(x) from a pass without prompts:

    α_m = cos(q(x) ⊙ A_m, K_m)          m over the components of all experiences so far
    p   = Σ_m α_m P_m,  p = [p_K; p_V]  the first half in front of the block's keys, the second of its values
    loss + μ Σ_{B in K, A, P} ‖B Bᵀ − I‖²_F, summed over blocks

| symbol | attribute |
|---|---|
| K, A [M, D], P [M, 2, n, W] | `modules["<block>.components"]`: `old_*` (stand still), `new_*` (train) |
| L_p = 2 n, μ | `length`, `orthogonality` |

There is no choice of task: all components answer, so what is new can still change old inputs' prompts. Old components
are buffers, so neither momentum nor decay moves them.

Stored: an experience adds `components` (2 D + L_p W) numbers a block. Cost: a second forward pass for the query, in
training and in use (counted for training, `extra_rows`); M (2 D + L_p W) multiply-adds a row and block; n more keys.
Needs boundaries in training, no task id at test. Removal: rollback; later components were trained beside earlier ones.

Deviations: the authors' pool of M = 100 is split among a known number of experiences; here every experience brings
`components`, 10 as 100 over ten experiences. New rows are of unit length and orthogonal to the span of the old ones
(trained rows are no longer orthogonal to each other) where the dimension has room, else random; the stored version of
the code makes all 100 orthogonal at once. It takes the mean of the penalty's entries times 1e-6; the formula above is
the sum. INFERRED: everything on hosts other than ViT, see `_queried.py`; prefix keys take no rotary position and no
norm, see `hosts/prefix.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ._method import register
from ._queried import QueriedMethod, QueryConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Batch, Output
    from ..hosts import Host
    from ..layers import ComponentPrefix
    from ..streams import Experience


@register("coda_prompt")
class CODAPrompt(QueriedMethod):
    """CODA-Prompt: prefixes as weighted sums of components; each experience adds some, old ones stand still."""

    class Config(QueryConfig):
        components: int = Field(10, ge=1)
        """Components that an experience brings. Authors' configs: 100 over ten experiences."""
        length: int = Field(8, ge=2)
        """L_p, rows of a prompt: half are keys, half values. Authors' configs: 8."""
        layers: list[int] | None = Field(None, min_length=1)
        """Blocks that take a prompt; the first five when absent (authors' code)."""
        orthogonality: float = Field(0.0, ge=0)
        """μ; 0 for none, as newer scripts of the authors have it with an orthogonal start; an older one has 0.1."""

        @field_validator("length")
        @classmethod
        def _halves(cls, value: int) -> int:
            if value % 2:
                raise ValueError(f"is {value}, which cannot be halved into keys and values; give an even number")
            return value

    needs = frozenset({"boundaries"})
    renews = True
    status = "unverified"
    citation = "CVPR 2023"

    def attach(self, host: Host) -> None:
        from ..layers import ComponentPrefix, PromptQuery

        self._handles = []
        blocks = self.chosen_blocks(host, "layers", range(5))
        for tower in dict.fromkeys(block.tower for block in blocks):
            width = host.towers[tower].width
            query = self.ask(host, tower, PromptQuery(width))
            for block in blocks:
                if block.tower == tower:
                    made = ComponentPrefix(width, self.config.length // 2, self.width(host, block), query.choice)
                    self.put(block, made, "components")

    @property
    def _layers(self) -> dict[str, ComponentPrefix]:
        return {name: module for name, module in self.modules.items() if name.endswith(".components")}  # type: ignore[misc]

    def parameter_groups(self) -> list[dict[str, Any]]:
        named = [(f"{name}.{part}", p) for name, layer in self._layers.items() for part, p in layer.trained()]
        return [{"params": named, "weight_decay": 0.0}]

    # ---- components of an experience
    def before_experience(self, experience: Experience) -> None:
        for layer in self._layers.values():
            layer.add(self.config.components, self._generator)

    def after_experience(self, experience: Experience) -> None:
        for layer in self._layers.values():
            layer.freeze()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.config.orthogonality:
            return {}
        overlaps = [layer.overlap() for layer in self._layers.values()]
        return {"orthogonality": self.config.orthogonality * sum(overlaps[1:], overlaps[0])}
