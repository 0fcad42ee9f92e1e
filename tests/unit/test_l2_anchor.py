"""The L2 anchor: its value and gradient, which parameters it takes, and what it does in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from loop_methods import build

from perdure.errors import BadInput
from perdure.learner import Learner
from perdure.processors import ByteTokenizer
from tests.conformance import cases

LORA = {"lora": {"rank": 2}}


def held(spec: Any, host: str = "bert", **options: Any) -> set[str]:
    """Names, without the number of the method, of what is held in the second experience."""
    learner = build(spec, host, epochs=1, **options)
    for experience in cases.experiences(host, 3)[:2]:
        learner.learn(experience)
    method = next(m for m in learner.methods if m.name == "l2_anchor")
    return {key.partition("/")[2].partition("/")[2] for key in method.tensors}


@pytest.mark.parametrize("head", [False, True])
def test_the_pull_is_the_squared_distance_and_its_gradient_points_back(head: bool) -> None:
    made = cases.experiences("bert", 3)
    learner = build(["finetune", {"l2_anchor": {"strength": 0.3, "head": head}}], dtype=torch.float64, epochs=1)
    learner.learn(made[0])
    anchors = {name: p.detach().clone() for name, p in learner.named_trainable()}
    checked, logged = [], []

    def on_step(loop: Any, seen: dict[str, float]) -> None:
        logged.append(seen)
        if loop.position.step != 2:
            return
        loss = loop.methods[1].losses(None, None)["pull"]
        named = [(n, p) for n, p in loop.named_trainable() if head or not n.startswith("head/")]
        moved = [p[: len(anchors[n])].double() - anchors[n].double() for n, p in named]
        assert loss.item() == pytest.approx(0.3 * sum(m.square().sum() for m in moved).item(), rel=1e-6)
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        for (name, p), gradient, m in zip(named, found, moved, strict=True):
            if gradient is None:
                continue
            assert torch.allclose(gradient[: len(m)].double(), 0.6 * m, atol=1e-6), name
            assert not gradient[len(m) :].any(), "rows of new classes are free"
            checked.append((name, len(p) - len(m)))

    learner.learn(made[1], on_step=on_step)
    assert len(checked) > 10 and [rows for name, rows in checked if name == "head/weight"] == [2] * head
    assert "l2_anchor.pull" not in logged[0] and all(seen["l2_anchor.pull"] > 0 for seen in logged[1:])


def test_a_strong_pull_keeps_old_parameters_and_a_free_head_learns_all_the_same() -> None:
    made, far = cases.experiences("bert", 3), []
    for strength in (0.0, 1e4):
        learner = build(
            ["finetune", {"l2_anchor": {"strength": strength}}], learning_rate=1e-3, head_learning_rate=1e-2
        )
        learner.learn(made[0])
        before = {name: p.detach().clone() for name, p in learner.named_trainable()}
        learner.learn(made[1])
        now = {name: p.detach()[: len(before[name])] for name, p in learner.named_trainable()}
        apart = {name: float((now[name] - old).square().sum()) for name, old in before.items()}
        far.append(sum(d for name, d in apart.items() if not name.startswith("head/")))
        assert apart["head/scale"] > 0
    assert 0 < far[1] < 0.3 * far[0]


# ---- where
def test_where_takes_the_maps_of_roles_and_the_adapters_on_them() -> None:
    every = held(["finetune", "l2_anchor"])
    maps = held(["finetune", {"l2_anchor": {"where": ["query", "key", "value"]}}])
    own = {f"encoder.layer.{n}.attention.self.{role}.{kind}" for n in (0, 1) for role in ("query", "key", "value")
           for kind in ("weight", "bias")}  # fmt: skip
    assert {name.partition("/")[2] or name for name in maps} == own and maps < every
    wider = held(["finetune", {"l2_anchor": {"where": "attention"}}])
    assert {name.partition(".attention.")[2] for name in wider - maps} == {"output.dense.weight", "output.dense.bias"}
    lora = held([{"l2_anchor": {"where": "query", "head": True}}, LORA])
    assert {name.rpartition("query.")[2] for name in lora} == {"A", "B", "weight", "scale"}
    patches = held([{"apn": {"patches": 4, "top_k": 2, "rank": 2}}, "l2_anchor"])
    assert {name.partition(".ffn.")[2] for name in patches} == {"gate_scale", "gate_bias", "decoders"}


def test_fused_maps_are_held_as_a_whole() -> None:
    found = held(["finetune", {"l2_anchor": {"where": ["query", "key", "value"]}}], "gpt2")
    assert {name.rpartition(".attn.")[2] for name in found} == {"c_attn.weight", "c_attn.bias"}
    with pytest.raises(BadInput, match=r"method\.l2_anchor\.where: \S+c_attn is query.*choose key and value too"):
        build(["finetune", {"l2_anchor": {"where": "query"}}], "gpt2")


# ---- from the start
def test_from_the_start_the_pretrained_weights_hold_the_first_experience() -> None:
    made = cases.experiences("bert", 3)
    spec = ["finetune", {"l2_anchor": {"strength": 0.1, "from_start": True, "where": "query"}}]
    learner = build(spec)
    before = {f"0/{name}": p.detach().clone() for name, p in learner.model.named_parameters() if ".query." in name}
    logged: list[dict[str, float]] = []
    learner.learn(made[0], on_step=lambda _, seen: logged.append(seen))
    assert "l2_anchor.pull" not in logged[0] and logged[-1]["l2_anchor.pull"] > 0
    anchor = learner.methods[1].tensors
    assert all(not torch.equal(anchor[f"anchor/method/{name}"], old) for name, old in before.items()), "moved on"
    fresh, first = build(spec), {}
    fresh.learn(made[0], on_step=lambda loop, _: first.update(loop.methods[1].tensors))
    assert len(first) == len(before) == 4
    assert all(torch.equal(first[f"anchor/method/{name}"], old) for name, old in before.items())
    plain = build(["finetune", {"l2_anchor": {"strength": 0.1, "where": "query"}}])
    logged.clear()
    plain.learn(made[0], on_step=lambda _, seen: logged.append(seen))
    assert all("l2_anchor.pull" not in seen for seen in logged)


def test_what_comes_later_waits_for_a_boundary_from_the_start_on_too() -> None:
    learner = build([{"lora": {"rank": 2, "pretrain": {}}}, {"l2_anchor": {"strength": 0.1, "from_start": True}}])
    logged: list[list[dict[str, float]]] = []
    for experience in cases.experiences("bert", 4)[:3]:
        logged.append([])
        learner.learn(experience, on_step=lambda _, seen: logged[-1].append(seen))
    assert ["l2_anchor.pull" in steps[-1] for steps in logged] == [True, False, True]


def test_a_parameter_that_no_loss_reaches_is_not_pulled() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    learner = Learner(
        transformers.BertModel(config), ByteTokenizer(), method=["finetune", "l2_anchor"],
        objective={"classification": {"max_length": 32}}, training={"per_device_train_batch_size": 4},
    )  # fmt: skip
    made, gradients = cases.experiences("bert", 3), []
    learner.methods[0].after_backward = lambda: gradients.append(  # type: ignore[method-assign]
        {name: p.grad is None for name, p in learner.named_trainable()}
    )
    for experience in made[:2]:
        learner.learn(experience)
    idle = {name for name, none in gradients[-1].items() if none}
    assert idle == {"method/0/pooler.dense.weight", "method/0/pooler.dense.bias"}


# ---- bad input
def test_bad_settings_are_refused() -> None:
    for settings, words in (
        ({"strength": -1.0}, r"method\.l2_anchor\.strength"),
        ({"where": "attn"}, "roles: 'attn' is unknown"),
        ({"from_start": 1}, r"method\.l2_anchor\.from_start"),
    ):
        with pytest.raises(BadInput, match=words):
            build([LORA, {"l2_anchor": settings}])
    learner = build([{"lora": {"rank": 2, "targets": "ffn"}}, {"l2_anchor": {"where": "attention"}}])
    with pytest.raises(BadInput, match=r"method\.l2_anchor\.where: nothing that trains lies in 'attention'.*or all"):
        learner.learn(cases.experiences("bert", 1)[0])
    assert learner.history == [] and learner.counters.steps == 0
