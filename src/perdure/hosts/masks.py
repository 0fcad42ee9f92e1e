"""Attention masks when tokens are inserted into one block. Pure functions.

Shapes: B rows, T tokens, n inserted tokens, H heads, K keys (cached and new).

A mask is None (nothing masked, apart from causality), 2-D [B, K] (1 = token), or 4-D [B, H, T, K], boolean
(True = seen) or additive (0 = seen, very negative = not seen): the forms that transformers passes to a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput

_HIDDEN_BELOW = -9999.0
"""An additive entry at or below this hides a token; older checkpoints' code used -10000."""


def token_mask(mask: Tensor | None, batch: int, tokens: int, offset: int = 0) -> Tensor | None:
    """Which of the T tokens are real: bool [B, T], or None where the host passes no mask.

    A token that is not padding may always attend to itself, so the diagonal of a 4-D mask is the token mask, in
    bidirectional, causal and sliding-window attention alike.

    Args:
        offset: column of the first of the T tokens among the K keys, for 4-D masks with a cache.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        check(mask)
        return mask[:, -tokens:].bool().expand(batch, tokens)
    check(mask)
    first = mask[:, 0]
    if first.shape[1] == 1 and tokens > 1:
        real = first[:, 0, offset : offset + tokens]
    else:
        real = first.diagonal(offset=offset, dim1=-2, dim2=-1)
    if real.shape[-1] != tokens:
        raise BadInput(
            f"attention_mask: shape {list(mask.shape)} does not fit {tokens} tokens after {offset} cached ones"
        )
    real = real if mask.dtype == torch.bool else real > _HIDDEN_BELOW
    return real.expand(batch, tokens)


def check(mask: Tensor) -> None:
    """Raises BadInput for a form that cannot be extended."""
    if mask.ndim == 2 and not mask.is_floating_point():
        return
    if mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        return
    raise BadInput(
        f"attention_mask: a block got {mask.dtype} of shape {list(mask.shape)}; tokens can be inserted where masks are "
        "None, [B, K] of integers or booleans, or [B, H, T, K] boolean or additive"
    )


def _like(mask: Tensor, seen: Tensor, hidden: float | None = None) -> Tensor:
    """Writes a boolean [B, 1 or H, ., .] in the number format of `mask`, for as many heads."""
    if mask.dtype != torch.bool:
        zero = torch.zeros((), dtype=mask.dtype, device=mask.device)
        seen = torch.where(seen, zero, torch.finfo(mask.dtype).min if hidden is None else hidden)
    return seen.expand(-1, mask.shape[1], -1, -1)


def columns(mask: Tensor, seen_by: Tensor, count: int) -> Tensor:
    """Entries of n further keys for the host's own tokens: [B, T] -> [B, H, T, n].

    Minus infinity, not the lowest number: where a padding row is hidden from everything, its additive row is constant
    and attention averages over all keys, which must not come to include the inserted ones.
    """
    return _like(mask, seen_by[:, None, :, None].expand(-1, -1, -1, count), float("-inf"))


def insert(
    mask: Tensor | None, real: Tensor | None, count: int, at: int, causal: bool, seen: Tensor | None = None
) -> Tensor | None:
    """The mask for T + n tokens, the n inserted ones standing at index `at` (0: in front; 1: after the first token).

    Inserted tokens are seen by every real token (causal, `at` 1: by all but the row's first real one), see one another
    (causal: those before them) and the real tokens (causal: only those before them). Padding neither sees them nor
    is seen by them.

    Args:
        mask: as the host passes it, [B, H, T, K] with K >= T (a static cache has spare columns at the end).
        real: bool [B, T]; may be None where `mask` is None.
        seen: bool [B, T]; of the real tokens only these see the inserted ones. None for all.
    """
    if mask is None and seen is None:
        return None  # no padding: full attention stays full, and causal attention goes by the order of the tokens
    if mask is None:
        assert seen is not None
        mask = torch.ones(1, 1, seen.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device)
        mask, real = mask.tril() if causal else mask, torch.ones_like(seen)
    check(mask)
    if mask.ndim == 2:
        if seen is not None:
            raise BadInput("attention_mask: of shape [B, K] cannot hide inserted tokens; load with attn 'sdpa'")
        return torch.cat((mask[:, :at], mask.new_ones(mask.shape[0], count), mask[:, at:]), dim=1)
    assert real is not None
    batch, tokens = real.shape
    keys = mask.shape[-1]
    mask = mask.expand(batch, -1, tokens, -1)
    first = real.int().argmax(dim=1, keepdim=True)
    order = torch.arange(keys, device=mask.device)
    seen_by, sees = real, torch.nn.functional.pad(real, (0, keys - tokens))
    if causal:
        seen_by = real & (order[:tokens] >= first + at)
        sees = sees & (order < first + at)
    seen_by = seen_by if seen is None else seen_by & seen
    among = torch.ones(count, count, dtype=torch.bool, device=mask.device)
    among = among.tril() if causal else among

    inserted = columns(mask, seen_by, count)
    old_rows = torch.cat((mask[..., :at], inserted, mask[..., at:]), dim=-1)
    sees = sees[:, None, None, :].expand(-1, -1, count, -1)
    among = among.expand(batch, 1, -1, -1)
    new_rows = _like(mask, torch.cat((sees[..., :at], among, sees[..., at:]), dim=-1))
    return torch.cat((old_rows[:, :, :at], new_rows, old_rows[:, :, at:]), dim=2)


def prepend(mask: Tensor | None, real: Tensor | None, count: int) -> Tensor | None:
    """The mask for T later tokens over K + n keys, where the n keys in front stem from inserted tokens in the cache."""
    if mask is None:
        return None  # one new token, or an attention function that aligns causality with the last key
    check(mask)
    if mask.ndim == 2:
        return torch.cat((mask.new_ones(mask.shape[0], count), mask), dim=1)
    assert real is not None
    mask = mask.expand(real.shape[0], -1, real.shape[1], -1)
    return torch.cat((columns(mask, real, count), mask), dim=-1)
