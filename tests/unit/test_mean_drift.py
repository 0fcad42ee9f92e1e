"""Drift of old features costs a boundary no more for a long stream, and means the same for a short one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from perdure.evaluation.plasticity import feature_drift
from perdure.run_accounts import COMPARED_ROWS, PROBE_ROWS, mean_drift


def setting(experiences: int):
    generator = torch.Generator().manual_seed(0)
    now = torch.randn(experiences, 40, 6, generator=generator)
    before = {index: torch.randn(PROBE_ROWS, 6, generator=generator) for index in range(experiences)}
    asked: list[tuple[int, int]] = []

    def features(rows):
        asked.extend(rows)
        return torch.stack([now[index, number] for index, number in rows])

    stream = SimpleNamespace(experience=lambda index: SimpleNamespace(train=[(index, n) for n in range(40)]))
    return SimpleNamespace(features=features), stream, before, now, asked


@pytest.mark.parametrize("experiences", [1, 3, 8])
def test_a_short_stream_compares_all_probe_rows(experiences):
    learner, stream, before, now, asked = setting(experiences)
    have = mean_drift(learner, stream, before)  # type: ignore[arg-type]
    each = [feature_drift(before[index], now[index, :PROBE_ROWS]) for index in before]
    assert have == pytest.approx(sum(each) / len(each))
    assert len(asked) == experiences * PROBE_ROWS


@pytest.mark.parametrize("experiences", [9, 50, 300])
def test_a_long_stream_compares_a_bounded_number_of_rows_of_every_experience(experiences):
    learner, stream, before, now, asked = setting(experiences)
    have = mean_drift(learner, stream, before)  # type: ignore[arg-type]
    most = max(1, COMPARED_ROWS // experiences)
    assert {index for index, _ in asked} == set(before) and len(asked) == most * experiences
    each = [feature_drift(before[index][:most], now[index, :most]) for index in before]
    assert have == pytest.approx(sum(each) / len(each))


def test_the_first_experience_has_nothing_to_compare():
    learner, stream, *_ = setting(1)
    assert mean_drift(learner, stream, {}) is None  # type: ignore[arg-type]
