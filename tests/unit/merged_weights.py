"""What tests of methods share that merge into the host's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from perdure.streams import Experience
from tests.conformance import cases


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    now = model.state_dict()
    assert list(now) == list(before), "the model has tensors that it did not have"
    return {name for name in before if not torch.equal(now[name], before[name])}


def watch_merging(
    learner: Any, made: Sequence[Experience], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, float]]:
    """A list that fills at each merge: the largest change of an output by it, and by taking the branches out."""
    method = learner.methods[0]
    merge, found = method._merge, []

    def watched() -> int:
        if not method._handles:
            return merge()
        before = cases.outputs(learner, made)
        method._close()
        without = cases.outputs(learner, made)
        method._open()
        kept = merge()
        assert not method._handles
        after = cases.outputs(learner, made)
        found.append((float((after - before).abs().max()), float((without - before).abs().max())))
        return kept

    monkeypatch.setattr(method, "_merge", watched)
    return found
