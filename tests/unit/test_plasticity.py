"""Drift, output size and closed tokens on tensors worked by hand."""

from __future__ import annotations

import pytest
import torch

from perdure.errors import BadInput
from perdure.evaluation.plasticity import closed_share, feature_drift, output_ratio


def test_feature_drift():
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert feature_drift(before, before) == 0.0
    assert feature_drift(before, 5 * before) == pytest.approx(0.0, abs=1e-12)
    # Unmoved, turned by 90 degrees, turned round: 0, 1, 2.
    after = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert feature_drift(before, after) == pytest.approx(1.0)
    with pytest.raises(BadInput, match="same"):
        feature_drift(before, after[:2])
    with pytest.raises(BadInput, match="no row"):
        feature_drift(before[:0], after[:0])


def test_output_ratio():
    base = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    adapter = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    assert output_ratio(adapter, base) == pytest.approx((0.2 + 1.0) / 2)
    assert output_ratio(adapter, base, torch.tensor([[True, False]])) == pytest.approx(0.2)
    with pytest.raises(BadInput, match="no token"):
        output_ratio(adapter, base, torch.tensor([[False, False]]))
    with pytest.raises(BadInput, match="mask"):
        output_ratio(adapter, base, torch.tensor([True]))
    with pytest.raises(BadInput, match="adapter"):
        output_ratio(adapter[..., :1], base)


def test_closed_share():
    weights = torch.tensor([[[0.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 0.0]]])
    assert closed_share(weights) == 0.5
    assert closed_share(weights, torch.tensor([[True, True], [True, False]])) == pytest.approx(1 / 3)
