"""SinglePrompt: one prefix in early blocks, the same for every input, that every experience trains.

Park, Lee, Lee, "Is Prompt Selection Necessary for Task-Free Online Continual Learning?", CVPR Findings 2026, arXiv
2604.04420. The paper was not at hand; formulas and defaults are those of its public code
(efficient-learning-lab/SinglePrompt). In each of the first five blocks l

    h = softmax(q [P_K^l; K]ᵀ / √d) [P_V^l; V]

with n trained rows P_K, P_V each, in front of the frozen block's own keys and values. No pool, no query, no key loss.

| symbol | attribute |
|---|---|
| P_K, P_V [n, W], stacked | `modules["<block>.prefix"].P` |

What the code has beside the prefix are settings of a run here: a cosine head of temperature 0.1, the loss over the
classes of the batch alone (`protocol.mask: current`; without boundaries that is the batch's classes), Adam 5e-3, three
steps a batch. Hold them fixed across methods: they move more than the prompt does.

Stored: 2 n W numbers a block, W the width of its keys (smaller than D under grouped queries), whatever the number of
experiences. Cost: n more keys in each of these blocks; no further token, no second pass. Removal: rollback; the prefix
has no single owner. As it does not depend on the input it is causal in a language model.

Deviations: the code adds the class token's position embedding to the start of every prompt, which is left out (hosts
have none in common, and the prompt trains). Prefix keys take no rotary position and no norm, see `hosts/prefix.py`.
INFERRED: everything on hosts other than ViT; the paper's reasons for what is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import MethodConfig
from ._method import register
from ._queried import PrefixMethod

if TYPE_CHECKING:
    from ..hosts import Host


@register("single_prompt")
class SinglePrompt(PrefixMethod):
    """SinglePrompt: one trained prefix on keys and values of early blocks, the same for every input."""

    class Config(MethodConfig):
        length: int = Field(20, ge=1)
        """n, rows of the prefix. Scripts of the public code: 20."""
        layers: list[int] | None = Field(None, min_length=1)
        """Indices of the blocks, negative from the end; the first five when absent, as the scripts have it."""
        start: float = Field(1.0, gt=0)
        """Rows start as U(−start, start). Public code: 1."""

    status = "unverified"
    citation = "arXiv 2604.04420"

    def attach(self, host: Host) -> None:
        import torch

        from ..layers import StaticPrefix

        config = self.config
        self._handles = []
        for block in self.chosen_blocks(host, "layers", range(5)):
            drawn = torch.rand(2, config.length, self.width(host, block), generator=self._generator)
            self.put(block, StaticPrefix((2 * drawn - 1) * config.start), "prefix")

    def parameter_groups(self) -> list[dict[str, Any]]:
        modules: dict[str, Any] = self.modules
        return [{"params": [(f"{name}.P", made.P) for name, made in modules.items()], "weight_decay": 0.0}]
