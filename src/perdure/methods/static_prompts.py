"""Static prompts, the control for `rwf`: as many tokens in the same blocks, the same for every input.

    X' = [CLS; P_l; rest] → block l → drop the L prompt positions → X_{l+1}

| symbol | attribute |
|---|---|
| P_l [L, D] | `modules[block].P` |

The shape is that of deep visual prompt tuning (Jia et al. 2022, "Visual Prompt Tuning", cited from memory); here it is
the arm that tells what retrieval adds to prompts as such. As P does not depend on the input, it is causal in a language
model: every token but the first of a text sees it, and generation with a cache is the same as without.

Stored: k · L · D numbers for k blocks, whatever the number of experiences. Cost: L more tokens in each of the k blocks.
Removal: rollback; the prompts have no single owner.
Ours: k, L and the initial N(0, 0.02²), which are those of `rwf`; and one set of prompts that every experience trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._method import register
from ._prompts import BlockPrompts, PromptConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("static_prompts")
class StaticPromptTuning(BlockPrompts):
    """Control for rwf: trained tokens in early blocks, the same for every input."""

    class Config(PromptConfig):
        pass

    status = "control"

    def make(self, width: int, generator: torch.Generator | None) -> nn.Module:
        from ..layers import StaticPrompts

        return StaticPrompts(width, self.config.length, generator)
