"""Continual-learning metrics as pure functions of the accuracy matrix R. Imports no torch.

R[i][j] is the score on experience j after learning experience i (both counted from 0), None where it was not measured.
R has T rows, one for each experience learnt so far, and may have more columns than rows. Below, T - 1 is the last row
and "learnt" means j < T. Scores are shares in [0, 1] (accuracy) or positive numbers (perplexity).

Common rules:
    * `higher_is_better=False` (perplexity) turns every difference round, so that a positive transfer is always a gain
      and a positive forgetting always a loss; maxima and minima change places.
    * An experience that was never scored (it has no test rows) is left out of every mean.
    * A mean that needs a cell that was not measured is None: it is not replaced by a mean over fewer cells, which would
      not be comparable. Forgetting is the one exception, see there.
    * An empty mean is None. So forgetting and transfer after a single experience are None and not 0: nothing could be
      forgotten yet, and 0 would claim a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from ..errors import BadInput

Matrix = Sequence[Sequence[float | None]]
Probes = Mapping[int, Sequence[tuple[int, float]]]

LOWER_IS_BETTER = frozenset(
    {"forgetting", "intransigence", "windowed_forgetting", "class_forgetting", "worst_class_forgetting"}
)
HIGHER_IS_BETTER = frozenset(
    {"backward_transfer", "backward_transfer_clipped", "forward_transfer", "windowed_plasticity", "recovered_share"}
)
_COSTS = ("seconds", "bytes", "parameters", "steps", "passes", "samples", "rows", "flops_per_token", "flops_per_row")


def is_cost(name: str) -> bool:
    """True for figures of cost, in their own unit, of which less is better."""
    return name.endswith(_COSTS)


def direction(name: str, higher_is_better: bool) -> bool:
    """True if a larger value of the figure `name` is better; scores follow the run's own `higher_is_better`."""
    if name in LOWER_IS_BETTER or is_cost(name):
        return False
    return True if name in HIGHER_IS_BETTER else higher_is_better


# ---- reading R
def check_matrix(R: Any, name: str = "R") -> list[list[float | None]]:
    """R as floats and None, padded with None to a rectangle of at least as many columns as rows.

    Raises:
        BadInput: R is not a list of lists, or a cell is neither a finite number nor None; names row and column.
    """
    if not _is_list(R):
        raise BadInput(f"{name}: expected a list of rows, found {type(R).__name__}")
    for i, row in enumerate(R):
        if not _is_list(row):
            raise BadInput(f"{name}: row {i}: expected a list of scores, found {row!r}")
    width = max([len(R), *(len(row) for row in R)], default=0)
    rows = []
    for i, row in enumerate(R):
        cells = [_cell(value, f"{name}: row {i}, column {j}") for j, value in enumerate(row)]
        rows.append(cells + [None] * (width - len(cells)))
    return rows


def check_row(row: Any, name: str) -> list[float | None]:
    """One row of scores as floats and None.

    Raises:
        BadInput: as `check_matrix`; names the column.
    """
    if not _is_list(row):
        raise BadInput(f"{name}: expected a list of scores, found {row!r}")
    return [_cell(value, f"{name}: column {j}") for j, value in enumerate(row)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) or hasattr(value, "tolist")


def _cell(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadInput(f"{where}: expected a number or null, found {value!r}")
    if not math.isfinite(float(value)):
        raise BadInput(f"{where}: found {value!r}; a score must be finite, write null where none was measured")
    return float(value)


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values; None if there are none or one is missing."""
    kept = [v for v in values if v is not None]
    return math.fsum(kept) / len(kept) if kept and len(kept) == len(values) else None


def _gain(new: float | None, old: float | None, higher_is_better: bool) -> float | None:
    if new is None or old is None:
        return None
    return new - old if higher_is_better else old - new


def _scored(rows: list[list[float | None]]) -> list[int]:
    """Columns j < T with at least one measured cell."""
    return [j for j in range(len(rows)) if any(row[j] is not None for row in rows)]


# ---- accuracy
def row_averages(R: Matrix) -> list[float | None]:
    """A_i = mean over j <= i of R[i][j], for every row i: the curve of average accuracy over experiences."""
    rows = check_matrix(R)
    scored = _scored(rows)
    return [_mean([row[j] for j in scored if j <= i]) for i, row in enumerate(rows)]


def average_accuracy(R: Matrix) -> float | None:
    """A_T = (1/T) Σ_{j<T} R[T-1][j]: the last row over the experiences learnt (Lopez-Paz & Ranzato 2017, ACC)."""
    averages = row_averages(R)
    return averages[-1] if averages else None


def geometric_average(R: Matrix) -> float | None:
    """(Π_j R[T-1][j])^(1/T), of perplexities: each experience counts by its ratio, so that the worst does not drown the
    others. None where a score of the last row is missing or not above 0.
    """
    rows = check_matrix(R)
    values = [rows[-1][j] for j in _scored(rows)]
    if not values or any(value is None or value <= 0 for value in values):
        return None
    return math.exp(sum(math.log(value) for value in values if value) / len(values))


def average_incremental_accuracy(R: Matrix) -> float | None:
    """Ā = (1/T) Σ_i A_i, A_i = mean over j <= i of R[i][j] (Rebuffi et al. 2017, iCaRL).

    Rows before the first scored experience are left out.
    """
    rows = check_matrix(R)
    scored = _scored(rows)
    return _mean(row_averages(rows)[min(scored) :]) if scored else None


def learning_accuracy(R: Matrix) -> float | None:
    """LA = (1/T) Σ_j R[j][j]: how well each experience was learnt when it was new (Riemer et al. 2019)."""
    rows = check_matrix(R)
    return _mean([rows[j][j] for j in _scored(rows)])


def worst_experience(R: Matrix, higher_is_better: bool = True) -> float | None:
    """min over j < T of R[T-1][j] (the maximum for perplexity): the experience that fares worst in the end."""
    rows = check_matrix(R)
    if not rows:
        return None
    last = [rows[-1][j] for j in _scored(rows)]
    values = [v for v in last if v is not None]
    if not values or len(values) < len(last):
        return None
    return min(values) if higher_is_better else max(values)


# ---- what was lost, what was gained
def forgetting_per_experience(R: Matrix, higher_is_better: bool = True) -> list[float | None]:
    """f_j = max_{i<T-1} R[i][j] - R[T-1][j] for j < T - 1; perplexity: R[T-1][j] - min_{i<T-1} R[i][j].

    Negative where the last score is the best one. The maximum runs over the earlier cells that were measured, those
    before experience j was learnt included (Chaudhry et al. 2018, RWalk). Returns T - 1 entries, None where
    the last cell or every earlier one is missing.
    """
    rows = check_matrix(R)
    result: list[float | None] = []
    for j in range(len(rows) - 1):
        earlier = [row[j] for row in rows[:-1]]
        values = [v for v in earlier if v is not None]
        best = (max(values) if higher_is_better else min(values)) if values else None
        result.append(_gain(best, rows[-1][j], higher_is_better))
    return result


def forgetting(R: Matrix, higher_is_better: bool = True) -> float | None:
    """F = mean over j < T - 1 of f_j (Chaudhry et al. 2018, RWalk); see `forgetting_per_experience`.

    On a ragged R the mean runs over the experiences that have an earlier and a last score. None if there is none,
    as after one experience.
    """
    return _mean([f for f in forgetting_per_experience(R, higher_is_better) if f is not None])


def backward_transfer(R: Matrix, higher_is_better: bool = True) -> float | None:
    """BWT = 1/(T-1) Σ_{j<T-1} (R[T-1][j] - R[j][j]) (Lopez-Paz & Ranzato 2017); negative means forgetting."""
    rows = check_matrix(R)
    return _mean([_gain(rows[-1][j], rows[j][j], higher_is_better) for j in _scored(rows) if j < len(rows) - 1])


def backward_transfer_clipped(R: Matrix, higher_is_better: bool = True) -> float | None:
    """(1/T) Σ_{j<T} min(R[T-1][j] - R[j][j], 0): the form in TRACE's released code, never positive.

    It differs from TRACE's own definition: gains are clipped to 0 and the last experience counts in T.
    Published tables print its magnitude.
    """
    rows = check_matrix(R)
    gains = [_gain(rows[-1][j], rows[j][j], higher_is_better) for j in _scored(rows)]
    return _mean([None if g is None else min(g, 0.0) for g in gains])


def forward_transfer(R: Matrix, baseline: Sequence[float | None] | None, higher_is_better: bool = True) -> float | None:
    """FWT = 1/(T-1) Σ_{1<=j<T} (R[j-1][j] - b_j) (Lopez-Paz & Ranzato 2017).

    b_j is the score on experience j before any learning. None without a baseline, and where the protocol does not
    score the next experience.
    """
    rows = check_matrix(R)
    if baseline is None:
        return None
    base = check_row(baseline, "baseline")
    base += [None] * (len(rows) - len(base))
    return _mean([_gain(rows[j - 1][j], base[j], higher_is_better) for j in _scored(rows) if j > 0])


def transfer(R: Matrix) -> float | None:
    """X-TAIL Transfer = mean over 1 <= j < T of mean_{i<j} R[i][j]: scores on experiences not learnt yet."""
    rows = check_matrix(R)
    return _mean([_mean([rows[i][j] for i in range(j)]) for j in _scored(rows) if j > 0])


def average(R: Matrix) -> float | None:
    """X-TAIL Average = mean of R[i][j] over all i, j < T; needs every cell, those before learning included."""
    rows = check_matrix(R)
    return _mean([row[j] for row in rows for j in _scored(rows)])


def last(R: Matrix) -> float | None:
    """X-TAIL Last = mean_j R[T-1][j]; equal to `average_accuracy`."""
    return average_accuracy(R)


def intransigence(R: Matrix, joint: Sequence[float | None], higher_is_better: bool = True) -> float | None:
    """I = (1/T) Σ_j (a*_j - R[j][j]) (Chaudhry et al. 2018, RWalk): what was not learnt although joint training could.

    Args:
        joint: a*_j, the score on experience j of a model trained jointly on all experiences up to j.
    """
    rows = check_matrix(R)
    best = check_row(joint, "joint")
    best += [None] * (len(rows) - len(best))
    return _mean([_gain(best[j], rows[j][j], higher_is_better) for j in _scored(rows)])


def summary(
    R: Matrix, higher_is_better: bool = True, baseline: Sequence[float | None] | None = None
) -> dict[str, float | None]:
    """The `metrics` of a run's report: finite floats, or None where R does not hold the cells a figure needs."""
    rows = check_matrix(R)
    own = {} if higher_is_better else {"geometric_average": geometric_average(rows)}
    return own | {
        "average_accuracy": average_accuracy(rows),
        "average_incremental_accuracy": average_incremental_accuracy(rows),
        "forgetting": forgetting(rows, higher_is_better),
        "backward_transfer": backward_transfer(rows, higher_is_better),
        "forward_transfer": forward_transfer(rows, baseline, higher_is_better),
        "learning_accuracy": learning_accuracy(rows),
        "backward_transfer_clipped": backward_transfer_clipped(rows, higher_is_better),
        "worst_experience": worst_experience(rows, higher_is_better),
        "transfer": transfer(rows),
        "average": average(rows),
        "last": last(rows),
    }


# ---- between the boundaries: samples (step, value)
def _samples(samples: Any, name: str) -> list[tuple[int, float]]:
    points: list[tuple[int, float]] = []
    for n, sample in enumerate(samples):
        if not _is_list(sample) or len(sample) != 2:
            raise BadInput(f"{name}: sample {n}: expected a pair (step, value), found {sample!r}")
        step, value = (_cell(v, f"{name}: sample {n}") for v in sample)
        if step is None or value is None:
            raise BadInput(f"{name}: sample {n}: expected a pair of numbers, found {sample!r}")
        if step < 0 or points and step <= points[-1][0]:
            raise BadInput(f"{name}: sample {n}: step {step:g} does not follow the one before; order samples by step")
        points.append((int(step), value))
    return points


def anytime_accuracy(samples: Sequence[tuple[int, float]]) -> float | None:
    """A_auc = Σ_n a(s_n) (s_n - s_{n-1}) / s_N with s_0 = 0: area under the accuracy-to-step curve, per step.

    With evenly spaced samples it is their mean (Koh et al. 2022, CLIB, divided by the number of steps).

    Args:
        samples: (step, score on all classes seen by then), by rising step; a step is whatever unit the caller counts.
    """
    points = _samples(samples, "samples")
    if not points or points[-1][0] == 0:
        return None
    before = [0, *(step for step, _ in points[:-1])]
    return math.fsum(v * (s - b) for (s, v), b in zip(points, before, strict=True)) / points[-1][0]


def min_acc(probes: Probes, ends: Sequence[int], higher_is_better: bool = True) -> float | None:
    """min-ACC_k = 1/(k-1) Σ_{i<k} min over steps n > ends[i] of a_n(i) (De Lange et al. 2023).

    Args:
        probes: experience -> (step, score) by rising step; steps count training steps, not evaluations.
        ends: for each experience in order, the step at which it stopped being the current one.

    Returns:
        The mean worst score of old experiences (worst is the maximum for perplexity); None without an old experience
        or where one was not probed after its end.
    """
    worst = max if not higher_is_better else min
    minima: list[float | None] = []
    for i, end in enumerate(ends[:-1]):
        values = [v for s, v in _samples(probes.get(i, ()), f"probes of experience {i}") if s > end]
        minima.append(worst(values) if values else None)
    return _mean(minima)


def wc_acc(probes: Probes, ends: Sequence[int], higher_is_better: bool = True) -> float | None:
    """WC-ACC_k = (1/k) a(k) + (1 - 1/k) min-ACC_k (De Lange et al. 2023); a(k): last probe of the newest.

    With one experience, where no old one has a minimum, it is a(1).
    """
    k = len(ends)
    newest = _samples(probes.get(k - 1, ()), f"probes of experience {k - 1}")
    lowest = min_acc(probes, ends, higher_is_better) if k > 1 else 0.0
    if not newest or lowest is None:
        return None
    return newest[-1][1] / k + (1 - 1 / k) * lowest


RECOVERED = 0.95
"""Share of its level before the boundary at which an old experience counts as recovered."""


def recoveries(
    probes: Probes, ends: Sequence[int], share: float = RECOVERED, higher_is_better: bool = True
) -> list[tuple[int, int, int, bool]]:
    """How each old experience came through each later one (the stability gap in steps).

    The level of experience i before boundary e is its last probe at or before step ends[e]. It fell if a probe inside
    the next experience, ends[e] < n <= ends[e+1], is below share · level (perplexity: above level / share), and it has
    recovered at the first later probe there that is not.

    Args:
        probes, ends: as in `min_acc`.
        share: in (0, 1]; 1 asks for the whole level.

    Returns:
        (i, e, steps, recovered) for every i <= e < len(ends) - 1 with a level and a probe inside. Steps are counted
        from the boundary to the probe that has recovered: 0 where nothing fell; where it never came back, the length of
        the next experience, which is a lower bound. They are as fine as the distance between probes.

    Raises:
        BadInput: the share is outside (0, 1], or samples are not in order.
    """
    if not 0 < share <= 1:
        raise BadInput(f"share: found {share}; a share of the level lies in (0, 1]")
    found = []
    for i in range(len(ends) - 1):
        points = _samples(probes.get(i, ()), f"probes of experience {i}")
        for e in range(i, len(ends) - 1):
            before = [v for s, v in points if s <= ends[e]]
            inside = [(s, v) for s, v in points if ends[e] < s <= ends[e + 1]]
            if before and inside:
                bar = before[-1] * share if higher_is_better else before[-1] / share
                found.append((i, e, *_recovery(inside, bar, ends[e], ends[e + 1], higher_is_better)))
    return found


def _recovery(
    inside: Sequence[tuple[int, float]], bar: float, begin: int, end: int, higher_is_better: bool
) -> tuple[int, bool]:
    below = [v < bar if higher_is_better else v > bar for _, v in inside]
    if not any(below):
        return 0, True
    for (step, _), low in list(zip(inside, below, strict=True))[below.index(True) :]:
        if not low:
            return step - begin, True
    return end - begin, False


def recovery_steps(
    probes: Probes, ends: Sequence[int], share: float = RECOVERED, higher_is_better: bool = True
) -> float | None:
    """Mean over `recoveries` of the steps until an old experience was back; a lower bound where some never were."""
    return _mean([float(steps) for _, _, steps, _ in recoveries(probes, ends, share, higher_is_better)])


def recovered_share(
    probes: Probes, ends: Sequence[int], share: float = RECOVERED, higher_is_better: bool = True
) -> float | None:
    """Share of `recoveries` that were back before the next boundary, those that never fell included."""
    return _mean([float(back) for *_, back in recoveries(probes, ends, share, higher_is_better)])


def windowed_forgetting(probes: Probes, window: int, higher_is_better: bool = True) -> float | None:
    """WF^Δ = mean over experiences of the largest drop a_m - a_n, m < n, inside a window of Δ steps (n - m < Δ).

    De Lange et al. 2023. Windows count training steps, so that probing less often does not widen them.
    Negative where a score only rose; None without two probes in one window.
    """
    return _windowed(probes, window, higher_is_better)


def windowed_plasticity(probes: Probes, window: int, higher_is_better: bool = True) -> float | None:
    """WP^Δ = mean over experiences of the largest rise a_n - a_m, m < n, inside a window of Δ steps."""
    return _windowed(probes, window, not higher_is_better)


def _windowed(probes: Probes, window: int, drops: bool) -> float | None:
    if window < 2:
        raise BadInput(f"window: found {window}; a window needs at least 2 steps")
    largest: list[float] = []
    for i in sorted(probes):
        points = _samples(probes[i], f"probes of experience {i}")
        changes = []
        for at, (m, first) in enumerate(points):
            for n, second in points[at + 1 :]:
                if n - m >= window:
                    break
                changes.append(first - second if drops else second - first)
        if changes:
            largest.append(max(changes))
    return _mean(largest)
