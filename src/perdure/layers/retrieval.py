"""Tokens made for one block: retrieved from the block's own tokens, or the same for every input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput
from ..memory import retrieve
from ..memory.routing import routing_dtype

PARTS = ("P", "W_Q", "W_K", "W_V", "W_O")
STD = 0.02
"""Standard deviation of the initial weights, as in the hopfield-layers library."""


class RetrievedPrompts(nn.Module):
    """Z = softmax(beta Q K^T) V W_O + b_O with Q = LN(P) W_Q + b_Q, K = LN(X) W_K, V = LN(X) [W_V + b_V] (RwF).

    What a row retrieves depends on its real tokens alone and not on their order. The arithmetic is in float32 (float64
    for float64 tokens), also under autocast. The keys are never formed: (LN(P) W_Q + b_Q) W_K^T is multiplied with
    LN(X), which costs L N D per head and not N D^2.

    Args:
        width: D of the tokens. length: L, prompts made; 0 makes none.
        heads: must divide the width. beta: 1 / sqrt(width / heads) when None; 0 for mean pooling.
        train: of `PARTS`, what is a trainable parameter; a bias goes with its matrix. W_V is the identity where it
            does not train, and starts as that where it does; all else starts as N(0, 0.02^2), biases as 0.
        generator: of the initial values; torch's own when None.

    Raises:
        BadInput: `heads` does not divide `width`, a size or `beta` is out of its range, or a part is unknown.
    """

    def __init__(
        self,
        width: int,
        length: int,
        *,
        heads: int = 1,
        beta: float | None = None,
        train: Sequence[str] = PARTS,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if heads < 1 or width % heads:
            raise BadInput(f"heads: found {heads}, which does not divide the width {width}; choose a divisor")
        if length < 0 or (beta is not None and beta < 0):
            raise BadInput(f"found length={length}, beta={beta}; neither may be below 0")
        unknown = sorted(set(train) - set(PARTS))
        if unknown:
            raise BadInput(f"train: found {', '.join(unknown)}; known: {', '.join(PARTS)}")
        self.heads = heads
        self.beta = 1 / math.sqrt(width // heads) if beta is None else beta

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * STD)

        self.P = normal(length, width)
        self.W_Q, self.b_Q = normal(width, width), nn.Parameter(torch.zeros(width))
        self.W_K = normal(width, width)
        self.W_O, self.b_O = normal(width, width), nn.Parameter(torch.zeros(width))
        if "W_V" in train:
            self.W_V, self.b_V = nn.Parameter(torch.eye(width)), nn.Parameter(torch.zeros(width))
        else:
            self.W_V = self.b_V = None
        self.parts = frozenset(train)
        self.requires_grad_(False)
        for _, parameter in self.trained():
            parameter.requires_grad_(True)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What is to train, by name."""
        return [(name, p) for name, p in self.named_parameters() if name.replace("b_", "W_") in self.parts]

    def extra_repr(self) -> str:
        return f"length={len(self.P)}, width={self.P.shape[1]}, heads={self.heads}, beta={self.beta:.4g}"

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] and bool [B, N] (True for real tokens; None for all) -> [B, L, D], in the tokens' dtype."""
        batch, count, width = tokens.shape
        dtype = routing_dtype(tokens)

        def by_head(x: Tensor) -> Tensor:  # [..., n, D] -> [..., H, n, D / H]
            return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

        with torch.autocast(device_type=tokens.device.type, enabled=False):
            p, w_q, b_q, w_k, w_o, b_o = (
                part.to(dtype) for part in (self.P, self.W_Q, self.b_Q, self.W_K, self.W_O, self.b_O)
            )
            queries = by_head(F.linear(F.layer_norm(p, (width,)), w_q, b_q))  # [H, L, d]
            folded = queries @ w_k.unflatten(0, (self.heads, -1))  # [H, L, D]
            x = F.layer_norm(tokens.to(dtype), (width,))
            values = x if self.W_V is None or self.b_V is None else F.linear(x, self.W_V.to(dtype), self.b_V.to(dtype))
            seen = None if mask is None else mask[:, None]
            pooled, _ = retrieve(folded, x[:, None], by_head(values), self.beta, seen)  # [B, H, L, d]
            prompts = F.linear(pooled.transpose(1, 2).flatten(2), w_o, b_o)
        return prompts.to(tokens.dtype)


class AttentionPooler(nn.Module):
    """What some retrievals of L rows each read from the tokens, averaged over rows and summed: [B, 1, D].

    Cross-attention pooling with learned queries; each of `units` retrievals is a `RetrievedPrompts` with weights of its
    own, so that it holds exactly as many parameters as RwF in that many blocks.

    Args:
        width: D of the tokens. length: L, queries of one unit. units: at least 1.
        settings: of each `RetrievedPrompts`.
    """

    def __init__(self, width: int, length: int, units: int, **settings: Any):
        super().__init__()
        self.units = nn.ModuleList(RetrievedPrompts(width, length, **settings) for _ in range(units))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What is to train, by name."""
        return [
            (f"units.{number}.{name}", p)
            for number, unit in enumerate(self.units) for name, p in unit.trained()  # type: ignore[operator]
        ]  # fmt: skip

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] and bool [B, N] (True for real tokens; None for all) -> [B, 1, D], in the tokens' dtype."""
        return torch.stack([unit(tokens, mask).mean(1, keepdim=True) for unit in self.units]).sum(0)


class StaticPrompts(nn.Module):
    """L trained tokens, the same for every input: the control for retrieved ones.

    Args:
        width: D of the tokens. length: L. generator: of the initial values N(0, 0.02^2); torch's own when None.
    """

    def __init__(self, width: int, length: int, generator: torch.Generator | None = None):
        super().__init__()
        self.P = nn.Parameter(torch.randn(length, width, generator=generator) * STD)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What is to train, by name."""
        return [("P", self.P)]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, L, D], in the tokens' dtype."""
        return self.P.to(tokens.dtype).expand(len(tokens), -1, -1)
