"""Single-step retrieval: the softmax as the minimiser of a free energy.

RwF (arXiv 2603.09576, formula quoted second-hand) and modern Hopfield networks (Ramsauer et al., "Hopfield Networks is
All You Need"). For scores s_i = <q, k_i> of N stored patterns and p on the simplex,

    F(p) = - sum_i p_i s_i + (1/beta) sum_i p_i log p_i

is (1/beta)-strongly convex. Its only minimiser is p* = softmax(beta s), F(p*) = -(1/beta) log sum_i exp(beta s_i), and
F(p) - F(p*) = KL(p || p*) / beta for every p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import dot, weight


def retrieve(
    queries: Tensor, keys: Tensor, values: Tensor, beta: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum_i p_i v_i with p = softmax(beta q . k): one step, nothing is iterated.

    Args:
        queries: [..., L, d]. keys: [..., N, d]. values: [..., N, e]; leading shapes broadcast.
        beta: inverse temperature, at least 0; at 0 every pattern weighs the same (mean pooling).
        mask: bool [..., N] that broadcasts over the leading shapes, True where a pattern may be retrieved. Where none
            may, the answer is 0.
    Returns:
        retrieved [..., L, e] and the weights p [..., L, N], exactly 0 where the mask is False.
    """
    scores = dot(queries, keys, beta)
    if mask is None:
        weights = weight(scores, 1.0)
    else:
        hidden = ~mask.unsqueeze(-2)
        # The second fill turns the softmax of nothing into zeros.
        weights = weight(scores.masked_fill(hidden, float("-inf")), 1.0).masked_fill(hidden, 0.0)
    return weights @ values, weights


def free_energy(weights: Tensor, scores: Tensor, beta: float) -> Tensor:
    """F(p) = -sum_i p_i s_i + (1/beta) sum_i p_i log p_i, with 0 log 0 = 0.

    Args:
        weights: p [..., N], at least 0 and of sum 1. scores: s [..., N]. beta: above 0.
    Returns:
        [...].
    """
    return torch.xlogy(weights, weights).sum(-1) / beta - (weights * scores).sum(-1)


def least_free_energy(scores: Tensor, beta: float) -> Tensor:
    """min_p F(p) = -(1/beta) log sum_i exp(beta s_i): scores [..., N] -> [...]."""
    return -torch.logsumexp(beta * scores, -1) / beta
