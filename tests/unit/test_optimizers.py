"""A method's and a head's own optimizer beside the training's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_methods import build, copied, differences
from torch import nn

from perdure.config import MethodConfig, TrainingConfig
from perdure.errors import BadInput
from perdure.methods import Method
from perdure.optim import Optimization
from tests.conformance import cases


class Bias(Method):
    """A vector on the features' loss, trained by SGD with momentum while the head has AdamW."""

    name = "bias"
    adapts = True
    asks: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.5}

    def __init__(self, config: Any = None):
        super().__init__(config or MethodConfig())
        self.modules["vector"] = nn.ParameterDict({"v": nn.Parameter(torch.ones(4))})

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.modules["vector"].named_parameters()), **self.asks}]

    def losses(self, batch: Any, output: Any) -> dict[str, Any]:
        return {"pull": 0.5 * self.modules["vector"]["v"].square().sum()}


def test_each_group_steps_with_the_optimizer_it_asks_for() -> None:
    """Loss v²/2, so the gradient is v: momentum by hand, m = .9 m + v, v = v − .5 m."""
    learner = build(Bias(), max_grad_norm=None)
    seen: list[tuple[float, bool]] = []

    def on_step(loop: Any, _: Any) -> None:
        vector = loop.methods[0].modules["vector"]["v"]
        states = loop.optimization.kinds
        head = dict(loop.optimization.named)["head/weight"]
        seen.append(
            (float(vector.detach()[0]), "exp_avg" in states["adamw"].state[head] and vector in states["sgd"].state)
        )

    learner.learn(cases.experiences("bert", 1, rows=12)[0], on_step=on_step)
    value, moment, expected = 1.0, 0.0, []
    for _ in range(3):
        moment = 0.9 * moment + value
        value -= 0.5 * moment
        expected.append((pytest.approx(value), True))
    assert seen == expected


@pytest.mark.parametrize("method", [Bias, lambda: "finetune"])
def test_both_are_resumed_bit_for_bit(method: Any) -> None:
    made = cases.experiences("bert", 2, rows=12)
    protocol, states = {"boundaries": "none", "mask": "seen"}, []

    def on_step(loop: Any, _: Any) -> None:
        if loop.counters.steps == 4:
            states.append(copied(loop.state_dict()))

    whole = build(method(), protocol=protocol, head_optimizer="sgd")
    for experience in made:
        whole.learn(experience, on_step=on_step)
    assert set(states[0][1]["optimizer"]["kinds"]) == ({"sgd"} if method is Bias else {"adamw", "sgd"})
    fresh = build(method(), protocol=protocol, head_optimizer="sgd")
    fresh.load_state_dict(*states[0])
    for experience in made[fresh.position.experience :]:
        fresh.learn(experience)
    assert differences(copied(fresh.state_dict()), copied(whole.state_dict())) == []
    other = build(method(), protocol=protocol, optimizer="adamw", head_optimizer="adamw")
    with pytest.raises(BadInput, match="training: the state is of the optimizers"):
        other.load_state_dict(*states[0])


def test_moments_live_on_when_the_groups_are_built_again() -> None:
    """A parameter that goes to another optimizer starts fresh there: the moments mean something else."""
    values = [nn.Parameter(torch.ones(2)) for _ in range(2)]

    def groups(first: str) -> list[dict[str, Any]]:
        asked = [first, "adamw"]
        return [{"params": [(str(n), values[n])], "lr": 0.1, "optimizer": asked[n]} for n in range(2)]

    before = Optimization(TrainingConfig(), groups("adamw"))
    for value in values:
        value.grad = torch.ones(2)
    before.step(0, 10)
    same, other = (Optimization(TrainingConfig(), groups(kind), before) for kind in ("adamw", "sgd"))
    assert all(float(same.kinds["adamw"].state[value]["step"]) == 1 for value in values)
    assert not other.kinds["sgd"].state and list(other.kinds["adamw"].state) == [values[1]]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"optimizer": "lion"}, "no optimizer 'lion'; choose adamw or sgd"),
        ({"optimizer": "sgd", "betas": (0.9, 0.9)}, "sgd has no option betas; it has .*momentum"),
        ({"momentum": 0.9}, "adamw has no option momentum"),
        ({"optimizer": "sgd", "momentum": 0.9, "rows": True}, "rows and momentum do not go together"),
    ],
)
def test_what_does_not_exist_is_refused(group: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"parameter group: .*{message}"):
        Optimization(TrainingConfig(), [{"params": [("v", nn.Parameter(torch.ones(2)))], "lr": 0.1, **group}])


def test_evaluation_after_a_step_reads_the_atoms_as_they_are_now() -> None:
    # Which atoms were trained is looked for once per version of their tensors; AdamW's fused kernel counts none up.
    made = cases.experiences("bert")
    learner = build(
        {"moram": {"rank": 8, "top_k": 1, "grow_every": 1000}}, protocol={"boundaries": "none", "mask": "seen"}
    )
    for experience in made[:2]:
        learner.learn(experience)
        found = learner.features(experience.train)
        memories = list(learner.methods[0].memories.values())
        assert any(memory._kept[1].index is not None for memory in memories), "every atom was trained: nothing is kept"
        for memory in memories:
            memory._kept = None
        assert torch.equal(found, learner.features(experience.train))
