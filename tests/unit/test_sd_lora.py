"""SD-LoRA: the formula, what moves and what stands still, and what happens to magnitudes at a boundary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.errors import BadInput, ProtocolRefused
from perdure.layers import Directions, Magnitudes
from perdure.learner import Learner
from tests.conformance import cases

SHARED: dict[str, Any] = {"sd_lora": {"rank": 2}}
PER_MAP: dict[str, Any] = {"sd_lora": {"rank": 2, "magnitudes": "per_map"}}


def method_of(learner: Any) -> Any:
    return learner.methods[0]


def alphas(learner: Any) -> dict[str, list[float]]:
    return {name: each.alpha.tolist() for name, each in method_of(learner)._magnitudes().items()}


# ---- the layer
def layer_of(owners: tuple[int, ...]) -> tuple[Directions, list[tuple[Tensor, Tensor]]]:
    """Branches of rank 2 with random rows in double precision; all but the last are directions."""
    draw = torch.Generator().manual_seed(2)
    layer, made = Directions(5, 3, Magnitudes()).double(), []
    for number, owner in enumerate(owners):
        if number:
            layer.normalise()
        layer.grow(2, owner, draw)
        layer.magnitudes.add(owner, 0.8)
        with torch.no_grad():
            layer.bank.new_keys.copy_(torch.randn(2, 5, generator=draw, dtype=torch.float64))
            layer.bank.new_values.copy_(torch.randn(2, 3, generator=draw, dtype=torch.float64))
        made.append((layer.bank.new_keys.detach().clone(), layer.bank.new_values.detach().clone()))
    return layer, made


def test_the_formula_in_values_and_gradients() -> None:
    layer, made = layer_of((0, 3, 4))
    alpha = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64, requires_grad=True)
    layer.magnitudes.alpha.data.copy_(alpha.detach())
    a, b = (part.clone().requires_grad_() for part in made[2])
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = alpha[2] * (x @ a.t() @ b)
    for number in (0, 1):
        keys, values = made[number]
        norms = keys.square().sum().sqrt() * values.square().sum().sqrt()
        wanted = wanted + alpha[number] * (x @ keys.t() @ values) / norms
    found = layer(x)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters = [layer.magnitudes.alpha, layer.bank.new_keys, layer.bank.new_values]
    mine = torch.autograd.grad((found * weight).sum(), parameters)
    theirs = torch.autograd.grad((wanted * weight).sum(), [alpha, a, b])
    assert all(torch.allclose(m, r, rtol=0, atol=1e-12) for m, r in zip(mine, theirs, strict=True))
    assert all(gradient.abs().min() > 0 for gradient in mine), "all magnitudes and the new branch learn"


def test_a_direction_has_norm_one_and_an_untrained_branch_leaves_none() -> None:
    layer, made = layer_of((0,))
    product = made[0][0].norm() * made[0][1].norm()
    assert torch.allclose(layer.normalise(), product)
    assert layer.bank.frozen_keys.norm().item() == pytest.approx(1) == layer.bank.frozen_values.norm().item()
    layer.grow(2, 1, torch.Generator())
    layer.magnitudes.add(1, 0.8)
    assert layer.normalise().item() == 0 and layer.bank.size == 2
    assert torch.isfinite(layer(torch.ones(1, 5, dtype=torch.float64))).all()


def test_magnitudes_are_found_by_their_write() -> None:
    each = Magnitudes()
    for write, value in ((0, 1.0), (3, 2.0), (7, 3.0), (3, 9.0)):
        each.add(write, value)
    assert each.of(torch.tensor([7, 0, 0, 3])).tolist() == [3, 1, 1, 2]
    each.drop(3)
    each.drop(3)
    assert each.of(torch.tensor([7, 0])).tolist() == [3, 1] and each.writes.tolist() == [0, 7]


# ---- in the loop
@pytest.mark.parametrize("spec", [SHARED, PER_MAP], ids=["shared", "per_map"])
def test_old_directions_stand_still_and_all_magnitudes_move(spec: Any) -> None:
    learner = cases.build_learner("bert", spec, weight_decay=0.1, learning_rate=0.05)
    made, method = cases.experiences("bert"), method_of(learner)
    names = 1 if spec is SHARED else 4
    start: dict[str, list[float]] = {}
    old: dict[str, tuple[Tensor, Tensor]] = {}

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.step == 1:
            start.update(alphas(loop))
            old.update({n: (e.bank.frozen_keys.clone(), e.bank.frozen_values.clone())
                        for n, e in method.directions.items()})  # fmt: skip

    for number, experience in enumerate(made):
        learner.learn(experience, on_step=on_step)
        now = alphas(learner)
        assert len(now) == names
        for name, values in now.items():
            assert len(values) == number + 1
            assert all(a != b for a, b in zip(values, start[name], strict=True)), "every magnitude has learnt"
        for name, each in method.directions.items():
            assert (each.bank.frozen_size, each.bank.new_size) == (2 * number, 2)
            assert torch.equal(each.bank.frozen_keys, old[name][0])
            assert torch.equal(each.bank.frozen_values, old[name][1])
            assert each.bank.new_values.abs().max() > 0


def jump(spec: Any) -> float:
    """How much the outputs change where the third experience begins."""
    learner, made = cases.build_learner("bert", spec, learning_rate=0.05), cases.experiences("bert")
    method, found = method_of(learner), []
    begin = method.before_experience

    def watched(experience: Any) -> None:
        before = cases.outputs(learner, made)
        begin(experience)
        found.append(float((cases.outputs(learner, made) - before).abs().max()))

    method.before_experience = watched
    for experience in made:
        learner.learn(experience)
    assert found[0] == 0
    return found[2]


def test_per_map_magnitudes_take_over_the_norms_so_that_nothing_jumps() -> None:
    assert jump(PER_MAP) < 1e-5


def test_shared_magnitudes_are_set_back_as_released() -> None:
    learner, made = cases.build_learner("bert", SHARED, learning_rate=0.05), cases.experiences("bert")
    seen = []
    method = method_of(learner)
    grow = method.before_experience

    def watched(experience: Any) -> None:
        grow(experience)
        seen.append(alphas(learner)["magnitudes"])

    method.before_experience = watched
    for experience in made:
        learner.learn(experience)
    assert seen == [[pytest.approx(0.8)] * count for count in (1, 2, 3)]
    assert jump(SHARED) > 1e-3, "the release jumps here, and so does this"


def test_forgetting_the_newest_write_leaves_the_magnitudes_of_the_others() -> None:
    learner, made = cases.build_learner("bert", PER_MAP), cases.experiences("bert", 4)
    for experience in made[:3]:
        learner.learn(experience)
    before = alphas(learner)
    assert learner.forget(2)[0] == 8
    assert {name: values[:2] for name, values in before.items()} == alphas(learner)
    steps: list[dict[str, list[float]]] = []
    method = method_of(learner)
    grow = method.before_experience

    def watched(experience: Any) -> None:
        grow(experience)
        steps.append(alphas(learner))

    method.before_experience = watched
    learner.learn(made[3])
    for name, values in steps[0].items():
        first, second = before[name][:2]
        assert values == pytest.approx([first, second, 0.8]), "there was no branch whose norms could be taken over"


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"method\.sd_lora\.magnitudes"):
        cases.build_learner("bert", {"sd_lora": {"magnitudes": "own"}})
    model, processor = cases.build_host("bert")
    with pytest.raises(ProtocolRefused, match="boundaries"):
        Learner(model, processor, method="sd_lora", protocol={"boundaries": "none"})
