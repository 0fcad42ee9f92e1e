"""Responses, their joint norm and the k largest in one Triton kernel: no [T, N] array is ever written.

Exact like the search that writes it: all keys are scored in float32. What is saved is memory traffic, T N numbers
written and read again by the norm, the selection and the backward pass. Checked in Triton's interpreter; NOT MEASURED
on a GPU. Importing this module imports triton.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TOKENS, KEYS, FEATURES = 32, 64, 32
"""Sides of a tile: of x, of the keys, and of what both share."""


def runs_on(device: torch.device) -> bool:
    """True for GPUs, and for CPUs under Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def launching(tensor: Tensor) -> Any:
    """Triton launches on the current device, not on that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _tile(
    x, keys, rows, columns, tokens, size, width, TOKENS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr
):
    """p [TOKENS, KEYS] = x[rows] . keys[columns]."""
    p = tl.zeros([TOKENS, KEYS], tl.float32)
    for start in range(0, width, FEATURES):
        shared = start + tl.arange(0, FEATURES)
        within = shared[None, :] < width
        left = tl.load(x + rows[:, None] * width + shared[None, :], (rows[:, None] < tokens) & within, other=0.0)
        right = tl.load(
            keys + columns[:, None] * width + shared[None, :], (columns[:, None] < size) & within, other=0.0
        )
        p = tl.dot(left, tl.trans(right), acc=p, input_precision="ieee")
    return p


@triton.jit
def _keep_best(p, first, best, number, k, KEYS: tl.constexpr, PLACES: tl.constexpr):
    """The k largest of `best` and of a tile; among equals the lowest number stays."""
    inside, places = tl.arange(0, KEYS), tl.arange(0, PLACES)
    for _ in range(k):
        value, at = tl.max(p, 1, return_indices=True, return_indices_tie_break_left=True)
        worst = tl.min(best, 1)
        candidates = tl.where((best == worst[:, None]) & (places[None, :] < k), number, -2)
        place = tl.argmax(candidates, 1)
        here = (places[None, :] == place[:, None]) & (value > worst)[:, None]
        best = tl.where(here, value[:, None], best)
        number = tl.where(here, (first + at)[:, None], number)
        p = tl.where(inside[None, :] == at[:, None], float("-inf"), p)
    return best, number


@triton.jit
def _select(
    x, old_keys, new_keys, best_out, number_out, square_out, tokens, width, old, new, k,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    rows, places = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, PLACES)
    # A place beyond k is never the worst one.
    best = tl.where(places[None, :] < k, float("-inf"), float("inf")) + tl.zeros([TOKENS, PLACES], tl.float32)
    number = tl.zeros([TOKENS, PLACES], tl.int32) - 1
    square = tl.zeros([TOKENS], tl.float32)
    for part in tl.static_range(2):
        keys, size, before = (old_keys, old, 0) if part == 0 else (new_keys, new, old)
        for start in range(0, size, KEYS):
            columns = start + tl.arange(0, KEYS)
            p = _tile(x, keys, rows, columns, tokens, size, width, TOKENS, KEYS, FEATURES)
            square += tl.sum(p * p, 1)  # rows and columns outside are zero
            p = tl.where(columns[None, :] < size, p, float("-inf"))
            best, number = _keep_best(p, before + start, best, number, k, KEYS, PLACES)
    wanted = (rows[:, None] < tokens) & (places[None, :] < k)
    tl.store(best_out + rows[:, None] * k + places[None, :], best, wanted)
    tl.store(number_out + rows[:, None] * k + places[None, :], number, wanted)
    tl.store(square_out + rows, square, rows < tokens)


@torch.no_grad()
def select(x: Tensor, old_keys: Tensor, new_keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest responses of each token among the atoms of both parts, old ones numbered first.

    Args:
        x: [T, d] float32. old_keys: [n, d]. new_keys: [r, d]. k: at most n + r.
    Returns:
        responses [T, k] in falling order, the lowest number first among equals; numbers [T, k] int64; ||A x||^2 [T].
    """
    x, old_keys, new_keys = x.contiguous(), old_keys.contiguous(), new_keys.contiguous()
    tokens, width = x.shape
    best, square = x.new_empty(tokens, k), x.new_empty(tokens)
    numbers = torch.empty(tokens, k, dtype=torch.int32, device=x.device)
    with launching(x):
        _select[(triton.cdiv(tokens, TOKENS),)](  # pyright: ignore[reportIndexIssue]
            x, old_keys, new_keys, best, numbers, square, tokens, width, old_keys.shape[0], new_keys.shape[0], k,
            TOKENS=TOKENS, KEYS=KEYS, FEATURES=FEATURES, PLACES=triton.next_power_of_2(k),
        )  # fmt: skip
    numbers, order = numbers.long().sort(dim=1)  # so that the stable sort puts the lowest number first
    best, place = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, numbers.gather(1, place), square
