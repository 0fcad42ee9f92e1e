"""Early stopping: where it ends, what it puts back, and that a resumed run ends alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loop_methods import copied, differences

from perdure.early_stopping import EarlyStopping
from perdure.errors import BadInput
from perdure.learner import Learner
from tests.conformance import cases

STOP = {"every": 2, "patience": 2}


def build(host: str = "bert", method: Any = "finetune", rate: float = 1e-2, **settings: Any) -> Learner:
    model, processor = cases.build_host(host, dropout=0.1)
    training = {
        "learning_rate": rate, "per_device_train_batch_size": 4, "epochs": 8, "early_stopping": STOP,
        "logging_steps": 1,
        **settings.pop("training", {}),
    }  # fmt: skip
    limit = {"bert": {"max_length": 32}, "gpt2": {"block_size": 32}, "clip": {"max_length": 32}}.get(host, {})
    return Learner(
        model, processor, method=method, objective={cases.OBJECTIVE[host]: limit}, training=training,
        protocol={"rehearsal": 12, "passes": 8, "mask": "seen", **settings.pop("protocol", {})}, seed=3, **settings,
    )  # fmt: skip


def experiences(host: str = "bert", count: int = 2) -> list[Any]:
    return [replace(made, valid=made.test, test=()) for made in cases.experiences(host, count, rows=12)]


def looks(learner: Learner, experience: Any) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Validation losses at each look, and the values of everything that trains after each step."""
    losses, values = [], []
    measured = EarlyStopping.after_step

    def spy(self: EarlyStopping, loop: Any, step: int) -> None:
        measured(self, loop, step)
        values.append({name: p.detach().clone() for name, p in loop.optimization.named})
        losses.append(self.loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStopping, "after_step", spy)
        learner.learn(experience)
    return losses, values


@pytest.mark.parametrize("host", ["bert", "gpt2", "clip"])
def test_it_ends_early_and_puts_the_best_back(host: str) -> None:
    learner, (made, _) = build(host, rate=0.3), experiences(host)
    stopped: dict[str, Any] = {}
    restore = EarlyStopping.restore

    def kept(self: EarlyStopping, named: Any) -> None:
        stopped.update(step=self.step, loss=self.loss, values=dict(self.values), over=self.over)
        restore(self, named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStopping, "restore", kept)
        losses, values = looks(learner, made)
    assert stopped["over"] and learner.counters.steps == stopped["step"] + 4 < learner.steps_planned == 24
    assert stopped["loss"] == min(losses)
    at_best, now = values[stopped["step"] - 1], dict(learner.named_trainable())
    assert any(not torch.equal(at_best[name], values[-1][name]) for name in at_best), "nothing moved after the best"
    assert all(torch.equal(at_best[name], now[name]) for name in at_best)
    learner.learn(experiences(host)[1])  # the next one begins anew


def test_with_patience_enough_all_steps_are_taken_and_the_last_one_is_looked_at() -> None:
    learner, (made, _) = build(rate=1e-4, training={"early_stopping": {"every": 7, "patience": 9}}), experiences()
    losses, _ = looks(learner, made)
    assert learner.counters.steps == 24 and losses[-1] < losses[-2] < losses[6], "the last step is a look of its own"


def test_looking_changes_nothing() -> None:
    (made, _), plain = experiences(), build(rate=1e-4, training={"early_stopping": None})
    plain.learn(made)
    looking = build(rate=1e-4, training={"early_stopping": {"every": 1, "patience": 24}})
    _, values = looks(looking, made)
    assert len(values) == plain.counters.steps == 24
    assert all(torch.equal(parameter, values[-1][name]) for name, parameter in plain.named_trainable())


@pytest.mark.parametrize("method", ["finetune", {"moram": {"rank": 2, "top_k": 2}}, [{"lora": {"rank": 2}}, "er"]])
def test_a_resumed_experience_ends_alike(method: Any) -> None:
    if isinstance(method, list):
        method = [method[0], {"er": {"budget": 8, "per_step": 2}}]
    made, states = experiences(), []
    whole = build(method=method, rate=0.1)

    def on_step(loop: Any, _: Any) -> None:
        states.append(copied(loop.state_dict()))

    for experience in made:
        whole.learn(experience, on_step=on_step)
    end = copied(whole.state_dict())
    assert len(states) < 48, "nothing was stopped"
    for state in states[::3] + states[-1:]:  # the last one: stopped, but not put back yet
        fresh = build(method=method, rate=0.1)
        fresh.load_state_dict(*copied(state))
        for experience in made[fresh.position.experience :]:
            fresh.learn(experience)
        assert differences(copied(fresh.state_dict()), end) == []


def test_without_what_it_has_seen_a_resumed_experience_ends_elsewhere() -> None:
    """The state's own field is needed: the test above could not fail for want of a difference."""
    made, states = experiences(), []
    whole = build(rate=0.1)
    whole.learn(made[0], on_step=lambda loop, _: states.append(copied(loop.state_dict())))
    tensors, values = states[-1]
    values.pop("early")
    fresh = build(rate=0.1)
    fresh.load_state_dict({name: t for name, t in tensors.items() if not name.startswith("early")}, values)
    fresh.learn(made[0])
    assert differences(copied(fresh.state_dict()), copied(whole.state_dict())) != []


def test_refusals() -> None:
    with pytest.raises(BadInput, match="early_stopping: the stream has no boundaries"):
        build(protocol={"boundaries": "none"})
    with pytest.raises(BadInput, match="early_stopping: joint trains on all experiences together"):
        build(method=["finetune", "joint"])
    with pytest.raises(BadInput, match=r"early_stopping\.every"):
        build(training={"early_stopping": {"every": 0}})
    learner = build()
    before = copied(learner.state_dict())
    with pytest.raises(BadInput, match="has no validation rows; set stream.validation"):
        learner.learn(cases.experiences("bert", 1)[0])
    assert differences(copied(learner.state_dict()), before) == []


def test_pretraining_has_passes_of_its_own_and_is_not_stopped() -> None:
    method = {"finetune": {"pretrain": {"learning_rate": 0.3, "epochs": 3}}}
    learner, made = build("gpt2", method, rate=0.3), experiences("gpt2")
    learner.learn(replace(made[0], valid=()))
    assert learner.counters.steps == learner.steps_planned == 9
    learner.learn(made[1])
    assert learner.steps_planned == 24 > learner.counters.steps - 9
