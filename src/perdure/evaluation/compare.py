"""Compares arms over seeds: means, 95 % t-intervals, differences paired by seed. Imports no torch, needs no SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BadInput
from .metrics import direction, intransigence

COMPARISON_SCHEMA = 1
CLAIM_SEEDS = 3
"""Fewer seeds are an illustration: with two, Student's interval is 12.7 standard errors wide on either side."""
MADE_BY = ("commit", "cpu", "device", "threads")
"""What of a run's environment decides whether its figures, seconds above all, stand beside those of another run."""
Report = Mapping[str, Any]
Interval = dict[str, float | None]

# What must be equal in every run of one comparison: (dotted field, why).
_SAME = (
    ("schema", "reports of different schemas do not hold the same figures"),
    ("stream", "another stream is another problem"),
    ("objective", "another objective is another problem"),
    ("metric", "scores of different metrics cannot be compared"),
    ("higher_is_better", "scores of different metrics cannot be compared"),
    ("details.stream.scenario", "another scenario is another problem"),
    ("details.stream.length", "another number of experiences is another problem"),
    ("details.stream.class_order", "another order of classes is another problem"),
    ("protocol", "arms that may see or store different things cannot be compared"),
)
# A stream may depend on the seed, so its content must agree among the runs of one seed only.
_SAME_PER_SEED = (
    ("details.stream.hash", "runs of one seed must learn the same rows in the same order"),
    ("details.stream.experiences", "runs of one seed must learn the same experiences"),
)


# ---- Student's t
def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with `df` degrees of freedom, by the regularised incomplete beta function."""
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return 1 - tail if t > 0 else tail


def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, to about 1e-12; by bisection on `t_cdf`.

    Raises:
        BadInput: p is not inside (0, 1) or df is not positive.
    """
    if not 0 < p < 1 or not df > 0:
        raise BadInput(f"t quantile: found p = {p}, df = {df}; p must lie inside (0, 1) and df above 0")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by the continued fraction of Lentz (Numerical Recipes, section 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 400):
        step = 1.0
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            step = c * d
            fraction *= step
        if abs(step - 1) < 1e-16:
            break
    return front * fraction / a


def interval(values: Sequence[float | None], level: float = 0.95) -> Interval:
    """Mean and t-interval over seeds: mean ± t_{(1+level)/2, n-1} s / √n.

    Returns:
        `mean`, `low`, `high`; low and high are None for one seed, all three where a value is missing.
    """
    kept = [float(v) for v in values if v is not None]
    n = len(kept)
    if n == 0 or n < len(values):
        return {"mean": None, "low": None, "high": None}
    mean = math.fsum(kept) / n
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in kept) / (n - 1))
    half = t_quantile((1 + level) / 2, n - 1) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired_difference(
    values: Mapping[int, float | None], reference: Mapping[int, float | None], higher_is_better: bool = True
) -> dict[str, Any] | None:
    """Arm minus reference, seed by seed.

    Args:
        values, reference: seed -> figure; only seeds with both figures make a pair.

    Returns:
        `mean`, `low`, `high` (95 % t-interval of the paired difference), `wins`, `losses`, `ties` counted from the
        arm's side, `pairs`; None without a pair.
    """
    pairs = [(v, r) for seed, v in sorted(values.items()) if v is not None and (r := reference.get(seed)) is not None]
    if not pairs:
        return None
    differences = [v - r for v, r in pairs]
    better = sum(d > 0 for d in differences)
    worse = sum(d < 0 for d in differences)
    wins, losses = (better, worse) if higher_is_better else (worse, better)
    counts = {"wins": wins, "losses": losses, "ties": len(pairs) - wins - losses, "pairs": len(pairs)}
    return {**interval(differences), **counts}


# ---- the comparison
def check_comparable(reports: Mapping[str, Report]) -> None:
    """Refuses runs that do not belong into one comparison.

    Args:
        reports: name of a run, for the message -> its report.

    Raises:
        BadInput: names the first field that differs, both values and both runs.
    """
    first: dict[Any, tuple[str, Any]] = {}
    for run, report in reports.items():
        for field, why in _SAME:
            _agree(first, field, field, run, _get(report, field), why)
        _agree(
            first, "classes", "details.stream.classes", run, _all_classes(report), "other classes are another problem"
        )
        for field, why in _SAME_PER_SEED:
            _agree(first, (field, report.get("seed")), field, run, _get(report, field), why)
        if report.get("status") != "complete":
            raise BadInput(f"status: run {run!r} is {report.get('status')!r}; finish it before comparing")


def _agree(first: dict[Any, tuple[str, Any]], key: Any, field: str, run: str, value: Any, why: str) -> None:
    other, expected = first.setdefault(key, (run, value))
    if value == expected:
        return
    if isinstance(value, Mapping) and isinstance(expected, Mapping):
        part = next(k for k in sorted({*value, *expected}) if value.get(k) != expected.get(k))
        field, value, expected = f"{field}.{part}", value.get(part), expected.get(part)
    raise BadInput(
        f"{field}: run {run!r} has {_short(value)}, run {other!r} has {_short(expected)}; {why}. "
        "Compare runs of one recipe, or rerun the one that differs"
    )


def _get(report: Report, dotted: str) -> Any:
    value: Any = report
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _all_classes(report: Report) -> list[str]:
    """Sorted; by class a stream holds the same ones for every seed, whatever their order. By domain rows are drawn."""
    if _get(report, "details.stream.scenario") not in ("class_incremental", "task_incremental"):
        return []
    return sorted({name for group in _get(report, "details.stream.classes") or () for name in group or ()})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def build_comparison(
    arms: Mapping[str, Sequence[Report]],
    *,
    recipe: str,
    reference: str | None = None,
    paths: Mapping[str, Sequence[str]] | None = None,
    tuning: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of comparison.json, schema 1.

    Args:
        arms: arm name -> reports of its runs, one for each seed.
        recipe: name of the recipe that was compared.
        reference: the arm that differences are taken to; the first arm when absent.
        paths, notes: arm name -> folders of its runs, in the order of the reports; one line shown beside the arm.
        tuning: how the arms' rates were found: `grid`, `trials`, `on`, `equal`.

    Returns:
        The contract's keys, and: `stream_details`, `tuning`, `pretraining` (arm -> what its backbone may have seen),
        `warnings` (lines about runs made by different code or machines); in each row `arm` (unique), `model`, `runs`
        (indices into `runs`), `values` (figure -> its values in the order of `seeds`), `made_by` (the different
        commits and machines of its runs) and `joint` (the arm of joint training that its `intransigence` is counted
        from, null without one). `environment` holds what all runs share; where they differ, the list of what was found.
        `runs` lists the rows' runs in order; `render_comparison` takes reports in that order.

    Raises:
        BadInput: no arm or an arm without runs, a seed twice, an unknown reference, or as `check_comparable`.
    """
    if not arms:
        raise BadInput("arms: is empty; a comparison needs at least one arm")
    reference = next(iter(arms)) if reference is None else reference
    if reference not in arms:
        raise BadInput(f"reference: {reference!r} is not an arm; arms: {', '.join(arms)}")
    arms, joint = _against_joint(arms)
    flat, rows = [], []
    for arm, reports in arms.items():
        labels = _labels(arm, reports, (paths or {}).get(arm))
        row = {**_row(arm, reports, (notes or {}).get(arm)), "joint": joint.get(arm)}
        rows.append({**row, "runs": list(range(len(flat), len(flat) + len(reports)))})
        flat += labels
    check_comparable({f"{arm}, seed {r['seed']}": r for arm, reports in arms.items() for r in reports})
    for row in rows:
        row["difference"] = None if row["arm"] == reference else _differences(arms[row["arm"]], arms[reference])
    some = arms[reference][0]
    environments = [report.get("environment") or {} for reports in arms.values() for report in reports]
    return {
        "schema": COMPARISON_SCHEMA,
        "recipe": recipe,
        "metric": some["metric"],
        "higher_is_better": some["higher_is_better"],
        "reference": reference,
        "illustration": any(len(row["seeds"]) < CLAIM_SEEDS for row in rows),
        "rows": rows,
        "protocol": some["protocol"],
        "stream": some["stream"],
        "stream_details": _get(some, "details.stream"),
        "environment": _shared(environments),
        "warnings": _unlike(environments),
        "tuning": dict(tuning) if tuning else None,
        "pretraining": {row["arm"]: _get(arms[row["arm"]][0], "details.pretraining.said") for row in rows},
        "runs": flat,
    }


def _against_joint(
    arms: Mapping[str, Sequence[Report]],
) -> tuple[dict[str, list[Report]], dict[str, str]]:
    """The arms with `intransigence` in their metrics where a joint arm has run, and arm -> that joint arm.

    a*_j is the last score on experience j of joint training with the same seed and, where there is one, the same head.
    Chaudhry et al. 2018 train a joint model for every j instead, which sees no class after it.
    """
    joint = {arm: reports for arm, reports in arms.items() if reports and _is_joint(reports[0])}
    found: dict[str, list[Report]] = {}
    used: dict[str, str] = {}
    for arm, reports in arms.items():
        found[arm] = list(reports)
        if not joint or arm in joint:
            continue
        head = reports[0]["head"] if reports else None
        used[arm] = next((name for name, others in joint.items() if others[0]["head"] == head), next(iter(joint)))
        best = {other["seed"]: other["matrix"][-1] for other in joint[used[arm]] if other["matrix"]}
        found[arm] = [
            {**r, "metrics": {**r["metrics"], "intransigence": _gap(r, best.get(r["seed"]))}} for r in reports
        ]
    return found, used


def _is_joint(report: Report) -> bool:
    return any(method.get("name") == "joint" for method in _get(report, "details.method") or [])


def _gap(report: Report, best: Sequence[float | None] | None) -> float | None:
    return None if best is None else intransigence(report["matrix"], best, report["higher_is_better"])


def _shared(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each fact once; a list where the runs differ in it."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in environments for key in one):
        values = _different([one.get(key) for one in environments])
        found[key] = values[0] if len(values) == 1 else values
    return found


def _unlike(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each fact of `MADE_BY` in which the runs differ."""
    lines = []
    for key in MADE_BY:
        values = [one.get(key) for one in environments]
        counts = [(value, values.count(value)) for value in _different(values)]
        if len(counts) > 1:
            told = ", ".join(f"{'not recorded' if v is None else v} ({n} run{'s' * (n > 1)})" for v, n in counts)
            lines.append(f"the runs differ in {key}: {told}; run all of them anew in another folder to rule that out")
    return lines


def _different(values: Sequence[Any]) -> list[Any]:
    return [value for n, value in enumerate(values) if value not in values[:n]]


def _labels(arm: str, reports: Sequence[Report], paths: Sequence[str] | None) -> list[str]:
    if not reports:
        raise BadInput(f"arms.{arm}: has no run; give at least one report")
    seeds = [r["seed"] for r in reports]
    twice = sorted({s for s in seeds if seeds.count(s) > 1})
    if twice:
        raise BadInput(f"arms.{arm}: seed {twice[0]} appears twice; each seed counts once")
    if paths is None:
        return [f"{arm}/seed-{seed}" for seed in seeds]
    if len(paths) != len(reports):
        raise BadInput(f"paths.{arm}: {len(paths)} paths for {len(reports)} reports; give one for each")
    return [str(path) for path in paths]


def _names(reports: Sequence[Report], block: str) -> list[str]:
    """Keys of a block, in order, that hold a number or null in some run."""
    names: dict[str, None] = {}
    for report in reports:
        for key, value in report[block].items():
            if value is None or isinstance(value, (int, float)) and not isinstance(value, bool):
                names[key] = None
    return list(names)


def _row(arm: str, reports: Sequence[Report], note: str | None) -> dict[str, Any]:
    first = reports[0]
    return {
        "arm": arm,
        "method": arm,  # the short name that a reader looks for; unique in a comparison
        "adapter": first["method"],
        "head": first["head"],
        "model": first["model"],
        "seeds": [r["seed"] for r in reports],
        "metrics": {n: interval([r["metrics"].get(n) for r in reports]) for n in _names(reports, "metrics")},
        "cost": {n: interval([r["cost"].get(n) for r in reports]) for n in _names(reports, "cost")},
        "values": {n: [r["metrics"].get(n) for r in reports] for n in _names(reports, "metrics")},
        "made_by": _different([{key: (r.get("environment") or {}).get(key) for key in MADE_BY} for r in reports]),
        "difference": None,
        "status": arm_status(first),
        "note": note or "",
    }


def arm_status(report: Report) -> str:
    """`upper bound` or `control` if a method of the run is one, else the methods' status, e.g. `unverified`."""
    statuses = [m.get("status") for m in _get(report, "details.method") or []]
    for special in ("upper bound", "control", "unverified"):
        if special in statuses:
            return special
    return next((s for s in statuses if s), "unverified")


def _differences(reports: Sequence[Report], reference: Sequence[Report]) -> dict[str, Any]:
    result = {}
    for block in ("metrics", "cost"):
        for name in _names(reports, block):
            mine = {r["seed"]: r[block].get(name) for r in reports}
            theirs = {r["seed"]: r[block].get(name) for r in reference}
            pair = paired_difference(mine, theirs, direction(name, reports[0]["higher_is_better"]))
            if pair is not None:
                result[name] = pair
    return result
