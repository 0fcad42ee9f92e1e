"""Merge and reset: what is in the weight, what starts anew, and W0 back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merged_weights import changed, watch_merging, weights

from perdure.errors import BadInput, ProtocolRefused
from perdure.learner import Learner
from tests.conformance import cases

SPEC: dict[str, Any] = {"merge_lora": {"rank": 2, "alpha": 6.0}}


def method_of(learner: Any) -> Any:
    return learner.methods[0]


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_merged_equals_unmerged_and_every_experience_starts_anew(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, made = cases.build_learner(host, SPEC, learning_rate=0.03), cases.experiences(host)
    method, started = method_of(learner), []
    found = watch_merging(learner, made, monkeypatch)

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.step == 1:
            started.append({name: branch.bank.new_keys.detach().clone() for name, branch in method.branches.items()})

    for experience in made:
        learner.learn(experience, on_step=on_step)
        assert not method._handles and all(not module._forward_hooks for module in learner.model.modules())
    assert len(found) == 3
    for difference, size in found:
        assert size > 1e-2, "the branch must say something, or its merging shows nothing"
        assert difference < 1e-5
    name = next(iter(method.branches))
    assert not torch.allclose(started[0][name], started[1][name], atol=0.05), "A is drawn anew"
    assert all(branch.bank.frozen_size == 6 and branch.bank.new_size == 0 for branch in method.branches.values())


def test_the_weight_is_w0_plus_the_scaled_branches_as_they_were_trained() -> None:
    learner, made = cases.build_learner("bert", SPEC), cases.experiences("bert")
    before, method = weights(learner.model), method_of(learner)
    trained: dict[str, torch.Tensor] = {}

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.step == loop.steps_planned:
            for name, branch in method.branches.items():
                bank = branch.bank
                update = 3.0 * bank.new_values.detach().double().t() @ bank.new_keys.detach().double()
                trained[name] = trained.get(name, 0) + update

    for experience in made:
        learner.learn(experience, on_step=on_step)
        for site in method._sites:
            now = learner.model.state_dict()[f"{site.path}.weight"]
            wanted = before[f"{site.path}.weight"].double() + trained[site.name]
            assert trained[site.name].abs().max() > 1e-3
            assert (now.double() - wanted).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_w0_comes_back_bit_for_bit(host: str, dtype: torch.dtype) -> None:
    learner, made = cases.build_learner(host, SPEC, dtype=dtype), cases.experiences(host, 2)
    before = weights(learner.model)
    for experience in made:
        learner.learn(experience)
    adapted = {f"{site.path}.weight" for site in method_of(learner)._sites}
    assert changed(learner.model, before) == adapted
    base = learner.frozen_base()
    assert all(torch.equal(base[each], before[each]) for each in adapted), "W0 is part of the base that is hashed"
    assert learner.forget(0)[0] > 0
    assert changed(learner.model, before) == adapted
    learner.forget(1)
    assert changed(learner.model, before) == set(), "without branches the weights are W0"
    learner.learn(cases.experiences(host, 3)[2])
    assert changed(learner.model, before) == adapted
    learner.detach()
    assert changed(learner.model, before) == set()


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"method\.merge_lora\.alpha"):
        cases.build_learner("bert", {"merge_lora": {"alpha": 0.0}})
    model, processor = cases.build_host("bert")
    with pytest.raises(ProtocolRefused, match="boundaries"):
        Learner(model, processor, method="merge_lora", protocol={"boundaries": "none"})
    with pytest.raises(BadInput, match="both overwrite"):
        cases.build_learner("bert", ["merge_lora", "codyra"])
