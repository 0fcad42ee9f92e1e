"""Interleaved A/B timing in one process: ratios that a slow or busy machine does not falsify. Imports no torch."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LEAST = 3
"""Pairs without which a median is none."""


@dataclass(frozen=True)
class Ratio:
    """Time of a over time of b, pair by pair.

    Attributes:
        median: median of the pairs' ratios; below 1, a is faster.
        low, high: 95 % bootstrap interval of that median.
        a_ms, b_ms: median milliseconds of each arm.
        pairs: number of pairs.
    """

    median: float
    low: float
    high: float
    a_ms: float
    b_ms: float
    pairs: int


def bootstrap_median(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of the median over resamples."""
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[min(int(0.975 * draws), draws - 1)]


def _once(function: Callable[[], Any], sync: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    sync()
    return time.perf_counter() - start


def compare(
    a: Callable[[], Any], b: Callable[[], Any], *, pairs: int, warmup: int = 3, sync: Callable[[], None] = lambda: None,
    seconds: float | None = None,
) -> Ratio:  # fmt: skip
    """Times a and b in turn, the order swapped from pair to pair, so that drift and neighbours hit both alike.

    With `seconds` it ends once they have passed, warm-up included, though not before one run to warm up and three
    pairs, or as many as `pairs` if that is less.
    """
    end = math.inf if seconds is None else time.perf_counter() + seconds
    for run in range(warmup):
        if run and time.perf_counter() > end:
            break
        a()
        b()
    sync()
    times_a, times_b = [], []
    for pair in range(pairs):
        if pair >= LEAST and time.perf_counter() > end:
            break
        if pair % 2:
            second = _once(b, sync)
            first = _once(a, sync)
        else:
            first = _once(a, sync)
            second = _once(b, sync)
        times_a.append(first)
        times_b.append(second)
    ratios = [x / y for x, y in zip(times_a, times_b, strict=True)]
    low, high = bootstrap_median(ratios)
    a_ms, b_ms = 1e3 * statistics.median(times_a), 1e3 * statistics.median(times_b)
    return Ratio(statistics.median(ratios), low, high, a_ms, b_ms, len(ratios))
