"""Exact gradients of rank-1 atoms with the work that frozen items do not need left out.

With p = A x, n = max(||p||, eps), s = p / n and upstream gradients g_p, g_s at the selected atoms:

    dL/dp = scatter(g_p + g_s / n) - (sum_m g_s,m s_m / n) s          (second term 0 where ||p|| < eps)
    dL/dx = dL/dp A        dL/da_j = sum_t dL/dp_tj x_t   (new atoms only)
    dL/db_j = sum_t c_tj dL/dy_t   (selected new atoms only)

An unselected key gets gradient through the joint norm, an unselected value gets none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..routing import response_norm, select_with_reserve

# N / d above which dL/dx takes the norm's part through the d x d Gram matrix instead of all N keys.
GRAM_FROM = 1.5


def _responses(x: Tensor, frozen_keys: Tensor, new_keys: Tensor) -> Tensor:
    # Both products write into one buffer: concatenating the keys would copy the bank at every call.
    old, new = frozen_keys.shape[0], new_keys.shape[0]
    if old == 0 or new == 0:
        return x @ (new_keys if old == 0 else frozen_keys).t()
    p = x.new_empty(x.shape[0], old + new)
    torch.mm(x, frozen_keys.t(), out=p[:, :old])
    torch.mm(x, new_keys.t(), out=p[:, old:])
    return p


def _scatter(shape: tuple[int, int], indices: Tensor, entries: Tensor, start: int = 0) -> Tensor:
    # Entries of items below `start` fall into column 0, which is cut off.
    if start:
        rows, columns = shape
        out = entries.new_zeros(rows, columns + 1)
        return out.scatter_add_(1, (indices - (start - 1)).clamp_min_(0), entries)[:, 1:]
    return entries.new_zeros(shape).scatter_add_(1, indices, entries)


class Respond(torch.autograd.Function):
    """(x [T, d], frozen keys [n, d], new keys [r, d], k, eps, min_k, reserve) -> p [T, k], s [T, k], indices [T, k].

    The frozen keys must not require a gradient. Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen_keys: Tensor, new_keys: Tensor, k: int, eps: float, min_k: int, reserve: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = _responses(x, frozen_keys, new_keys)
        norm = response_norm(p, eps)
        indices = select_with_reserve(p, k, min_k, reserve, frozen_keys.shape[0])  # s and p have the same order
        chosen = p.gather(1, indices)
        scores = chosen / norm
        ctx.eps = eps
        ctx.save_for_backward(x, frozen_keys, new_keys, p, norm, scores, indices)
        ctx.mark_non_differentiable(indices)
        return chosen, scores, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_p, grad_s, _ = grads
        x, frozen_keys, new_keys, p, norm, scores, indices = ctx.saved_tensors
        with torch.autocast(device_type=x.device.type, enabled=False):
            entries = grad_p + grad_s / norm
            # A norm that was clamped to eps is a constant. Two divisions: the square of a small norm would underflow.
            through_norm = (grad_s * scores).sum(-1, keepdim=True) / norm / norm
            through_norm = torch.where(norm > ctx.eps, through_norm, 0.0)
            grad_x = grad_new = None
            old, new = frozen_keys.shape[0], new_keys.shape[0]
            dp = None
            if ctx.needs_input_grad[0]:
                if old + new > GRAM_FROM * x.shape[1] and x.shape[0] > x.shape[1]:
                    grad_x = _grad_x_by_gram(x, frozen_keys, new_keys, indices, entries, through_norm)
                else:
                    dp = (p * -through_norm).scatter_add_(1, indices, entries)
                    grad_x = dp[:, :old] @ frozen_keys
                    if new:
                        grad_x = grad_x.addmm_(dp[:, old:], new_keys) if old else dp @ new_keys
            if ctx.needs_input_grad[2]:
                if dp is None:
                    dp_new = p[:, old:] * -through_norm + _scatter((x.shape[0], new), indices, entries, old)
                else:
                    dp_new = dp[:, old:]
                grad_new = dp_new.t() @ x
        return grad_x, None, grad_new, None, None, None, None


def _grad_x_by_gram(
    x: Tensor, frozen_keys: Tensor, new_keys: Tensor, indices: Tensor, entries: Tensor, through_norm: Tensor
) -> Tensor:
    # (coefficient * p) A = coefficient * x (A^T A): T d^2 + N d^2 instead of T N d multiply-adds.
    gram = (frozen_keys.t() @ frozen_keys).addmm_(new_keys.t(), new_keys)
    keys = joined(frozen_keys, new_keys)
    grad = F.embedding_bag(indices, keys, per_sample_weights=entries, mode="sum")
    return grad.sub_((x * through_norm) @ gram)


def joined(frozen: Tensor, new: Tensor) -> Tensor:
    """[n, d], [r, d] -> [n + r, d], without a copy if one of them is empty."""
    if new.shape[0] == 0:
        return frozen
    return new if frozen.shape[0] == 0 else torch.cat([frozen, new])


class GradientOfNew(torch.autograd.Function):
    """Identity on y [T, d_out] that hands dL/dB to the new values [r, d_out].

    y was computed from detached values; c [T, k] are the coefficients and `start` the number of frozen items.
    A dense [T, r] product over the few new rows replaces a scatter over the whole bank.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, new_values: Tensor, coefficients: Tensor, indices: Tensor, start: int) -> Tensor:
        ctx.start, ctx.rows = start, new_values.shape[0]
        ctx.save_for_backward(coefficients, indices)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), grad_values = grads, None
        if ctx.needs_input_grad[1]:
            coefficients, indices = ctx.saved_tensors
            with torch.autocast(device_type=grad.device.type, enabled=False):
                of_new = _scatter((grad.shape[0], ctx.rows), indices, coefficients, ctx.start)
                grad_values = of_new.t() @ grad
        return grad, grad_values, None, None, None


def gather_values(c: Tensor, indices: Tensor, frozen_values: Tensor, new_values: Tensor, scale: float) -> Tensor:
    """y_t = sum_i c_ti B_{indices_ti}, touching only the selected values; new values are multiplied by scale.

    Args:
        c, indices: [T, k]. frozen_values: [n, d_out], no gradient. new_values: [r, d_out].
    """
    new = new_values if scale == 1.0 else new_values * scale
    table = joined(frozen_values, new.detach())
    y = F.embedding_bag(indices, table, per_sample_weights=c, mode="sum")
    if new.requires_grad and torch.is_grad_enabled():
        y = GradientOfNew.apply(y, new, c.detach(), indices, frozen_values.shape[0])
    return y


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
