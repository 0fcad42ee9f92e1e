"""Figures by avalanche-lib, scikit-learn, SciPy and NumPy, in an environment of their own (`benchmarks/agreement.py`).

python agreement_peers.py INPUTS.json OUTPUTS.json; imports nothing of perdure.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from importlib import metadata
from typing import Any

# What avalanche-lib imports beside its metrics and the metrics never call: they would be gigabytes.
LEFT_OUT = (
    "torchvision",
    "GPUtil",
    "gdown",
    "matplotlib",
    "psutil",
    "pytorchcv",
    "torchmetrics",
    "wandb",
    "pycocotools",
    "qpsolvers",
)
PEERS = ("avalanche-lib", "torch", "scikit-learn", "scipy", "numpy")


class Empty(type):
    """A class whose every attribute is such a class, for names that are imported and never used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return empty(name)


def empty(name: str) -> Any:
    return Empty(name, (), {"__init__": lambda self, *args, **options: None})


class EmptyModule(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return empty(name)


class LeaveOut(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in LEFT_OUT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return EmptyModule(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def of_avalanche(stream: dict[str, Any]) -> dict[str, Any]:
    """Its standalone metrics, updated as its plugins do: the first value of an experience is that after learning it."""
    import torch
    from avalanche.evaluation.metrics import Accuracy
    from avalanche.evaluation.metrics.class_accuracy import ClassAccuracy
    from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting
    from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer

    labels, count = stream["labels"], len(stream["labels"])

    def accuracy(predicted: list[list[int]], which: list[int]) -> float:
        metric = Accuracy()
        for j in which:
            metric.update(torch.tensor(predicted[j]), torch.tensor(labels[j]))
        return metric.result()

    cells = [[accuracy(after, [j]) for j in range(count)] for after in stream["predicted"]]
    untrained = [accuracy(stream["untrained"], [j]) for j in range(count)]
    lost, change, forward = Forgetting(), BWT(), ForwardTransfer()
    for j in range(count - 1):
        for metric in (lost, change):
            metric.update(j, cells[j][j], initial=True)
            metric.update(j, cells[-1][j])
    for j in range(1, count):
        forward.update(j, untrained[j], initial=True)
        forward.update(j, cells[j - 1][j])
    by_class = ClassAccuracy()
    for j in range(count):
        by_class.update(torch.tensor(stream["predicted"][-1][j]), torch.tensor(labels[j]), 0)

    def mean(found: dict[int, float]) -> float:
        return sum(found.values()) / len(found)

    return {
        "R": cells, "baseline": untrained, "average_accuracy": accuracy(stream["predicted"][-1], list(range(count))),
        "forgetting_since_learnt": mean(lost.result()), "backward_transfer": mean(change.result()),
        "forward_transfer": mean(forward.result()),
        "last_by_class": {str(name): float(value) for name, value in by_class.result()[0].items()},
    }  # fmt: skip


def of_sklearn(stream: dict[str, Any]) -> dict[str, Any]:
    """Cells and classes by scikit-learn; forgetting and the averages by NumPy, in one line each."""
    import numpy as np
    from sklearn.metrics import accuracy_score, recall_score

    labels = stream["labels"]
    R = np.array([[accuracy_score(labels[j], p[j]) for j in range(len(labels))] for p in stream["predicted"]])
    T = len(R)
    lower = np.tril(np.ones((T, T), dtype=bool))
    names = sorted({label for each in labels for label in each})
    by_class = []
    for i, predicted in enumerate(stream["predicted"]):
        seen = [label for each in labels[: i + 1] for label in each]
        guess = [label for each in predicted[: i + 1] for label in each]
        present = [name for name in names if name in seen]
        found = recall_score(seen, guess, labels=present, average=None, zero_division=0)
        by_class.append(dict(zip(map(str, present), found.tolist(), strict=True)))
    return {
        "R": R.tolist(),
        "forgetting": float((R[:-1, :-1].max(axis=0) - R[-1, :-1]).mean()),
        "average_incremental_accuracy": float((np.where(lower, R, 0).sum(axis=1) / np.arange(1, T + 1)).mean()),
        "learning_accuracy": float(np.trace(R) / T), "worst_experience": float(R[-1].min()),
        "transfer": float(np.mean([R[:j, j].mean() for j in range(1, T)])), "average": float(R.mean()),
        "by_class": by_class,
    }  # fmt: skip


def of_scipy(pair: dict[str, list[float]]) -> dict[str, Any]:
    from scipy import stats

    arm, reference = pair["arm"], pair["reference"]
    alone = stats.t.interval(0.95, len(arm) - 1, loc=sum(arm) / len(arm), scale=stats.sem(arm))
    paired = stats.ttest_rel(arm, reference).confidence_interval(0.95)
    return {"interval": [float(end) for end in alone], "paired": [float(paired.low), float(paired.high)]}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        inputs = json.load(file)
    for name in ("numpy", "torch", "sklearn.metrics", "scipy.stats"):
        importlib.import_module(name)
    sys.meta_path.append(LeaveOut())  # after all that is really used
    sys.modules["torch.utils.tensorboard"] = EmptyModule("torch.utils.tensorboard")
    outputs = {
        "versions": {name: metadata.version(name) for name in PEERS},
        "avalanche": [of_avalanche(stream) for stream in inputs["streams"]],
        "sklearn": [of_sklearn(stream) for stream in inputs["streams"]],
        "scipy": [of_scipy(pair) for pair in inputs["pairs"]],
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(outputs, file)


if __name__ == "__main__":
    main()
