"""The effects in plain torch, formula by formula: the meaning that every fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing, open_items, select_with_reserve, self_activation, weight


def rank_one(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    k: int,
    tau: float,
    delta: float | None = None,
    renormalise: bool = False,
    eps: float = 1e-8,
    min_k: int = 1,
    reserve: int = 0,
    start: int = 0,
) -> tuple[Tensor, Routing]:
    """MoRAM, eqs 3-8: dy = sum_{i in top-k} w_i (a_i . x) b_i, every atom's value multiplied by a masked weight.

    Args:
        x: [..., d_in]. keys: [N, d_in]. values: [N, d_out], N >= 1.
        reserve, start: so many of the k places go to the best of the items from `start` on (ours; 0 as published).
    """
    s, p = self_activation(x, keys, eps)  # s = p / max(||p||, eps)
    top = select_with_reserve(p, k, min_k, reserve, start)  # s and p have the same order
    s_top = s.gather(-1, top)
    w_top = open_items(weight(s_top, tau), s_top, delta, renormalise)  # w = softmax(s / tau), closed below delta
    w = torch.zeros_like(s).scatter(-1, top, w_top)
    return (w * p) @ values, Routing(top, w_top, s_top, keys.shape[0])  # raw p, not s, multiplies the value


def retrieved_prompts(
    tokens: Tensor,
    queries: Tensor,
    query: tuple[Tensor, Tensor],
    key: Tensor,
    value: tuple[Tensor, Tensor] | None,
    output: tuple[Tensor, Tensor],
    *,
    heads: int,
    beta: float,
    mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """RwF: Z = softmax(beta Q K^T) V W_O + b_O with every token projected, head by head and row by row.

    Args:
        tokens: X [B, N, D]. queries: P [L, D]. mask: bool [B, N], True for real tokens.
        query, value, output: weight [D, D] and bias [D] as nn.Linear has them. value: None for V = LN(X).
        key: weight [D, D]; a bias would add the same number to all scores of a query.
    Returns:
        [B, L, D].
    """

    def normal(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    q = normal(queries) @ query[0].t() + query[1]
    rows = []
    for number, row in enumerate(tokens):
        x = normal(row if mask is None else row[mask[number]])
        k, v = x @ key.t(), x if value is None else x @ value[0].t() + value[1]
        parts = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        joined = torch.cat([torch.softmax(beta * a @ b.t(), -1) @ c for a, b, c in parts], -1)
        rows.append(joined @ output[0].t() + output[1])
    return torch.stack(rows)
