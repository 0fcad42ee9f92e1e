"""Attention pooler, the control for `rwf`: the same retrievals, as many parameters, but at the end of the host.

    X' = X + Σ_u mean over L of Z_u          added to every token in front of the last block
    Z_u = softmax(β Q_u K_uᵀ) V W_O,u + b_O,u          as in `rwf`, u = 1 … `units`

RwF puts Z as tokens into early blocks; here the same cross-attention with learned queries reads the tokens of the last
block and what it read is added to them. So the arm tells what it brings that prompts are retrieved early and that the
frozen blocks answer them, beside a cross-attention of the same size as such. Ours; no paper.

| symbol | attribute |
|---|---|
| P, W_Q, W_K, W_V, W_O of unit u | `modules[block].units[u]`, the names of `rwf` |

Stored: as `rwf` in `units` blocks, constant in the number of experiences. Cost per input: that of `units` retrievals,
and no token more in any block. Removal: rollback; the matrices have no single owner. Hosts: those of `rwf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ._method import register
from ._prompts import EARLY, BlockPrompts, RetrievalConfig, check_heads, check_whole_text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..hosts import Block, Host


@register("attention_pooler")
class AttentionPooling(BlockPrompts):
    """Control for rwf: cross-attention of the same size that reads the last block's tokens."""

    class Config(RetrievalConfig):
        units: int = Field(EARLY, ge=1)
        """Retrievals that are summed: as many as the blocks that `rwf` would take."""
        layers: list[int] | None = None
        """Indices of the blocks in front of which the sum is added, negative from the end; the last when absent."""

    status = "control"

    def check(self, host: Host, blocks: list[Block]) -> None:
        check_whole_text(self, host, blocks)

    def chosen(self, host: Host) -> list[Block]:
        return host.blocks(layers=[-1] if self.config.layers is None else self.config.layers)

    def around(self, made: nn.Module) -> nn.Module:
        from ..hosts import Adding

        return Adding(made)

    def make(self, width: int, generator: torch.Generator | None) -> nn.Module:
        from ..layers import AttentionPooler

        config = self.config
        check_heads(self, width)
        return AttentionPooler(
            width, config.length, config.units, heads=config.heads, beta=config.beta, train=config.train,
            generator=generator,
        )  # fmt: skip
