"""MoE-Adapters: the layer against plain loops, first tokens and caches, routers of tasks, freezing, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loop_methods import build
from torch.nn import functional as F

from perdure.attachment import attach, detach
from perdure.errors import BadInput, ProtocolRefused
from perdure.layers.adapter_experts import SHARED, AdapterExperts, Call
from perdure.learner import Learner
from tests.conformance import cases

MOE = {"experts": 3, "rank": 4, "dropout": 0.0}


def layer_of(noisy: bool = False, **changes: Any) -> AdapterExperts:
    options = {"experts": 4, "rank": 3, "top_k": 2, "scale": 0.1, "dropout": 0.0, "relu": True} | changes
    layer = AdapterExperts(5, 6, noisy=noisy, call=Call(), site="x", **options).double()
    layer.add_router(SHARED)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return layer.double()


def plain(layer: AdapterExperts, z: torch.Tensor, logits: torch.Tensor, relu: bool = True) -> torch.Tensor:
    """Row by row, token by token, expert by expert."""
    rows = []
    for row, scores in zip(z, logits, strict=True):
        best = sorted(range(len(scores)), key=lambda e: -float(scores[e].detach()))[:2]
        weights = torch.stack([scores[e] for e in best]).softmax(0)
        tokens = []
        for token in row:
            added = torch.zeros(6, dtype=torch.float64)
            for weight, number in zip(weights, best, strict=True):
                expert: Any = layer.experts[number]
                hidden = expert.down.weight @ token + expert.down.bias
                hidden = hidden.relu() if relu else hidden
                added = added + weight * 0.1 * (expert.up.weight @ hidden + expert.up.bias)
            tokens.append(added)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("relu", [True, False])
def test_values_and_gradients_are_the_formula(relu: bool) -> None:
    layer = layer_of(relu=relu).eval()
    z = torch.randn(5, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_(True)
    router: Any = layer.routers[SHARED]
    logits = z[:, 0] @ router.gate.T
    assert len({tuple(row.topk(2).indices.tolist()) for row in logits}) > 1, "rows must choose differently"
    expected, found = plain(layer, z, logits, relu), layer(z)
    assert torch.allclose(found, expected, atol=1e-12)
    parameters = [z, router.gate, *layer.experts.parameters()]
    target = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, other = (
        torch.autograd.grad((y * target).sum(), parameters, allow_unused=True, retain_graph=True)
        for y in (found, expected)
    )
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-12))
    assert one[1] is not None and one[1].abs().max() > 1e-3


def test_noise_is_in_training_alone_and_has_its_own_matrix() -> None:
    layer = layer_of(noisy=True)
    z = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    router: Any = layer.routers[SHARED]
    torch.manual_seed(5)
    drawn = torch.randn(4, 4, dtype=torch.float64)
    deviation = F.softplus(z[:, 0] @ router.noise.T) + 0.01
    torch.manual_seed(5)
    assert torch.allclose(layer.train()(z), plain(layer, z, z[:, 0] @ router.gate.T + drawn * deviation), atol=1e-12)
    assert torch.allclose(layer.eval()(z), plain(layer, z, z[:, 0] @ router.gate.T), atol=1e-12)
    assert layer.tally.sum() == 8, "two experts for each of four sequences, those of the training pass"


def test_first_real_token_decides_and_padding_does_not_matter() -> None:
    model: Any = cases.build_host("bert")[0]
    attach(model, {"moe_adapters": MOE})
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "moe_adapters" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.int64)
    positions = torch.arange(4)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=mask, position_ids=positions)[0]
        left = model(
            input_ids=padded, attention_mask=torch.tensor([[0] * 3 + [1] * 4]),
            position_ids=torch.cat([torch.zeros(1, 3, dtype=torch.int64), positions], 1),
        )[0]  # fmt: skip
    assert torch.allclose(left[:, 3:], alone, atol=1e-5)
    detach(model)


def test_with_a_cache_the_prompt_decides() -> None:
    learner = build({"moe_adapters": MOE}, host="gpt2", learning_rate=0.1)
    learner.learn(cases.experiences("gpt2", 1)[0])
    ids = torch.tensor([[72, 101, 108, 108, 111], [120, 33, 44, 55, 66]])
    with torch.no_grad():
        whole = learner.model(ids).logits
        begun = learner.model(ids[:, :2], use_cache=True)
        rest = learner.model(ids[:, 2:], past_key_values=begun.past_key_values, use_cache=True).logits
    assert torch.allclose(rest, whole[:, 2:], atol=1e-5)


# ---- experiences
def by_task(count: int = 3) -> list[Any]:
    return [replace(one, task=7 + one.index) for one in cases.experiences("bert", count, rows=8)]


def test_what_stands_still_after_an_experience() -> None:
    settings = {**MOE, "experts": 4, "freeze": 1, "router": "task"}
    learner = build({"moe_adapters": settings}, protocol={"task_id": "test"}, epochs=2)
    method: Any = learner.methods[0]
    before: dict[str, torch.Tensor] = {}
    frozen: dict[str, list[int]] = {}
    for number, experience in enumerate(by_task()):
        chosen = {name: torch.zeros(4) for name in method.layers}

        def book(batch: Any, output: Any, chosen: Any = chosen) -> Any:
            for name, layer in method.layers.items():
                chosen[name] += layer.tally
            return type(method).losses(method, batch, output)

        method.losses = book
        learner.learn(experience)
        now = dict(learner.model.named_parameters())
        still = {name for name in before if stood_still(name, frozen, number)}
        assert all(torch.equal(now[name], before[name]) for name in still)
        assert len(still) == 4 * sum(map(len, frozen.values())) + 4 * number, "two layers, each router gate and noise"
        moved = {name for name in before if not torch.equal(now[name], before[name])}
        assert number == 0 or len(moved) > len(before) // 4
        for name, most in chosen.items():
            assert most.sum() == 2 * 16 and int(most.argmax()) in method.values["frozen"][name]
        frozen = {name: list(each) for name, each in method.values["frozen"].items()}
        before = {name: p.detach().clone() for name, p in now.items() if "moe_adapters" in name}
    assert method.plasticity()["frozen_experts"] == sum(map(len, method.values["frozen"].values())) / 8


def stood_still(parameter: str, frozen: Any, number: int) -> bool:
    """Whether a parameter is of an expert or a router that must stand still while experience `number` is learnt."""
    layer = "0.ffn" if ".layer.0." in parameter else "1.ffn"
    if ".routers." in parameter:
        return int(parameter.split(".routers.")[1].split(".")[0]) != 7 + number
    return int(parameter.split(".experts.")[1].split(".")[0]) in frozen[layer]


def test_a_row_gets_the_router_of_its_task_and_an_unknown_task_the_plain_model() -> None:
    made = by_task(2)
    learner = build({"moe_adapters": {**MOE, "router": "task"}}, protocol={"task_id": "test"}, learning_rate=0.05)
    method: Any = learner.methods[0]
    (batch,) = learner.batches(made[0].test, unlabelled=True)
    plain = build("finetune").model
    for experience in made:
        learner.learn(experience)

    def features(*tasks: int) -> torch.Tensor:
        given = replace(batch, task=torch.tensor(tasks))
        with torch.no_grad():
            return method.predict(given, lambda b: learner.objective.forward(learner.model, None, b, "mean")).features

    one, two, mixed, unknown = features(*[7] * 6), features(*[8] * 6), features(7, 7, 8, 8, 7, 8), features(*[99] * 6)
    first = torch.tensor([True, True, False, False, True, False])
    assert torch.allclose(mixed, torch.where(first[:, None], one, two), atol=1e-6)
    assert (one - two).abs().max() > 1e-4 and (one - unknown).abs().max() > 1e-4
    with torch.no_grad():
        bare = learner.objective.forward(plain, None, batch, "mean").features
    assert bare is not None and torch.equal(unknown, bare)
    with pytest.raises(BadInput, match="needs the task of every row"):
        learner.predict(made[0].test)


@pytest.mark.parametrize(
    ("settings", "host", "names"),
    [
        ({"top_k": 3}, "bert", "top_k 3 is more than the 2 experts"),
        ({"freeze": 3}, "bert", "freeze 3 is more than the 2 experts"),
        ({"router": "task"}, "clip", "two towers.*use shared"),
        ({"activation": "gelu"}, "bert", "activation"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], host: str, names: str) -> None:
    model, processor = cases.build_host(host)
    with pytest.raises(BadInput, match=names):
        Learner(
            model, processor, method={"moe_adapters": settings}, protocol={"task_id": "test"},
            objective={cases.OBJECTIVE[host]: {"max_length": 32}},
        )  # fmt: skip
    assert not [name for name, _ in model.named_modules() if "perdure" in name]


def test_a_router_for_each_task_needs_tasks() -> None:
    settings = {"moe_adapters": {**MOE, "router": "task"}}
    with pytest.raises(ProtocolRefused, match="task_id"):
        build(settings, protocol={"task_id": "train"})
    with pytest.raises(ProtocolRefused, match="boundaries"):
        build({"moe_adapters": {**MOE, "freeze": 1}}, protocol={"boundaries": "none"})
    with pytest.raises(BadInput, match="task of rehearsed rows is not known"):
        build([settings, {"er": {"budget": 4}}], protocol={"task_id": "test", "rehearsal": 4})
    with pytest.raises(BadInput, match="does not give"):
        build(settings, protocol={"task_id": "test"}).learn(cases.experiences("bert", 1)[0])
    with pytest.raises(BadInput, match="needs a Learner"):
        attach(cases.build_host("bert")[0], settings)
