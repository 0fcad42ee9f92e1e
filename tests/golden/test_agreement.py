"""perdure's figures against those that avalanche-lib, scikit-learn, SciPy and NumPy gave on the same predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.agreement import TOLERANCE, differences
from perdure.evaluation import metrics

KEPT = Path(__file__).parents[2] / "results" / "agreement.json"


@pytest.fixture(scope="module")
def kept():
    return json.loads(KEPT.read_text(encoding="utf-8"))


def test_every_figure_agrees(kept):
    found = differences(kept["inputs"], kept["peers"])
    assert set(found) == set(kept["largest_difference"]) and len(found) == 17
    assert [name for name, distance in found.items() if distance > TOLERANCE] == []


def test_a_wrong_formula_would_be_seen(kept, monkeypatch):
    """The same file with one metric spoilt: the last experience counted among the old ones."""
    monkeypatch.setattr(
        metrics, "forgetting", lambda R, higher=True: sum(r - s for r, s in zip(R[0], R[-1], strict=True))
    )
    found = differences(kept["inputs"], kept["peers"])
    assert [name for name, distance in found.items() if distance > TOLERANCE] == ["NumPy: forgetting"]
