"""Exact gradients of rank-1 atoms with the work that frozen items do not need left out.

With p = A x, n = max(||p||, eps), s = p / n and upstream gradients g_p, g_s at the selected atoms:

    dL/dp = scatter(g_p + g_s / n) - (sum_m g_s,m s_m / n) s          (second term 0 where ||p|| < eps)
    dL/dx = dL/dp A        dL/da_j = sum_t dL/dp_tj x_t   (new atoms only)
    dL/db_j = sum_t c_tj dL/dy_t   (selected new atoms only)

An unselected key gets gradient through the joint norm, an unselected value gets none. Of the frozen keys that part is
a multiple of s A = x (A^T A) / n: a product with [d, d], whatever their number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import CANDIDATES, Search, crossovers
from ..routing import effective_k, response_norm, select_with_reserve
from .search import KeyIndex, fused, nearest, responses_of


class Choice(NamedTuple):
    """How atoms are chosen; see `effects.read_atoms`."""

    k: int
    eps: float
    min_k: int
    reserve: int
    search: Search


def _joins(tokens: int, size: int) -> bool:
    # Joining old and new items copies all of them; keeping them apart goes over all tokens once more.
    return size < tokens


def _responses(x: Tensor, frozen_keys: Tensor, new_keys: Tensor) -> Tensor:
    old, new = frozen_keys.shape[0], new_keys.shape[0]
    if old == 0 or new == 0 or _joins(x.shape[0], old + new):
        return x @ joined(frozen_keys, new_keys).t()
    p = x.new_empty(x.shape[0], old + new)
    torch.mm(x, frozen_keys.t(), out=p[:, :old])
    torch.mm(x, new_keys.t(), out=p[:, old:])
    return p


def _of_new(columns: int, indices: Tensor, entries: Tensor, start: int) -> Tensor:
    # [T, columns]: entries of items below `start` fall into column 0, which is cut off.
    out = entries.new_zeros(entries.shape[0], columns + 1)
    return out.scatter_add(1, (indices - (start - 1)).clamp_min(0), entries)[:, 1:]


def _bag(indices: Tensor, table: Tensor, entries: Tensor) -> Tensor:
    # sum_i entries_ti table[indices_ti] over the items of the table, without joining the new ones to it.
    size = table.shape[0]
    inside = indices < size
    return F.embedding_bag(indices.clamp_max(size - 1), table, per_sample_weights=entries * inside, mode="sum")


class Respond(torch.autograd.Function):
    """(x [T, d], frozen keys [n, d], new keys [r, d], index, choice) -> p [T, k], s [T, k], indices [T, k].

    The frozen keys must not require a gradient. Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen_keys: Tensor, new_keys: Tensor, index: KeyIndex | None, choice: Choice
    ) -> tuple[Tensor, Tensor, Tensor]:
        old, new = frozen_keys.shape[0], new_keys.shape[0]
        through = None  # x A^T A of the frozen keys, if it is known already
        count = effective_k(choice.k, old + new, choice.min_k)
        p = None  # all responses, where they were written
        if choice.search == "fused" and old:
            chosen, indices, square = fused().select(x, frozen_keys, new_keys, count)
            norm, p_new = square.sqrt_().clamp_min_(choice.eps)[:, None], x @ new_keys.t()
        elif choice.search == "coarse" and index is not None:
            count = min(old, CANDIDATES * count)
            near = nearest(x, index, count)
            through, p_new = x @ index.gram, x @ new_keys.t()
            square = (x * through).sum(-1, keepdim=True).clamp_min_(0) + p_new.square().sum(-1, keepdim=True)
            norm = square.sqrt_().clamp_min_(choice.eps)
            found = torch.cat([responses_of(x, frozen_keys, near), p_new], 1)
            place = select_with_reserve(found, choice.k, choice.min_k, choice.reserve, count)
            numbers = torch.arange(old, old + new, device=x.device).expand(x.shape[0], new)
            indices = torch.cat([near, numbers], 1).gather(1, place)
            chosen = found.gather(1, place)
        else:
            p = _responses(x, frozen_keys, new_keys)
            norm = response_norm(p, choice.eps)
            # s and p have the same order
            indices = select_with_reserve(p, choice.k, choice.min_k, choice.reserve, old)
            chosen, p_new = p.gather(1, indices), p[:, old:]
        scores = chosen / norm
        row = crossovers(x.device.type)
        gram = index.gram if index is not None and old >= row.gram * x.shape[1] else None
        makes_gram = old > row.make_gram * x.shape[1] and x.shape[0] > x.shape[1]
        if p is not None and gram is None and not makes_gram:
            kept = p
        else:
            kept = p_new.clone()  # not a view, which would keep all of p
        ctx.eps, ctx.whole = choice.eps, kept is p
        ctx.save_for_backward(x, frozen_keys, new_keys, kept, norm, scores, indices, through, gram)
        ctx.mark_non_differentiable(indices)
        return chosen, scores, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_p, grad_s, _ = grads
        x, frozen_keys, new_keys, kept, norm, scores, indices, through, gram = ctx.saved_tensors
        with torch.autocast(device_type=x.device.type, enabled=False):
            entries = grad_p + grad_s / norm
            # A norm that was clamped to eps is a constant. Two divisions: the square of a small norm would underflow.
            through_norm = (grad_s * scores).sum(-1, keepdim=True) / norm / norm
            through_norm = torch.where(norm > ctx.eps, through_norm, 0.0)
            grad_x = grad_new = None
            old, new = frozen_keys.shape[0], new_keys.shape[0]
            p_new = kept[:, old:] if ctx.whole else kept
            if ctx.whole and ctx.needs_input_grad[0]:
                dp = (kept * -through_norm).scatter_add_(1, indices, entries)
                dp_new = dp[:, old:]
                joins = _joins(x.shape[0], old + new)
                grad_x = dp @ joined(frozen_keys, new_keys) if joins else dp[:, :old] @ frozen_keys
                left = new and not joins
            else:
                dp_new, left = p_new * -through_norm + _of_new(new, indices, entries, old), new
                if ctx.needs_input_grad[0]:
                    if through is None:
                        through = x @ (frozen_keys.t() @ frozen_keys if gram is None else gram)
                    grad_x = _bag(indices, frozen_keys, entries).sub_(through * through_norm)
            if grad_x is not None and left:
                grad_x = grad_x.addmm_(dp_new, new_keys)
            if ctx.needs_input_grad[2]:
                grad_new = dp_new.t() @ x
        return grad_x, None, grad_new, None, None


def joined(frozen: Tensor, new: Tensor) -> Tensor:
    """[n, d], [r, d] -> [n + r, d], without a copy if one of them is empty."""
    if new.shape[0] == 0:
        return frozen
    return new if frozen.shape[0] == 0 else torch.cat([frozen, new])


class _Gathered(torch.autograd.Function):
    """(c [T, k], indices [T, k], frozen values, new values, scale) -> y [T, d_out], from one table of all values.

    The table is made again in the backward pass: kept until then it would be a second bank.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, indices: Tensor, frozen: Tensor, new: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(c, indices, frozen, new)
        ctx.scale = scale
        return F.embedding_bag(indices, _table(frozen, new, scale), per_sample_weights=c, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        c, indices, frozen, new = ctx.saved_tensors
        (tokens, k), device = c.shape, grad.device
        grad, grad_c, grad_new = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            starts = torch.arange(0, tokens * k, k, device=device)
            token_of = torch.arange(tokens, device=device).repeat_interleave(k)
            grad_c = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad, _table(frozen, new, ctx.scale), indices.flatten(), starts, token_of, 0, -1
            ).view_as(c)
        if ctx.needs_input_grad[3]:
            with torch.autocast(device_type=device.type, enabled=False):
                grad_new = _of_new(new.shape[0], indices, c, frozen.shape[0]).t() @ grad * ctx.scale
        return grad_c, None, None, grad_new, None


def _table(frozen: Tensor, new: Tensor, scale: float) -> Tensor:
    return joined(frozen, new if scale == 1.0 else new * scale)


def gather_values(c: Tensor, indices: Tensor, frozen_values: Tensor, new_values: Tensor, scale: float) -> Tensor:
    """y_t = sum_i c_ti B_{indices_ti}, touching only the selected values; new ones are multiplied by scale.

    Args:
        c, indices: [T, k]. frozen_values: [n, d_out], no gradient. new_values: [r, d_out].
    """
    old, new = frozen_values.shape[0], new_values.shape[0]
    if new == 0:
        return F.embedding_bag(indices, frozen_values, per_sample_weights=c, mode="sum")
    if old == 0 or _joins(c.shape[0], old + new):
        return _Gathered.apply(c, indices, frozen_values, new_values, scale)  # type: ignore[return-value]
    scaled = new_values if scale == 1.0 else new_values * scale
    return torch.addmm(_bag(indices, frozen_values, c), _of_new(new, indices, c, old), scaled)


def dense_values(c: Tensor, indices: Tensor, frozen_values: Tensor, new_values: Tensor, scale: float) -> Tensor:
    """The same by a [T, N] matrix product: better for a bank not much larger than k."""
    old, new = frozen_values.shape[0], new_values.shape[0]
    full = c.new_zeros(c.shape[0], old + new).scatter(1, indices, c)
    if new == 0:
        return full @ frozen_values
    scaled = new_values if scale == 1.0 else new_values * scale
    if old == 0:
        return full @ scaled
    return torch.addmm(full[:, :old] @ frozen_values, full[:, old:], scaled)
