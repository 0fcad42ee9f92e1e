"""Names and number formats that the terminal and the page share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evaluation.metrics import direction, is_cost

DASH = "–"
MOST_LISTED = 24
MOST_CHARS = 400
SOME = frozenset({"geometric_average", "intransigence", "anytime_accuracy"})
"""Scores whose columns stand only where an arm has them; so do all columns of cost."""
DIFFERENCES = frozenset(
    {"forgetting", "backward_transfer", "backward_transfer_clipped", "forward_transfer", "intransigence"}
    | {"windowed_forgetting", "windowed_plasticity", "class_forgetting", "worst_class_forgetting"}
)
# The columns of a comparison: (block, figure).
COLUMNS = (
    ("metrics", "average_accuracy"),
    ("metrics", "geometric_average"),
    ("metrics", "forgetting"),
    ("metrics", "learning_accuracy"),
    ("metrics", "intransigence"),
    ("metrics", "anytime_accuracy"),
    ("cost", "trainable_parameters"),
    ("cost", "stored_bytes"),
    ("cost", "seconds"),
)
COMPARED = ("average_accuracy", "forgetting", "learning_accuracy")
"""Figures whose differences to the reference are shown; the comparison's JSON and CSV hold all."""
_LABELS = {
    "average_accuracy": "Average {m}",
    "geometric_average": "Geometric average {m}",
    "average_incremental_accuracy": "Average incremental {m}",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
    "backward_transfer_clipped": "Backward transfer, gains clipped",
    "forward_transfer": "Forward transfer",
    "learning_accuracy": "Learning {m}",
    "worst_experience": "Worst experience",
    "transfer": "Transfer (X-TAIL)",
    "average": "Average (X-TAIL)",
    "last": "Last (X-TAIL)",
    "anytime_accuracy": "Anytime {m}",
    "min_acc": "Lowest {m} of old experiences (min-ACC)",
    "wc_acc": "Worst-case {m} (WC-ACC)",
    "windowed_forgetting": "Largest drop in a window (WF)",
    "windowed_plasticity": "Largest rise in a window (WP)",
    "recovery_steps": "Steps until an old experience was back",
    "recovered_share": "Share that came back before the next boundary",
    "validation_average": "Average {m} on validation rows",
    "worst_class": "Worst class",
    "class_forgetting": "Forgetting of a class",
    "worst_class_forgetting": "Largest forgetting of a class",
    "probe_seconds": "Time of probes",
    "probe_share": "Share of probes in all time",
    "growth_bytes": "Growth per experience",
    "train_flops_per_row": "FLOPs per row, training step",
    "train_flops_per_token": "FLOPs per token, training step",
    "inference_flops_per_row": "FLOPs per row, prediction",
    "inference_flops_per_token": "FLOPs per token, prediction",
    "step_peak_bytes": "Most tensor memory in a training step",
    "device_peak_bytes": "Most memory allocated on the device",
    "intransigence": "Intransigence",
    "trainable_parameters": "Trainable parameters",
    "total_parameters": "All parameters",
    "stored_bytes": "Stored",
    "seconds": "Training time",
    "evaluation_seconds": "Evaluation time",
    "samples": "Rows trained on",
    "extra_rows": "Rows of extra passes",
    "steps": "Optimizer steps",
    "extra_passes": "Extra passes",
    "feature_drift": "Drift of old features (cosine distance)",
    "output_ratio": "Memory output against the layer's own",
    "closed_share": "Share of tokens with no item open",
}
HINTS = {
    "average_accuracy": "over all experiences, at the end",
    "average_incremental_accuracy": "mean of the averages after each experience",
    "forgetting": "lost since the best score, mean over old experiences",
    "learning_accuracy": "on each experience just after learning it",
    "backward_transfer": "change since just learnt; negative is loss",
    "forward_transfer": "on the next experience, against no learning",
    "worst_experience": "lowest final score",
    "anytime_accuracy": "mean over training of the average on what was met",
}


def columns(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The columns that this comparison fills: (block, figure)."""

    def filled(block: str, name: str) -> bool:
        return any((row[block].get(name) or {}).get("mean") is not None for row in comparison["rows"])

    return [(block, name) for block, name in COLUMNS if name not in SOME and block != "cost" or filled(block, name)]


def percent(metric: str) -> bool:
    """Whether scores of a metric lie in [0, 1] and are shown in per cent, their differences in points."""
    return metric in ("accuracy", "score")


def label(name: str, metric: str = "accuracy") -> str:
    """What a reader sees for a figure's key; unknown keys lose their underscores."""
    known = _LABELS.get(name)
    if known is not None:
        return known.format(m=metric)
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def unit(name: str, metric: str = "accuracy") -> str:
    """What stands behind a score: per cent, points for differences, nothing for perplexity."""
    if not percent(metric) or is_cost(name) or name.endswith("_share"):
        return ""
    return "points" if name in DIFFERENCES else "%"


def minus(text: str) -> str:
    return text.replace("-", "\u2212")


def score(value: float | None, metric: str = "accuracy", digits: int = 1) -> str:
    """A score: accuracy in per cent without the sign, perplexity as it is."""
    if value is None:
        return DASH
    if percent(metric):
        return minus(_plain(f"{100 * value:.{digits}f}"))
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return minus(_plain(f"{value:,.{digits}f}"))


def _plain(text: str) -> str:
    # "-0.0" is a rounding of nothing.
    return text.lstrip("-") if text.startswith("-") and not text.strip("-0.,") else text


def count(value: float | None) -> str:
    if value is None:
        return DASH
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,.0f}"


def work(value: float) -> str:
    """FLOPs with a prefix."""
    for unit_size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit_size:
            return f"{value / unit_size:.3g} {prefix}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    if value is None:
        return DASH
    for unit_size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit_size:
            return f"{value / unit_size:.3g} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    if value is None:
        return DASH
    if value < 90:
        return f"{value:.3g} s"
    if value < 5400:
        return f"{value / 60:.3g} min"
    return f"{value / 3600:.3g} h"


def figure(name: str, value: Any, metric: str = "accuracy") -> str:
    """Any figure of a report as text in its own unit."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text(value)
    if name == "seconds" or name.endswith("_seconds"):
        return seconds(value)
    if name.endswith("bytes"):
        return size(value)
    if name.endswith("parameters"):
        return count(value)
    if "flops" in name:
        return work(value)
    if name.endswith("_share"):
        return f"{100 * value:.3g} %"
    return count(value) if is_cost(name) else score(value, metric)


def number(value: Any) -> str:
    """A figure without a unit, to four significant digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text(value)
    if isinstance(value, int):
        return minus(f"{value:,}")
    return minus(f"{value:.4g}")


def text(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {text(v)}" for k, v in value.items()) or DASH
    if isinstance(value, (list, tuple)):
        if len(value) > 2 and all(v == value[0] for v in value):
            return f"{text(value[0])} ({len(value)} times)"
        if len(value) > MOST_LISTED:
            return f"{', '.join(text(v) for v in value[:MOST_LISTED])} … ({len(value)} in all)"
        return ", ".join(text(v) for v in value) or DASH
    shown = repr(value) if isinstance(value, float) else str(value)
    return shown if len(shown) <= MOST_CHARS else shown[:MOST_CHARS] + "…"


def interval(name: str, entry: Mapping[str, Any] | None, metric: str = "accuracy") -> str:
    """`mean ± half of the interval`; the mean alone for one seed."""
    if not entry or entry["mean"] is None:
        return DASH
    shown = figure(name, entry["mean"], metric)
    if entry["low"] is None or entry["high"] is None or is_cost(name):
        return shown
    half = (entry["high"] - entry["low"]) / 2
    return f"{shown}\u00a0±\u00a0{score(half, metric)}"


def signed(name: str, value: float | None, metric: str = "accuracy") -> str:
    shown = figure(name, value, metric)
    return f"+{shown}" if value is not None and value > 0 and shown.strip("0.") else shown


def compared(comparison: Mapping[str, Any]) -> list[str]:
    """Figures of `COMPARED` in which some arm has a difference to the reference."""
    return [name for name in COMPARED if any(name in (row["difference"] or {}) for row in comparison["rows"])]


def class_order(comparison: Mapping[str, Any]) -> str:
    """Whether the intervals over seeds hold the spread over orders of the classes."""
    if (comparison.get("stream_details") or {}).get("class_order") == "seed":
        return (
            "Each seed has an order of classes of its own: intervals hold the spread over orders. Shown is the first."
        )
    return (
        "All seeds have the same order of classes: intervals hold the spread over draws and starts, not over orders. "
        "stream.class_order=seed varies the order too."
    )


def in_points(metric: str) -> str:
    return ", in points" if percent(metric) else ""


def difference(name: str, found: Mapping[str, Any] | None, metric: str = "accuracy") -> tuple[str, str]:
    """A paired difference with its interval, and `wins : losses`."""
    if not found:
        return DASH, DASH
    shown = signed(name, found["mean"], metric)
    if found["low"] is not None:
        shown += f" [{signed(name, found['low'], metric)}, {signed(name, found['high'], metric)}]"
    return shown, f"{found['wins']} : {found['losses']}" if "wins" in found else DASH


def few_seeds(comparison: Mapping[str, Any]) -> str:
    """How many seeds the arm with the fewest has."""
    fewest = min(len(row["seeds"]) for row in comparison["rows"])
    return "one seed" if fewest == 1 else f"{fewest} seeds"


def best_cells(comparison: Mapping[str, Any]) -> set[tuple[int, str]]:
    """(row, figure) of the best value of each column, as shown; upper bounds do not compete, ties all count."""
    best: set[tuple[int, str]] = set()
    honest = [(i, row) for i, row in enumerate(comparison["rows"]) if row["status"] != "upper bound"]
    for block, name in COLUMNS:
        means = {i: (row[block].get(name) or {}).get("mean") for i, row in honest}
        kept = {i: m for i, m in means.items() if m is not None}
        if not kept:
            continue
        top = (max if direction(name, comparison["higher_is_better"]) else min)(kept.values())
        shown = figure(name, top, comparison["metric"])
        best |= {(i, name) for i, m in kept.items() if figure(name, m, comparison["metric"]) == shown}
    return best
