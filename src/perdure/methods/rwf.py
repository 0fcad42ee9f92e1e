"""RwF: routing without forgetting, prompts retrieved from a block's own tokens.

Masano, Bellitto, Goswami, van de Weijer, Spampinato, "Routing without Forgetting", arXiv 2603.09576 (2026). Only
the abstract was at hand; the forward pass below is second-hand (a third-party audit and a re-implementation). No code
of the authors was found, and no equation numbers are known. Per augmented block l with tokens X [N, D]:

    Q = LN(P) W_Q + b_Q        K = LN(X) W_K        V = LN(X) [W_V + b_V]
    A = softmax(β Q Kᵀ)        one step; a padded token has weight 0
    Z = A V W_O + b_O          L prompts
    X' = [CLS; Z; rest] → frozen block l → drop the L prompt positions → X_{l+1}

Each row of A is the unique minimiser over the simplex of F(p) = −Σ p_i ⟨q, k_i⟩ + β⁻¹ Σ p_i log p_i, see
`memory/retrieval.py`. With several heads D is split and β Q Kᵀ taken head by head. That is cross-attention pooling with
learned queries, to the last digit: convexity says nothing about what the trained matrices forget.

| symbol | attribute |
|---|---|
| P [L, D] | `modules[block].P` |
| W_Q, b_Q, W_K, W_V, b_V, W_O, b_O | the same names (weights as nn.Linear has them) |
| L, heads, β | `length`, `heads`, `beta` |

Stored: per block L·D + 3 D² + 2 D numbers (D² + D more where W_V trains), what never trains included;
constant in the number of experiences. Cost per input and block: (H + 1)·L·N·D for scores and mix over H heads, L·D² for
W_O (N·D² for W_V where it trains), L more tokens in the block; once per batch 2 L·D² for the queries. No second pass.
Removal: rollback; the matrices have no single owner.

Second-hand or INFERRED: that K and V stay frozen (the audit's reading); W_V = identity; L 10 and blocks 0..2 (the
re-implementation's); N(0, 0.02²) and β = 1/√d (defaults of the hopfield-layers library); loss, optimiser and rate,
which the first version of the paper does not give. By default the query side and W_O train, because the
re-implementation found W_O to be what matters; `train: [P, W_Q]` is nearest to the audit's reading.

Deviations: LN has no affine part, because the projection behind each holds the same functions; no b_K, because softmax
does not see it and Adam would let it drift; keys are not formed, W_K is folded into the queries (same values). The
re-implementation's rate, 3 online steps per batch and batch-masked loss are settings of a run here.

Hosts: bidirectional ones (BERT-like, ViT), and decoders under a classification head, which see a whole text before they
answer. Not language modelling: all tokens of the block would see what was pooled over later ones, so that training
could read off the token that it is to predict, which generation does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._method import register
from ._prompts import BlockPrompts, RetrievalConfig, check_heads, check_whole_text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..hosts import Block, Host


@register("rwf")
class RwF(BlockPrompts):
    """RwF: prompts that early blocks retrieve from their own tokens in one step."""

    class Config(RetrievalConfig):
        pass

    status = "unverified"
    citation = "arXiv 2603.09576"

    def check(self, host: Host, blocks: list[Block]) -> None:
        check_whole_text(self, host, blocks)

    def make(self, width: int, generator: torch.Generator | None) -> nn.Module:
        from ..layers import RetrievedPrompts

        config = self.config
        check_heads(self, width)
        return RetrievedPrompts(
            width, config.length, heads=config.heads, beta=config.beta, train=config.train, generator=generator
        )
