"""Rows in groups, each group with a matrix of its own, in two Triton kernels: nothing waits for the group sizes.

The plain way makes one product per group, for which the sizes must come from the device first. torch's own
`grouped_mm` does without for bfloat16 alone; patches are summed in float32. Checked in Triton's interpreter; NOT
MEASURED on a GPU. Importing this module imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused import launching

ROWS, INNER, OUTER = 32, 32, 64
"""Sides of a tile: of the rows, of the features that are summed over, and of those that are written."""


@triton.jit
def _rows(
    left, weights, out, group_of, first_of, ends, inner, outer, step_group, step_inner, step_outer,
    ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """out[m] = left[m] . weights[group of m] for one tile of rows, all of one group, and OUTER columns."""
    tile = tl.program_id(0)
    group = tl.load(group_of + tile).to(tl.int64)
    rows = (tl.load(first_of + tile) + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < tl.load(ends + group)
    columns = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    total = tl.zeros([ROWS, OUTER], tl.float32)
    for start in range(0, inner, INNER):
        shared = start + tl.arange(0, INNER)
        a = tl.load(left + rows[:, None] * inner + shared[None, :], inside[:, None] & (shared < inner)[None, :], 0.0)
        b = tl.load(
            weights + group * step_group + shared[:, None] * step_inner + columns[None, :] * step_outer,
            (shared < inner)[:, None] & (columns < outer)[None, :], 0.0,
        )  # fmt: skip
        total = tl.dot(a, b, acc=total, input_precision="ieee")
    tl.store(out + rows[:, None] * outer + columns[None, :], total, inside[:, None] & (columns < outer)[None, :])


@triton.jit
def _outer(
    left, right, out, ends, inner, outer, ROWS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """out[g] = sum over the rows m of group g of left[m]^T right[m]; zero for a group without rows."""
    group = tl.program_id(0).to(tl.int64)
    above = tl.program_id(1) * INNER + tl.arange(0, INNER)
    columns = tl.program_id(2) * OUTER + tl.arange(0, OUTER)
    first, end = tl.load(ends + group - 1, group > 0, 0), tl.load(ends + group)
    total = tl.zeros([INNER, OUTER], tl.float32)
    for start in range(first, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < end
        a = tl.load(left + rows[None, :] * inner + above[:, None], inside[None, :] & (above < inner)[:, None], 0.0)
        b = tl.load(right + rows[:, None] * outer + columns[None, :], inside[:, None] & (columns < outer)[None, :], 0.0)
        total = tl.dot(a, b, acc=total, input_precision="ieee")
    place = (group * inner + above[:, None]) * outer + columns[None, :]
    tl.store(out + place, total, (above < inner)[:, None] & (columns < outer)[None, :])


def _tiles(ends: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of each tile its group and first row; there are as many as could be needed, the last ones past their group."""
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    needed = (ends - starts + ROWS - 1) // ROWS
    behind = needed.cumsum(0)  # number of tiles up to and with each group
    tiles = torch.arange(-(-rows // ROWS) + len(ends), device=ends.device)
    group = torch.searchsorted(behind, tiles, right=True).clamp_max(len(ends) - 1)
    before = behind[group] - needed[group]
    return group.int(), (starts[group] + (tiles - before) * ROWS).int()


def _multiply(left: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    (rows, inner), outer = left.shape, weights.shape[2]
    out = left.new_empty(rows, outer)
    group, first = _tiles(ends, rows)
    with launching(left):
        _rows[(len(group), triton.cdiv(outer, OUTER))](  # pyright: ignore[reportIndexIssue]
            left.contiguous(), weights, out, group, first, ends.int(), inner, outer, *weights.stride(),
            ROWS=ROWS, INNER=INNER, OUTER=OUTER,
        )  # fmt: skip
    return out


class GroupedProduct(torch.autograd.Function):
    """(left [M, c] float32 with rows sorted by group, weights [G, c, n] float32, ends [G] int64) -> [M, n].

    `ends` are the running numbers of rows, so that ends[-1] = M. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(left, weights, ends)
        return _multiply(left, weights, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        left, weights, ends = ctx.saved_tensors
        upstream = gradients[0].contiguous()
        of_left = _multiply(upstream, weights.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        of_weights = None
        if ctx.needs_input_grad[1]:
            groups, inner, outer = weights.shape
            of_weights = left.new_empty(groups, inner, outer)
            grid = groups, triton.cdiv(inner, INNER), triton.cdiv(outer, OUTER)
            with launching(left):
                _outer[grid](  # pyright: ignore[reportIndexIssue]
                    left.contiguous(), upstream, of_weights, ends.int(), inner, outer,
                    ROWS=ROWS, INNER=INNER, OUTER=OUTER,
                )  # fmt: skip
        return of_left, of_weights, None
