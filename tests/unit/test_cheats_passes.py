"""Methods that train on rows more often than the protocol grants, or on rows that are there to judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cheating import Cheat, experiences, learner, replace

from perdure.config import EarlyStoppingConfig, TrainingConfig
from perdure.errors import ProtocolRefused
from perdure.protocol import check_granted
from perdure.registry import METHODS
from perdure.streams import FirstExperiences, Stream

ONE = {"passes": 1}
REFUSED = r"protocol\.passes: grants 1"


# ---- passes
def test_a_sampler_that_repeats_rows_is_refused() -> None:
    class Repeats(Cheat):
        def sampler(self, experience: Any) -> Any:
            return [*experience.train, *experience.train[:1]]

    (made,) = experiences(1)
    every = learner(Repeats(), protocol=ONE)
    with pytest.raises(ProtocolRefused, match=rf"{REFUSED}.*sampler of cheat .*2 times"):
        every.learn(made)
    assert every.position.phase == "boundary" and every.counters.steps == 0, "work began"
    learner(Repeats(), protocol={"passes": 2}).learn(made)
    learner(Repeats()).learn(made)


def test_rows_that_stand_twice_in_the_data_are_no_second_pass() -> None:
    class Chooses(Cheat):
        def sampler(self, experience: Any) -> Any:
            return list(reversed(experience.train))

    (made,) = experiences(1)
    learner(Chooses(), protocol=ONE).learn(replace(made, train=[*made.train, made.train[0]], hash=""))


def test_a_pretraining_of_more_passes_is_refused_before_work_starts() -> None:
    name, config = METHODS.parse({"finetune": {"pretrain": {"epochs": 3}}}, "method")[0]
    from perdure.config import ProtocolConfig

    with pytest.raises(ProtocolRefused, match=r"method\.finetune\.pretrain\.epochs: is 3, but the protocol grants 1"):
        check_granted([METHODS.get(name)(config)], ProtocolConfig(passes=1), TrainingConfig())


@pytest.mark.parametrize("how", ["extend", "repeat", "by hand"])
def test_a_batch_that_holds_rows_again_is_refused(how: str) -> None:
    class Thickens(Cheat):
        def before_step(self, batch: Any) -> Any:
            if how == "extend":
                return self.loop.extend(batch, list(batch.rows))
            if how == "repeat":
                return self.loop.repeat(self.loop.repeat(batch))
            inputs = {name: torch.cat([tensor, tensor]) for name, tensor in batch.inputs.items()}
            return replace(batch, inputs=inputs, labels=torch.cat([batch.labels] * 2), rows=[*batch.rows] * 2)

    (made,) = experiences(1)
    with pytest.raises(ProtocolRefused, match=REFUSED):
        learner(Thickens(), protocol=ONE).learn(made)


@pytest.mark.parametrize("method", [{"er": {"budget": 1, "per_step": 1}}, {"pcr": {"budget": 1, "per_step": 1}}])
def test_a_rehearsed_row_that_has_just_left_the_buffer_is_no_second_pass(method: Any) -> None:
    every = learner(method, protocol={**ONE, "rehearsal": 1}, per_device_train_batch_size=1)
    for made in experiences(2):
        every.learn(made)
    assert every.counters.steps == 16 and len(every.replay) == 1 and not every.replay.given


def test_one_more_view_of_each_row_in_its_step_is_no_pass() -> None:
    class Views(Cheat):
        def before_step(self, batch: Any) -> Any:
            return self.loop.repeat(batch)

    learner(Views(), protocol=ONE).learn(experiences(1)[0])


@pytest.mark.parametrize("when", ["after_step", "after_experience", "losses"])
def test_training_of_its_own_is_found(when: str) -> None:
    """Forward passes with gradients that the loop has not asked for."""

    class Trains(Cheat):
        def before_step(self, batch: Any) -> Any:
            self.batch = batch
            return batch

        def own(self, *_: Any) -> dict[str, Any]:
            output = self.loop.host.model(**self.batch.inputs).last_hidden_state
            loss = (output.mean((0, 1)) @ self.modules["vector"]["v"]).square()
            (slope,) = torch.autograd.grad(loss, [self.modules["vector"]["v"]])
            self.modules["vector"]["v"].data -= 0.1 * slope
            return {}

        def after_experience(self, experience: Any) -> None:
            self.own() if when == "after_experience" else None
            self.batch = None

    setattr(Trains, when, Trains.own) if when != "after_experience" else None
    (made,) = experiences(1)
    with pytest.raises(ProtocolRefused, match=rf"{REFUSED}.*4 rows .*gradients"):
        learner(Trains(), protocol=ONE).learn(made)


def test_counted_passes_are_left_alone() -> None:
    class Asks(Cheat):
        def after_experience(self, experience: Any) -> None:
            self.found = [
                len(list(self.loop.gradients(experience.train))),
                len(self.loop.class_statistics(experience.train)),
            ]

    every = learner(Asks(), protocol=ONE)
    every.learn(experiences(1)[0])
    assert every.methods[0].found == [1, 2] and every.counters.extra_passes == 2


# ---- tuning
def test_validation_rows_that_are_test_rows_decide_nothing() -> None:
    (made,) = experiences(1)
    leaky = replace(made, valid=(*made.valid, made.test[0]), hash="")
    every = learner("finetune", early_stopping={"every": 1, "patience": 1})
    with pytest.raises(ProtocolRefused, match=r"protocol\.tuning: .*1 of the 5 validation rows of 'domain0'"):
        every.learn(leaky)
    assert every.counters.steps == 0
    every.learn(made)


def test_early_stopping_needs_validation_rows_to_be_granted() -> None:
    with pytest.raises(ProtocolRefused, match=r"protocol\.tuning: is none, but training\.early_stopping"):
        learner("finetune", protocol={"tuning": "none"}, early_stopping=EarlyStoppingConfig().model_dump())
    learner("finetune", protocol={"tuning": "none"})


def test_whoever_tunes_is_given_a_stream_without_test_rows() -> None:
    made = experiences(3)
    stream = Stream.of(made, classes=[f"kind{n}" for n in range(6)])
    shown = FirstExperiences(stream, (0, 1))
    for seen, whole in zip(shown, made, strict=False):
        assert list(seen.train) == list(whole.train) and list(seen.valid) == list(whole.valid)
        assert not any(row["text"] in repr(vars(seen.test)) for row in whole.test)
        for read in (lambda test=seen.test: test[0], lambda test=seen.test: list(test)):
            with pytest.raises(ProtocolRefused, match=r"protocol\.tuning: test rows of experience \d"):
                read()
    every = learner("finetune", early_stopping={"every": 1, "patience": 1})
    every.learn(shown.experience(0))
    assert every.evaluate([shown.experience(0)], split="valid")[0] is not None
    with pytest.raises(ProtocolRefused, match=r"protocol\.tuning"):
        every.evaluate([shown.experience(0)])
    with pytest.raises(ProtocolRefused, match=r"protocol\.tuning: experience 2"):
        shown.experience(2)
