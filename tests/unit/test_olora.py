"""O-LoRA: the penalty is there from the second experience on, reaches the new A alone, and does what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perdure.errors import BadInput, ProtocolRefused
from perdure.layers import LowRankBranches
from perdure.learner import Learner
from perdure.memory import overlap
from tests.conformance import cases

SPEC: dict[str, Any] = {"olora": {"rank": 2, "alpha": 6.0, "dropout": 0.0, "lambda1": 0.5}}


def method_of(learner: Learner) -> Any:
    return learner.methods[0]


def sizes(learner: Any) -> set[tuple[int, int]]:
    return {(branch.bank.frozen_size, branch.bank.new_size) for branch in method_of(learner).branches.values()}


# ---- golden values
def test_the_overlap_by_hand() -> None:
    old = torch.tensor([[1.0, 0, 2], [0, -1, 1]], dtype=torch.float64)
    new = torch.tensor([[1.0, 1, 0], [0, 2, -3]], dtype=torch.float64, requires_grad=True)
    found = overlap(new, old)  # products 1, -1 and -6, -5
    assert found.dtype == torch.float64 and found.item() == 13.0
    (gradient,) = torch.autograd.grad(found, new)
    assert gradient.tolist() == [[1, 1, 1], [-1, 1, -3]]
    assert overlap(new, old[:0]).item() == 0.0
    with pytest.raises(ValueError, match="old: found 2 features; the keys have 3"):
        overlap(new, old[:, :2])


def test_the_overlap_keeps_its_precision_under_autocast() -> None:
    draw = torch.Generator().manual_seed(0)
    new, old = torch.randn(4, 64, generator=draw), torch.randn(8, 64, generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        found, rough = overlap(new, old), (old @ new.t()).abs().sum()
    assert found.dtype == torch.float32 and torch.equal(found, overlap(new, old))
    assert not torch.equal(found, rough.float())


def test_a_layer_is_the_sum_of_its_branches() -> None:
    """Against weights written out, values and gradients, in double precision."""
    draw = torch.Generator().manual_seed(1)
    layer = LowRankBranches(5, 3, scale=3.0).double()
    made = []
    for owner in (0, 1, 4):
        layer.grow(2, owner, draw)
        with torch.no_grad():
            layer.bank.new_keys.copy_(torch.randn(2, 5, generator=draw, dtype=torch.float64))
            layer.bank.new_values.copy_(torch.randn(2, 3, generator=draw, dtype=torch.float64))
        made.append((layer.bank.new_keys.detach().clone(), layer.bank.new_values.detach().clone()))
    a, b = made[-1][0].requires_grad_(), made[-1][1].requires_grad_()
    x = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64)
    update = sum(3.0 * values.t() @ keys for keys, values in [*made[:-1], (a, b)])
    wanted, found = x @ update.t(), layer(x)  # type: ignore[union-attr]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(wanted.shape, generator=draw, dtype=torch.float64)
    for mine, reference in zip(
        torch.autograd.grad((found * weight).sum(), [layer.bank.new_keys, layer.bank.new_values]),
        torch.autograd.grad((wanted * weight).sum(), [a, b]),
        strict=True,
    ):
        assert torch.allclose(mine, reference, rtol=0, atol=1e-12)
    assert layer.fold() == 2
    assert torch.allclose(layer(x), wanted, rtol=0, atol=1e-12), "the scale goes into B at freezing"
    assert layer.drop(1) == 2
    update = update - 3.0 * made[1][1].t() @ made[1][0]
    assert torch.allclose(layer(x), x @ update.t(), rtol=0, atol=1e-12)


# ---- the penalty in training
def test_the_penalty_is_there_from_the_second_experience_on() -> None:
    """The defect of released TRACE code: with the old matrices missing it is 0 for ever."""
    learner = cases.build_learner("bert", SPEC, logging_steps=1)
    seen: list[tuple[int, float | None]] = []

    def on_step(loop: Any, losses: dict[str, float]) -> None:
        seen.append((loop.position.experience, losses.get("olora.orthogonal")))

    for experience in cases.experiences("bert"):
        learner.learn(experience, on_step=on_step)
    assert [value for number, value in seen if number == 0] == [None] * 6
    for number in (1, 2):
        assert all(value is not None and value > 0.1 for where, value in seen if where == number)
    assert sizes(learner) == {(6, 0)}


def test_the_penalty_is_the_formula_and_its_gradient_reaches_the_new_a_alone() -> None:
    learner = cases.build_learner("bert", SPEC)
    made, checked = cases.experiences("bert"), []

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.experience != 2 or checked:
            return
        banks = [branch.bank for branch in method_of(loop).branches.values()]
        assert sizes(loop) == {(4, 2)}
        loss = method_of(loop).losses(None, None)
        assert set(loss) == {"orthogonal"}
        wanted = torch.zeros(())
        for bank in banks:
            for old in bank.frozen_keys:
                for new in bank.new_keys:
                    wanted = wanted + 0.5 * abs(old @ new)
        assert torch.allclose(loss["orthogonal"], wanted, rtol=1e-5)
        tensors = dict(loop.named_trainable())
        assert not any(bank.frozen_keys.requires_grad or bank.frozen_values.requires_grad for bank in banks)
        gradients = torch.autograd.grad(loss["orthogonal"], list(tensors.values()), allow_unused=True)
        reached = {name for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None}
        assert reached == {name for name in tensors if name.endswith(".A")} and len(reached) == 4
        expected = torch.autograd.grad(wanted, [bank.new_keys for bank in banks])
        found = [g for name, g in zip(tensors, gradients, strict=True) if name.endswith(".A")]
        assert all(torch.allclose(f, e, atol=1e-6) for f, e in zip(found, expected, strict=True))
        checked.append(True)

    for experience in made:
        learner.learn(experience, on_step=on_step)
    assert checked


def test_old_branches_stand_still_and_overlap_less_than_without_the_penalty() -> None:
    found = {}
    for weight in (0.0, 5.0):
        spec = {"olora": {**SPEC["olora"], "lambda1": weight}}
        learner = cases.build_learner("bert", spec, epochs=6, weight_decay=0.1)
        made = cases.experiences("bert")
        learner.learn(made[0])
        before = {n: (b.bank.frozen_keys.clone(), b.bank.frozen_values.clone()) for n, b in
                  method_of(learner).branches.items()}  # fmt: skip
        assert all(values.abs().max() > 0 for _, values in before.values())
        learner.learn(made[1])
        total = 0.0
        for name, branch in method_of(learner).branches.items():
            keys, values = before[name]
            assert torch.equal(branch.bank.frozen_keys[:2], keys) and torch.equal(branch.bank.frozen_values[:2], values)
            assert branch.bank.frozen_values[2:].abs().max() > 0, "the new branch must have learnt"
            total += float(overlap(branch.bank.frozen_keys[2:], keys))
        found[weight] = total
    assert found[5.0] < 0.5 * found[0.0]


def test_the_norms_are_not_squared_and_a_zero_b_has_no_gradient() -> None:
    learner = cases.build_learner("bert", {"olora": {"rank": 2, "lambda1": 0.0, "lambda2": 0.25, "layers": [1]}})
    made, looked = cases.experiences("bert"), []
    method = method_of(learner)
    assert method.losses(None, None) == {}

    def on_step(loop: Any, _: Any) -> None:
        banks = [branch.bank for branch in method.branches.values()]
        wanted = sum(float((part.double() ** 2).sum().sqrt()) for bank in banks
                     for part in (bank.new_keys.detach(), bank.new_values.detach()))  # fmt: skip
        loss = method.losses(None, None)["norm"]
        assert loss.item() == pytest.approx(0.25 * wanted, rel=1e-5)
        with torch.no_grad():
            banks[0].new_values.zero_()
        (gradient,) = torch.autograd.grad(method.losses(None, None)["norm"], banks[0].new_values)
        assert torch.equal(gradient, torch.zeros_like(gradient))
        looked.append(True)

    learner.learn(made[0], on_step=on_step)
    assert looked


# ---- settings
def test_the_rate_of_later_experiences() -> None:
    learner = cases.build_learner("bert", {"olora": {**SPEC["olora"], "later_learning_rate": 3e-4}})
    rates = []

    def on_step(loop: Any, _: Any) -> None:
        rates.append(loop.services.rate(method_of(loop).branches["0.query"].bank.new_keys))

    for experience in cases.experiences("bert", 2):
        learner.learn(experience, on_step=on_step)
    assert rates == [0.01] * 6 + [3e-4] * 6


def test_published_defaults_and_a_slice_of_a_fused_map() -> None:
    learner = cases.build_learner("gpt2", "olora")
    layer = method_of(learner).branches["1.value"]
    assert set(method_of(learner).branches) == {f"{n}.{role}" for n in (0, 1) for role in ("query", "value")}
    assert layer.scale == 4.0 and layer.dropout == 0.1
    held: Any = learner.model.get_submodule("transformer.h.1.attn.c_attn")
    assert len(held._forward_hooks) == 2, "query and value are slices of one map"


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"method\.olora\.lambda1.*greater than or equal to 0"):
        cases.build_learner("bert", {"olora": {"lambda1": -1.0}})
    with pytest.raises(BadInput, match=r"method\.olora\.rank"):
        cases.build_learner("bert", {"olora": {"rank": 0}})
    model, processor = cases.build_host("bert")
    with pytest.raises(ProtocolRefused, match="boundaries"):
        Learner(model, processor, method="olora", protocol={"boundaries": "none"})
