"""What lives on from one experience to the next, and what penalties on parameters make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_methods import build
from torch import nn

from perdure.attachment import attach, detach
from perdure.config import MethodConfig
from perdure.errors import BadInput
from perdure.methods import Method
from perdure.methods._lasting import checksum
from tests.conformance import cases

EWC = {"ewc": {"strength": 10.0, "rows": 4}}
L2 = {"l2_anchor": {"strength": 0.1, "head": True}}
LORA = {"lora": {"rank": 2}}
MORAM = {"moram": {"rank": 2, "top_k": 2}}
CODYRA = {"codyra": {"rank": 2, "threshold": 0.1}}


class Renewing(Method):
    """Trains a new vector in every experience under one name, and does not say so."""

    name = "renewing"
    adapts = True

    def __init__(self, config: Any = None):
        super().__init__(config or MethodConfig())

    def attach(self, host: Any) -> None:
        self.modules["vector"] = nn.ParameterDict({"v": nn.Parameter(torch.zeros(16))})

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.modules["vector"].named_parameters())}]

    def before_experience(self, experience: Any) -> None:
        self.modules["vector"]["v"] = nn.Parameter(torch.full((16,), float(experience.index)))

    def losses(self, batch: Any, output: Any) -> dict[str, Any]:
        return {"own": (output.features.detach() @ self.modules["vector"]["v"] - 1).square().mean()}


def held(learner: Any) -> set[str]:
    """Names that a penalty acts on now, with the number of the method left out."""
    method = next(m for m in learner.methods if m.name in ("ewc", "l2_anchor"))
    kinds = {key.partition("/")[2] for key in method.tensors}
    assert kinds >= {name for name, _ in method._lasting.now("anchor")}
    return {name.partition("/")[2] for name, _ in method._lasting.now("anchor")}


def held_in(spec: Any, count: int, host: str = "bert", **options: Any) -> list[set[str]]:
    """What is held in the last step of each of `count` experiences."""
    learner, found = build(spec, host, epochs=1, **options), []
    for experience in cases.experiences(host, count + 1)[:count]:
        names: list[set[str]] = []
        learner.learn(experience, on_step=lambda loop, _, names=names: names.append(held(loop)))
        found.append(names[-1])
    return found


# ---- the checksum
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_checksum_sees_every_bit_and_their_order(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = tensor.t().contiguous().t()  # as it lies in memory does not matter
    assert checksum(same) == checksum(tensor.clone()) == checksum(tensor)
    nearby = tensor.clone()
    nearby[3, 1] = torch.nextafter(nearby[3, 1].float(), torch.tensor(9.0)).to(dtype) if dtype.itemsize > 2 else 0
    assert checksum(nearby) != checksum(tensor) != checksum(tensor.flip(0))
    assert checksum(tensor[:0]) == 0 and checksum(torch.tensor(-0.0)) != checksum(torch.tensor(0.0))


# ---- who lives on
@pytest.mark.parametrize("penalty", [EWC, L2])
def test_an_adapter_that_goes_on_and_the_old_rows_of_the_head_are_held(penalty: Any) -> None:
    first, second, third = held_in([LORA, penalty], 3)
    assert first == set() and second == third
    assert "weight" in second and "scale" in second
    assert sum(name.endswith((".A", ".B")) for name in second) == len(second) - 2 > 0


@pytest.mark.parametrize("penalty", [EWC, L2])
@pytest.mark.parametrize("adapter", [MORAM, CODYRA, {"lora": {"rank": 2, "grow": True}}])
def test_new_parameters_under_old_names_are_not_held_in_either_order(adapter: Any, penalty: Any) -> None:
    head = {"weight", "scale"}
    for spec in ([adapter, penalty], [penalty, adapter]):
        assert held_in(spec, 3) == [set(), head, head]
    learner = build([penalty, adapter], epochs=1)
    learner.learn(cases.experiences("bert", 2)[0])
    assert all("/head/" in key for key in learner.methods[0].tensors), "what is new next time need not be stored"


@pytest.mark.parametrize("penalty", [EWC, L2])
def test_what_trains_no_more_is_forgotten_and_what_is_new_waits_for_a_boundary(penalty: Any) -> None:
    spec = [{"lora": {"rank": 2, "pretrain": {}}}, penalty]
    learner = build(spec, epochs=1)
    kept = []
    for experience in cases.experiences("bert", 4)[:3]:
        learner.learn(experience)
        kept.append({key.partition("/")[2].partition("/")[2] for key in learner.methods[1].tensors})
    host, adapter = "0/embeddings.word_embeddings.weight", "0/0/encoder.layer.0.attention.self.query.A"
    assert host in kept[0] and adapter not in kept[0], "the first boundary is of the host"
    assert host not in kept[1] and adapter in kept[1] == kept[2]
    first, second, third = held_in(spec, 3)
    assert first == set() and second == {"weight", "scale"} and len(third) > 2


def test_an_experience_that_was_given_up_leaves_what_was_held() -> None:
    learner = build([LORA, {"ewc": {"strength": 10.0, "rows": 4, "online": True}}], epochs=1)
    made = cases.experiences("bert", 4)
    learner.learn(made[0])
    expected = {name: t.clone() for name, t in learner.methods[1].tensors.items()}

    def stop(loop: Any, _: Any) -> None:
        if loop.position.step == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        learner.learn(made[1], on_step=stop)
    learner.abandon()
    seen: list[float] = []
    learner.learn(made[2], on_step=lambda loop, losses: seen.append(losses["ewc.penalty"]))
    assert seen[0] > 0, "it is pulled back to the boundary before the experience that was given up"
    assert set(expected) <= set(learner.methods[1].tensors)


def test_replaced_parameters_that_no_method_declares_are_refused_and_nothing_changes() -> None:
    learner = build([Renewing(), {"ewc": {"head": False, "rows": 4}}], epochs=1)
    made = cases.experiences("bert", 3)
    learner.learn(made[0])
    before = {name: t.clone() for name, t in learner.state_dict()[0].items()}
    with pytest.raises(BadInput, match=r"method\.ewc: nothing that trains now \(method/0/v.*put ewc last in the list"):
        learner.learn(made[1])
    after = learner.state_dict()[0]
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert held_in([Renewing(), EWC], 2)[1] == {"weight", "scale"}  # with the head there is something to hold


def test_the_share_that_is_held_is_told() -> None:
    learner = build([CODYRA, EWC], epochs=1)
    made = cases.experiences("bert", 3)
    assert learner.methods[1].plasticity() == {}
    for experience in made[:2]:
        learner.learn(experience)
    assert 0 < learner.methods[1].plasticity()["held_share"] < 0.1  # the head is little beside the new components
    learner = build(["finetune", EWC], epochs=1)
    for experience in made[:2]:
        learner.learn(experience)
    assert learner.methods[1].plasticity()["held_share"] == 1


# ---- refusals before work starts
@pytest.mark.parametrize("penalty", ["ewc", "l2_anchor"])
def test_components_are_new_in_every_experience_in_either_order(penalty: str) -> None:
    coda = {"coda_prompt": {"components": 2, "length": 4, "prompt_tokens": 4}}
    for spec in ([coda, {penalty: {"head": False}}], [{penalty: {"head": False}}, coda]):
        with pytest.raises(BadInput, match=rf"method\.{penalty}: coda_prompt trains new parameters"):
            build(spec)


@pytest.mark.parametrize("penalty", ["ewc", "l2_anchor"])
def test_lists_in_which_nothing_lives_on_are_refused(penalty: str) -> None:
    lora = ({"lora": {"rank": 2, "grow": True}}, {"lora": {"rank": 2, "protect": {}}})
    branches = [{name: {"rank": 2}} for name in ("olora", "inflora", "sd_lora", "merge_lora")]
    for adapter in (MORAM, CODYRA, *lora, *branches, {"sd_lora": {"rank": 2, "magnitudes": "per_map"}}):
        (name,) = adapter
        reason = rf"method\.{penalty}: {name} trains new parameters in every experience.*remove {penalty}"
        with pytest.raises(BadInput, match=reason):
            build([adapter, {penalty: {"head": False}}])
        for host in ("gpt2", "clip"):
            with pytest.raises(BadInput, match=reason):
                build([{penalty: {"head": True}}, adapter], host) if host == "gpt2" else cases.build_learner(
                    host, [{penalty: {"head": True}}, adapter]
                )
        build([adapter, {penalty: {"head": True}}])
    build([LORA, MORAM, {penalty: {"head": False}}])


@pytest.mark.parametrize("penalty", ["ewc", "l2_anchor", "lwf", "feat_kd"])
def test_joint_training_is_refused(penalty: str) -> None:
    with pytest.raises(BadInput, match=rf"method\.{penalty}: joint learns all experiences at once.*remove {penalty}"):
        build([LORA, "joint", penalty])


@pytest.mark.parametrize("penalty", ["ewc", "l2_anchor", "lwf", "feat_kd"])
def test_they_need_boundaries_and_attach_without_a_learner(penalty: str) -> None:
    with pytest.raises(Exception, match=rf"protocol\.boundaries: is none, but {penalty} needs them"):
        build([LORA, penalty], protocol={"boundaries": "none"})
    model = cases.build_host("bert")[0]
    tokens = torch.tensor([[5, 6, 7]])
    output = model(tokens)[0]
    assert torch.equal(attach(model, penalty)(tokens)[0], output)
    detach(model)


# ---- the services that they stand on
def test_services_name_the_list_and_what_trains() -> None:
    learner = build([LORA, EWC])
    services = learner.services
    assert [method.name for method in services.methods] == ["lora", "ewc"]
    assert [name for name, _ in services.trained()] == [name for name, _ in learner.named_trainable()]
    learner.learn(cases.experiences("bert", 1)[0])
    names = [name for name, _ in services.trained()]
    assert {"head/weight", "head/scale"} <= set(names) and sum(name.startswith("method/0/") for name in names) > 2
    (gradient,) = services.gradients(cases.experiences("bert", 1)[0].train[:1])
    assert list(gradient) == names
