"""Few candidates among many frozen keys: coarse scores find them, exact ones rank them.

The scores of all N keys cost T N d multiply-adds, and only k of them count. Codes of 8 bits (bfloat16 on accelerators)
give them within 1 % at a fraction of the cost; the candidates' own responses are then computed exactly. The joint norm
needs no key at all: ||A x||^2 = x^T (A^T A) x, with a [d, d] Gram matrix made once per growth.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 20
"""Numbers held at once: on a CPU the coarse scores of so many stay in its cache."""
_LEAST = 1e-30  # an all-zero row has codes of zero


class KeyIndex(NamedTuple):
    """What is computed once of frozen keys A [n, d] and read at every step.

    Attributes:
        gram: A^T A [d, d].
        codes: [n, d], int8 or bfloat16; None if no coarse search is wanted.
        steps: [n], what one unit of an int8 code is worth; None for bfloat16.
    """

    gram: Tensor
    codes: Tensor | None
    steps: Tensor | None


@torch.no_grad()
def index_keys(keys: Tensor, dtype: torch.dtype, coarse: bool) -> KeyIndex:
    """Args: keys [n, d]. dtype: of the responses, float32 or float64. coarse: also makes codes."""
    exact = keys.cpu().double()  # not every device has float64
    gram = (exact.t() @ exact).to(keys.device, dtype)
    if not coarse:
        return KeyIndex(gram, None, None)
    if keys.device.type != "cpu":
        return KeyIndex(gram, keys.to(torch.bfloat16), None)
    steps = keys.to(dtype).abs().amax(1).clamp_min(_LEAST) / 127
    return KeyIndex(gram, (keys / steps[:, None]).round_().to(torch.int8), steps)


@torch.no_grad()
def nearest(x: Tensor, index: KeyIndex, count: int) -> Tensor:
    """Numbers of `count` keys with large responses to each x, in rising order: [T, d] -> [T, count] int64."""
    assert index.codes is not None
    size = index.codes.shape[0]
    found = torch.empty(x.shape[0], count, dtype=torch.int64, device=x.device)
    at_once = max(32, _AT_ONCE // size) if x.device.type == "cpu" else x.shape[0]
    for start in range(0, x.shape[0], at_once):
        scores = _coarse(x[start : start + at_once], index)
        found[start : start + at_once] = _largest(scores, count)
    return found.sort(dim=1).values


def _coarse(x: Tensor, index: KeyIndex) -> Tensor:
    assert index.codes is not None
    if index.steps is None:
        return x.to(torch.bfloat16) @ index.codes.t()
    # Each row has a scale of its own, which cannot change the order of its scores and is not multiplied back.
    scale = 127 / x.abs().amax(1, keepdim=True).clamp_min(_LEAST)
    codes = (x * scale).round_().to(torch.int8)
    products = torch._int_mm(codes, index.codes.t())  # pyright: ignore[reportPrivateImportUsage]
    return products.to(index.steps.dtype).mul_(index.steps)


def _largest(scores: Tensor, count: int) -> Tensor:
    # The blocks with the largest maxima hold the largest scores; 0.9 of topk's time over whole rows.
    height, size = 16, scores.shape[1]
    if size % height or size < height * 2 * count:
        return torch.topk(scores, count, dim=-1, sorted=False).indices
    width = size // height
    blocks = torch.topk(scores.unflatten(1, (height, width)).amax(1), count, dim=-1, sorted=False).indices
    inside = (blocks.unsqueeze(1) + torch.arange(0, size, width, device=scores.device)[:, None]).flatten(1)
    return inside.gather(1, torch.topk(scores.gather(1, inside), count, dim=-1, sorted=False).indices)


@torch.no_grad()
def responses_of(x: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
    """a_i . x_t of chosen keys: [T, d], [n, d], [T, c] in rising order -> [T, c]."""
    tokens, count = chosen.shape
    if x.device.type == "cpu":
        # One pass over the chosen rows; gathering them first took ten times as long.
        starts = torch.arange(0, tokens * count + 1, count)
        return sampled_products(starts, chosen.flatten(), x, keys).reshape(tokens, count)
    return _gathered(x, keys, chosen)


def sampled_products(row_starts: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[row] . right[column] of chosen pairs on a CPU: [R + 1], [n] int64, [R, d], [C, d] -> [n]."""
    _expect_csr()
    empty = torch.sparse_csr_tensor(
        row_starts, columns, left.new_zeros(columns.shape), (left.shape[0], right.shape[0]), check_invariants=False
    )
    return torch.sparse.sampled_addmm(empty, left, right.t(), beta=0.0).values()


def _gathered(x: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
    step = max(1, _AT_ONCE * 4 // (chosen.shape[1] * keys.shape[1]))
    parts = zip(x.split(step), chosen.split(step), strict=True)
    return torch.cat([torch.bmm(keys[i], part.unsqueeze(-1)).squeeze(-1) for part, i in parts])


@functools.cache
def fused() -> Any:
    """The module of the Triton kernel; None where triton is not installed."""
    try:
        from . import fused
    except ImportError:
        return None
    return fused


@functools.cache
def grouped() -> Any:
    """The module of the Triton kernels for groups of rows; only where `fused_on`."""
    from . import grouped

    return grouped


def fused_on(device: torch.device) -> bool:
    """True where Triton kernels can run."""
    return fused() is not None and fused().runs_on(device)


@functools.cache
def _expect_csr() -> None:
    # torch says once per process that CSR tensors are new; nobody who trains a model can do anything about it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
