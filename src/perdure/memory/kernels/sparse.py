"""Exact gradients of gated sparse weight deltas, without a dense weight per sequence.

y_t = sum_e g_te S_e x_t with S_e [d_out, d_in] sparse, and upstream gradient d_t = dL/dy_t:

    dL/dx_t = sum_e g_te S_eᵀ d_t        dL/dg_te = x_t . S_eᵀ d_t        dL/dv_n = sum_t g_te d_t[row n] x_t[column n]

Each expert is one sparse product over all tokens; its gate scales the tokens, not the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .search import sampled_products

SAMPLED_ON = ("cpu",)
"""Devices on which a sampled product gives the gradient of the values. 384 x 384 and 1536 x 384, 1024 tokens, one
thread, interleaved: 0.16 of the time of all products at 3 % density, 0.3 at 6 %."""
DENSE_FROM = 0.01
"""Elsewhere, the density above which all products d x^T are made at once and the wanted ones picked. Not measured."""
_AT_ONCE = 1 << 22
"""Numbers in one gathered block of the gradient of the values."""


class Entries(NamedTuple):
    """Where the values of one part of a bank stand.

    Attributes:
        rows, columns: int64 [n].
        segments: (expert, start, stop): entries start..stop belong to that expert, ordered by row, then column.
        row_starts: int64 [segments, d_out + 1]: where each row begins, counted from the segment's start.
    """

    rows: Tensor
    columns: Tensor
    segments: tuple[tuple[int, int, int], ...]
    row_starts: Tensor


def _matrix(values: Tensor, at: Entries, start: int, stop: int, shape: tuple[int, int]) -> Tensor:
    indices = torch.stack((at.rows[start:stop], at.columns[start:stop]))
    return torch.sparse_coo_tensor(
        indices, values[start:stop], shape, is_coalesced=True, check_invariants=False
    )  # the order of the entries makes it so


def _products(left: Tensor, right: Tensor, at: Entries, number: int) -> Tensor:
    """left[row] . right[column] for each entry of segment `number`: [d_out, N], [d_in, N] -> [n]."""
    _, start, stop = at.segments[number]
    rows, columns = at.rows[start:stop], at.columns[start:stop]
    if left.device.type in SAMPLED_ON:
        return sampled_products(at.row_starts[number], columns, left, right)
    if rows.numel() >= DENSE_FROM * left.shape[0] * right.shape[0]:
        return (left @ right.t())[rows, columns]
    step = max(1, _AT_ONCE // max(1, left.shape[1]))
    blocks = zip(rows.split(step), columns.split(step), strict=True)
    return torch.cat([(left[i] * right[j]).sum(1) for i, j in blocks])


class SparseDelta(torch.autograd.Function):
    """x [N, d_in], gates [N, E], values [n] and [m] with their entries -> y [N, d_out].

    Sums grow in place and one buffer serves all experts: fresh memory for every product cost more than the product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, frozen_values: Tensor, new_values: Tensor,
        frozen: Entries, new: Entries, out_features: int,
    ) -> Tensor:  # fmt: skip
        xt, gt = x.t().contiguous(), gates.t().contiguous()
        y, scaled = xt.new_zeros(out_features, x.shape[0]), torch.empty_like(xt)
        for values, at in ((frozen_values, frozen), (new_values, new)):
            for expert, start, stop in at.segments:
                matrix = _matrix(values, at, start, stop, (out_features, x.shape[1]))
                y.addmm_(matrix, torch.mul(xt, gt[expert], out=scaled))
        ctx.save_for_backward(x, gates, frozen_values, new_values)
        ctx.parts, ctx.out_features = (frozen, new), out_features
        return y.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, gates, *both = ctx.saved_tensors
        needs_x, needs_gates, needs_frozen, needs_new = ctx.needs_input_grad[:4]
        xt, gt, dt = x.t().contiguous(), gates.t().contiguous(), grad_outputs[0].t().contiguous()
        buffer = torch.empty_like(xt)
        dx = torch.zeros_like(xt) if needs_x else None
        dg = torch.zeros_like(gt) if needs_gates else None
        dv = [torch.zeros_like(v) if need else None for v, need in zip(both, (needs_frozen, needs_new), strict=True)]
        for values, at, dvalues in zip(both, ctx.parts, dv, strict=True):
            for number, (expert, start, stop) in enumerate(at.segments):
                if dvalues is not None:
                    scaled = torch.mul(xt, gt[expert], out=buffer)
                    dvalues[start:stop] = _products(dt, scaled, at, number)
                if dx is None and dg is None:
                    continue
                matrix = _matrix(values, at, start, stop, (ctx.out_features, x.shape[1]))
                back = buffer.zero_().addmm_(matrix.t(), dt)
                if dx is not None:
                    dx.addcmul_(back, gt[expert])
                if dg is not None:
                    dg[expert] += back.mul_(xt).sum(0)
        return (None if dx is None else dx.t(), None if dg is None else dg.t(), *dv, None, None, None)
