"""The effects in plain torch, formula by formula: the meaning that every fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing, cosine, open_items, select, select_with_reserve, self_activation, weight


def modulated_weight(x: Tensor, gates: Tensor, masks: Tensor, deltas: Tensor) -> Tensor:
    """SETA-style (INFERRED): dy_t = (sum_e g_te (M_e * Delta_e)) x_t, the weight of each token written out.

    Args:
        x: [N, d_in]. gates: [N, E]. masks: {0, 1} or bool [E, d_out, d_in]. deltas: [E, d_out, d_in].
    Returns:
        [N, d_out].
    """
    weights = torch.einsum("te,eoi->toi", gates, masks.to(deltas) * deltas)
    return torch.einsum("toi,ti->to", weights, x)


def gated_low_rank(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
    """CoDyRA: dy = ΔW x, ΔW = Σ_i g_i b_i a_iᵀ written out.

    Args:
        x: [..., d_in]. keys: a_i [r, d_in]. values: b_i [r, d_out]. gates: g [r].
    """
    update = sum(
        (g * torch.outer(b, a) for g, a, b in zip(gates, keys, values, strict=True)),
        values.new_zeros(values.shape[1], keys.shape[1]),
    )
    return x @ update.t()


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


def patches(
    x: Tensor, prototypes: Tensor, code: Tensor, gate_scale: Tensor, gate_bias: Tensor, decoders: Tensor,
    *, k: int, tau: float, gamma: float = 1.0,
) -> tuple[Tensor, Routing]:  # fmt: skip
    """APN: y = gamma sum_{i in top-k} w_i U_i (u * sigmoid(a_i * u + b_i)) with u = V^T x, each patch in full.

    Args:
        x: [..., C]. prototypes p: [K, C]. code V^T: [r, C]. gate_scale a, gate_bias b: [K, r]. decoders U: [K, D, r].
    """
    s = cosine(x, prototypes)
    top = select(s, k)
    s_top = s.gather(-1, top)
    w_top = weight(s_top, tau)  # softmax(cos / tau) over the kept scores alone
    w = torch.zeros_like(s).scatter(-1, top, w_top)
    u = (x @ code.transpose(0, 1)).unsqueeze(-2)  # [..., 1, r], one code for all patches
    phi = u * torch.sigmoid(gate_scale * u + gate_bias)  # [..., K, r]
    written = torch.einsum("...kr,kdr->...kd", phi, decoders)
    return gamma * (w.unsqueeze(-1) * written).sum(-2), Routing(top, w_top, s_top, prototypes.shape[0])


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
