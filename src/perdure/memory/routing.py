"""Which memory items answer an input, and how strongly: score -> select -> weight -> open.

Scoring and selection are written here once for all methods. All functions are pure and differentiable where the
mathematics is; none of them casts, except `routing_dtype`, which callers use to stay in float32 under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Routing:
    """The answer of a routing for each token.

    Attributes:
        indices: [..., k] int64, items in falling order of score.
        weights: [..., k], zero where an item was closed by the threshold.
        scores: [..., k] scores of the selected items, or None.
        size: N, the number of items that competed.
    """

    indices: Tensor
    weights: Tensor
    scores: Tensor | None
    size: int

    def detach(self) -> Routing:
        scores = None if self.scores is None else self.scores.detach()
        return replace(self, indices=self.indices.detach(), weights=self.weights.detach(), scores=scores)

    def reshape(self, *leading: int) -> Routing:
        """The same routing with other leading dimensions, e.g. [B * T, k] -> [B, T, k]."""
        shape = (*leading, self.indices.shape[-1])
        scores = None if self.scores is None else self.scores.reshape(shape)
        return replace(self, indices=self.indices.reshape(shape), weights=self.weights.reshape(shape), scores=scores)


def routing_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: low precision would let rounding choose the items."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- score
def response_norm(responses: Tensor, eps: float) -> Tensor:
    """max(||p||_2, eps) over the item axis: [..., N] -> [..., 1]."""
    return torch.linalg.vector_norm(responses, dim=-1, keepdim=True).clamp_min(eps)


def self_activation(x: Tensor, keys: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """s = p / max(||p||_2, eps) with p = A x (MoRAM, eqs 3-4); the norm runs over the items, so sum s^2 = 1.

    Args:
        x: [..., d]. keys: [N, d]. eps: below this norm the scores shrink to zero.
    Returns:
        scores [..., N] and raw responses p [..., N].
    """
    responses = x @ keys.transpose(-1, -2)
    return responses / response_norm(responses, eps), responses


def cosine(x: Tensor, keys: Tensor, eps: float = 1e-8) -> Tensor:
    """cos(x, key) in [-1, 1]: [..., d], [N, d] -> [..., N]."""
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return unit @ (keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(eps)).transpose(-1, -2)


def dot(x: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x . key: [..., d], [N, d] -> [..., N]."""
    return (x @ keys.transpose(-1, -2)) * scale


def pooled(hidden: Tensor, mask: Tensor | None, causal: bool, limit: int) -> Tensor:
    """Mean of real tokens as an address of the whole sequence (SETA-style, INFERRED).

    Args:
        hidden: [B, T, D]. mask: bool [B, T], True for real tokens; None for all.
        causal: True lets a token see those up to itself, of the first `limit` real ones: [B, T, D], the same for all
            tokens from the limit on. False takes all tokens: [B, 1, D].
        limit: ignored where not causal.
    """
    real = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
    if not causal:
        return (hidden * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None].clamp_min(1)
    counted = real * (real.cumsum(1) <= limit)
    return (hidden * counted[..., None]).cumsum(1) / counted.cumsum(1)[..., None].clamp_min(1)


def gate_logits(address: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """w_e . LN(h) / T + c_e, LN without gain and shift: [..., D], [E, D], [E] -> [..., E] (SETA-style, INFERRED)."""
    unit = F.layer_norm(address, address.shape[-1:])
    return unit @ weight.to(unit.dtype).t() / temperature + bias.to(unit.dtype)


def bernoulli_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL(Bern(sigmoid(old)) || Bern(sigmoid(new))) from logits; exactly 0 where they are equal."""
    on, off = F.logsigmoid(old) - F.logsigmoid(new), F.logsigmoid(-old) - F.logsigmoid(-new)
    return torch.sigmoid(old) * on + torch.sigmoid(-old) * off


# ---- select
def allocate(scores: Sequence[float], sizes: Sequence[int], density: float, spread: float) -> list[int]:
    """How many of each matrix's weights a mask takes, `density` of all together (SETA-style, INFERRED).

    The numbers are in proportion to the summed scores, within density / spread and density * spread of each size.

    Args:
        scores: summed score of each matrix, at least 0. sizes: numbers of weights. spread: at least 1; 1 is uniform.
    Returns:
        One number per matrix; their sum is max(1, round(density * sum(sizes))).
    """
    wanted = max(1, round(density * sum(sizes)))
    share = wanted / sum(sizes)
    low = [share / spread * size for size in sizes]
    high = [min(1.0, share * spread) * size for size in sizes]
    total = sum(scores)
    # A matrix without any score comes last, not never.
    means = [
        (score / total if total > 0 else 0.0) + 1e-9 * n / sum(sizes) for score, n in zip(scores, sizes, strict=True)
    ]

    def at(factor: float) -> list[float]:
        return [min(max(factor * m, lo), hi) for m, lo, hi in zip(means, low, high, strict=True)]

    least, most = 0.0, 1.0
    while sum(at(most)) < wanted * (1 - 1e-12):
        most *= 2
    for _ in range(100):
        middle = (least + most) / 2
        least, most = (middle, most) if sum(at(middle)) < wanted else (least, middle)
    exact = at(most)
    counts = [int(number) for number in exact]
    left = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])  # largest remainder first
    for i in left * 2:
        if sum(counts) < wanted and counts[i] < sizes[i]:
            counts[i] += 1
    return counts


def effective_k(k: int, size: int, min_k: int = 1) -> int:
    """min(max(k, min_k), N). The released MoRAM code has min_k = 2; the paper has no such floor."""
    if k < 1 or min_k < 1:
        raise ValueError(f"k: found k={k}, min_k={min_k}; both must be at least 1")
    return min(max(k, min_k), size)


def select(scores: Tensor, k: int, min_k: int = 1) -> Tensor:
    """Indices of the k largest signed scores, in falling order; among equal scores the lowest index comes first.

    Args:
        scores: [..., N]. k: wanted items. min_k: floor on k.
    Returns:
        [..., effective_k(k, N, min_k)] int64.
    """
    scores = scores.detach()
    size = scores.shape[-1]
    count = effective_k(k, size, min_k)
    if count == 0 or scores.numel() == 0:
        return torch.zeros((*scores.shape[:-1], count), dtype=torch.int64, device=scores.device)
    if scores.device.type == "cpu":
        return _select_and_repair(scores, count)
    if scores.dtype == torch.float64:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return _select_packed(scores, count)


def select_with_reserve(scores: Tensor, k: int, min_k: int, reserve: int, start: int) -> Tensor:
    """As `select`, but `reserve` of the k places go to the best of the items from `start` on.

    The other places go to the largest scores among all items that are left. With fewer items from `start` on, fewer
    places are reserved.

    Args:
        scores: [..., N]. k, min_k: as in `select`. reserve: places, at most k. start: number of old items.
    Returns:
        [..., effective_k(k, N, min_k)] int64, in falling order of score, lowest index first among equals.
    """
    count = effective_k(k, scores.shape[-1], min_k)
    reserve = min(reserve, scores.shape[-1] - start, count)
    if reserve <= 0 or start == 0:
        return select(scores, k, min_k)
    scores = scores.detach()
    chosen = select(scores[..., start:], reserve) + start
    if count > reserve:
        rest = scores.scatter(-1, chosen, -torch.inf)
        chosen = torch.cat([chosen, select(rest, count - reserve)], dim=-1)
    chosen = chosen.sort(dim=-1).values  # so that the stable sort below puts the lowest index first
    order = torch.sort(scores.gather(-1, chosen), dim=-1, descending=True, stable=True).indices
    return chosen.gather(-1, order)


def _select_and_repair(scores: Tensor, count: int) -> Tensor:
    # topk leaves the order of equal scores open; one score more than asked for shows a tie at the boundary too.
    flat = scores.reshape(-1, scores.shape[-1])
    top, indices = _top(flat, min(count + 1, flat.shape[1]))
    indices = indices[:, :count].contiguous()
    equal = top[:, 1:] == top[:, :-1]
    if bool(equal.any()):
        tied = equal.any(-1)
        indices[tied] = torch.sort(flat[tied], dim=-1, descending=True, stable=True).indices[:, :count]
    return indices.reshape(*scores.shape[:-1], count)


def _top(flat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # torch's CPU topk partitions whole rows until N >= 64 count. In between, keeping only the blocks with the largest
    # maxima (they hold the top values) took 0.4 to 0.9 of its time, measured for count = 9 and 192 to 512 columns.
    columns = flat.shape[1]
    if not 20 * count <= columns < 64 * count:
        return torch.topk(flat, count, dim=-1)
    height = 8 if columns >= 40 * count else 4
    width = columns // height
    blocks = flat[:, : height * width].unflatten(1, (height, width)).amax(1)
    chosen = torch.topk(blocks, count, dim=-1, sorted=False).indices
    start = torch.arange(0, height * width, width, device=flat.device)
    candidates = (chosen.unsqueeze(1) + start[:, None]).flatten(1)
    rest = torch.arange(height * width, columns, device=flat.device)
    candidates = torch.cat([candidates, rest.expand(flat.shape[0], -1)], dim=1) if len(rest) else candidates
    top, position = torch.topk(flat.gather(1, candidates), count, dim=-1)
    return top, candidates.gather(1, position)


def _select_packed(scores: Tensor, count: int) -> Tensor:
    # Score and reversed index in one int64 make all keys distinct, so topk is deterministic without a device sync.
    size = scores.shape[-1]
    bits = (scores.to(torch.float32) + 0.0).contiguous().view(torch.int32)  # + 0.0 turns -0 into 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    behind = torch.arange(size - 1, -1, -1, device=scores.device)
    return torch.topk((ordered << 32) | behind, count, dim=-1).indices


# ---- weight
def weight(selected: Tensor, tau: float) -> Tensor:
    """softmax(s / tau) over the selected items: [..., k] -> [..., k]."""
    if not tau > 0:
        raise ValueError(f"tau: found {tau}; the temperature must be above 0")
    return torch.softmax(selected / tau, dim=-1)


def open_items(weights: Tensor, scores: Tensor, delta: float | None, renormalise: bool = False) -> Tensor:
    """Closes selected items whose score is below delta.

    MoRAM does this at inference only and does not renormalise: if all are closed, the layer gives the base output.

    Args:
        weights, scores: [..., k]. delta: None or a value <= 0 leaves all items open.
        renormalise: makes the weights of the open items sum to 1 again (0 where none is open).
    """
    if delta is None or delta <= 0:
        return weights
    kept = weights * (scores >= delta).to(weights.dtype)
    if not renormalise:
        return kept
    total = kept.sum(-1, keepdim=True)
    return kept / torch.where(total > 0, total, torch.ones_like(total))
