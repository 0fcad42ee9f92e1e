"""partial_fit with a spool: what arrived is on disk before it is learnt, and is learnt after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loop_methods import build, copied, differences

from perdure.errors import BadInput, CannotWrite, NonFiniteLoss
from perdure.state import RunLock
from perdure.streams import Spool
from tests.conformance import cases

SPEC = {"moram": {"rank": 2, "top_k": 2, "dropout": 0.1}}


def arrivals() -> list[list[Any]]:
    return [list(experience.train) for experience in cases.experiences("bert", 4, rows=8)]


class PowerCut(Exception):
    pass


def cut(learner: Any, after: int) -> None:
    """Lets the learner die in a step of its next arrival."""

    def before_step(batch: Any) -> Any:
        if learner.position.step == after:
            raise PowerCut
        return batch

    learner.methods[0].before_step = before_step


@pytest.mark.parametrize("after", [0, 1])
def test_what_arrived_before_a_crash_is_learnt_after_it(tmp_path: Path, after: int) -> None:
    rows = arrivals()
    whole = build(SPEC)
    for batch in rows:
        whole.partial_fit(batch, spool=tmp_path / "whole")
    killed = build(SPEC)
    killed.partial_fit(rows[0], spool=tmp_path / "spool")
    saved = copied(killed.state_dict())
    killed.partial_fit(rows[1], spool=tmp_path / "spool")
    cut(killed, after)
    with pytest.raises(PowerCut):
        killed.partial_fit(rows[2], spool=tmp_path / "spool")

    again = build(SPEC)
    again.load_state_dict(*saved)
    again.partial_fit(rows[3], spool=tmp_path / "spool")
    assert [past.name for past in again.history] == [f"arrival-{number}" for number in range(4)]
    assert differences(copied(again.state_dict()), copied(whole.state_dict())) == []


def test_catching_up_alone_and_a_learner_that_is_ahead(tmp_path: Path) -> None:
    rows, first = arrivals(), build(SPEC)
    for batch in rows[:2]:
        first.partial_fit(batch, spool=tmp_path)
    fresh = build(SPEC)
    fresh.partial_fit([], spool=tmp_path)
    assert differences(copied(fresh.state_dict()), copied(first.state_dict())) == []
    fresh.partial_fit(rows[2])  # without the spool
    fresh.partial_fit(rows[3], spool=tmp_path)
    assert [Spool(tmp_path).experience(index).name for index in range(3)] == ["arrival-0", "arrival-1", "arrival-3"]
    first.partial_fit(rows[2])
    first.partial_fit([], spool=tmp_path)
    assert first.position.experience == 4


def test_refused_rows_are_not_kept_and_those_that_stop_the_run_are(tmp_path: Path) -> None:
    rows, learner = arrivals(), build(SPEC, classes=["class0", "class1"])
    learner.partial_fit(rows[0], spool=tmp_path)
    size = (tmp_path / "spool.jsonl").stat().st_size
    for bad in (rows[1], [{"text": "a"}], [{"label": "class0"}], [{"text": object(), "label": "class0"}]):
        with pytest.raises(BadInput):
            learner.partial_fit(bad, spool=tmp_path)
        assert (tmp_path / "spool.jsonl").stat().st_size == size and learner.position.experience == 1

    learner.methods[0].losses = lambda batch, output: {"broken": output.logits.sum() * float("nan")}
    with pytest.raises(NonFiniteLoss):
        learner.partial_fit(rows[0], spool=tmp_path)
    assert len(Spool(tmp_path)) == 2


def test_a_folder_of_another_learner_is_refused(tmp_path: Path) -> None:
    rows, learner = arrivals(), build(SPEC)
    learner.partial_fit(rows[0])
    learner.partial_fit(rows[1], spool=tmp_path / "later")
    with pytest.raises(BadInput, match=r"partial_fit\.spool: .* goes on with arrival 1, this learner has learnt 0"):
        build(SPEC).partial_fit(rows[0], spool=tmp_path / "later")
    Spool(tmp_path / "other").add(cases.experiences("bert", 1)[0])
    with pytest.raises(BadInput, match=r"partial_fit\.spool: .* holds 'e0', no arrival"):
        learner.partial_fit(rows[0], spool=tmp_path / "other")
    with pytest.raises(BadInput, match="no training rows"):
        learner.partial_fit([])


def test_a_torn_call_is_cut_off(tmp_path: Path) -> None:
    rows, learner = arrivals(), build(SPEC)
    spool = Spool(tmp_path)
    spool.append(rows[0][0])  # the process died while it wrote the second row
    learner.partial_fit(rows[1], spool=tmp_path)
    assert len(Spool(tmp_path)) == 1 and len(Spool(tmp_path).experience(0).train) == len(rows[1])
    with pytest.raises(BadInput, match="0 experiences are closed"):
        Spool(tmp_path / "empty").retract()


def test_a_folder_that_another_call_is_in_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    learner, (first, *_) = build("finetune"), arrivals()
    before = copied(learner.state_dict())
    with RunLock(tmp_path), pytest.raises(CannotWrite, match="is in use by another"):
        learner.partial_fit(first, spool=tmp_path)
    assert differences(copied(learner.state_dict()), before) == []
    assert len(Spool(tmp_path)) == 0
    learner.partial_fit(first, spool=tmp_path)
    assert len(Spool(tmp_path)) == 1
