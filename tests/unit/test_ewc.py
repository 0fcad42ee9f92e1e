"""EWC: the Fisher information against plain references, the sum of quadratics by hand, and what it does in training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loop_methods import build, copied, differences
from torch import nn

from perdure.errors import BadInput
from perdure.registry import METHODS
from perdure.streams import Experience
from tests.conformance import cases

LORA = {"lora": {"rank": 2}}


def ewc(trained: dict[str, nn.Parameter], **settings: Any) -> Any:
    """The method on a loop that has nothing but parameters."""
    cls = METHODS.get("ewc")
    method = cls(cls.Config(**settings))
    method.loop = SimpleNamespace(
        trained=lambda: list(trained.items()), methods=(), write_id=0, labels={}, needs_head=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    method.attach(None)
    return method


# ---- the quadratics
def boundary(method: Any, fisher: dict[str, torch.Tensor]) -> None:
    """What the end of an experience and the start of the next do, the Fisher information given."""
    method._fisher = lambda names, rows: fisher
    method.after_experience(SimpleNamespace(last=False, train=()))
    method.loop.write_id += 1
    method.before_step(None)


def test_the_sum_of_two_quadratics_worked_by_hand() -> None:
    """1 (θ − 0)² + 3 (θ − 4)² = 4 (θ − 3)² + 12."""
    theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    method = ewc({"v": theta}, strength=2.0)
    assert method.losses(None, None) == {}
    boundary(method, {"v": torch.ones(1, dtype=torch.float64)})
    theta.data.fill_(4.0)
    assert method.losses(None, None)["penalty"].item() == 16.0
    boundary(method, {"v": torch.full((1,), 3.0, dtype=torch.float64)})
    assert [float(method.tensors[f"{kind}/v"]) for kind in ("fisher", "anchor")] == [4.0, 3.0]
    assert method.values["apart"] == {"v": 12.0}
    theta.data.fill_(2.0)
    loss = method.losses(None, None)["penalty"]
    loss.backward()
    assert loss.item() == 16.0 and float(theta.grad) == -8.0  # 1·4 + 3·4, 2·1·2 + 2·3·(−2)


@pytest.mark.parametrize("online", [False, True])
def test_many_experiences_and_a_head_that_grows_against_the_plain_sum(online: bool) -> None:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    trained = {"method/0/v": nn.Parameter(normal(3, 2)), "head/weight": nn.Parameter(normal(1, 2))}
    trained["head/scale"] = nn.Parameter(normal())
    gamma = 0.7 if online else 1.0
    method = ewc(trained, strength=3.0, online=online, gamma=gamma)
    past: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    for number in range(4):
        fisher = {name: normal(*p.shape).square() for name, p in trained.items()}
        fisher["method/0/v"][0, number % 2] = 0.0  # nothing known of it in this experience
        if number < 2:
            fisher["method/0/v"][1] = 0.0
        past.append((fisher, {name: p.detach().clone() for name, p in trained.items()}))
        boundary(method, fisher)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(normal(*parameter.shape))
        longer = torch.cat([trained["head/weight"].detach(), normal(1, 2)])
        trained["head/weight"] = nn.Parameter(longer)
        expected: Any = 0.0
        for k, (f, old) in enumerate(past):
            factor = gamma ** (len(past) - 1 - k)
            for name, p in trained.items():
                rows = len(old[name]) if p.dim() else None
                anchor = (past[-1][1] if online else old)[name]
                anchor = anchor if rows is None else anchor[:rows]
                here = p if rows is None else p[:rows]
                expected = expected + 1.5 * factor * (f[name] * (here - anchor).square()).sum()
        found = method.losses(None, None)["penalty"]
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        named = list(trained.values())
        for one, other in zip(torch.autograd.grad(found, named), torch.autograd.grad(expected, named), strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_parameter_on_which_no_output_depends_is_not_stored() -> None:
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    method = ewc({"used": used, "idle": idle})
    boundary(method, {"used": torch.tensor([0.0, 1.0]), "idle": torch.zeros(2)})
    assert set(method.tensors) == {"fisher/used", "anchor/used"}
    boundary(method, {"used": torch.zeros(2), "idle": torch.zeros(2)})
    assert torch.equal(method.tensors["fisher/used"], torch.tensor([0.0, 1.0]))


def test_a_parameter_that_was_replaced_begins_anew() -> None:
    trained = {name: nn.Parameter(torch.zeros(1, dtype=torch.float64)) for name in ("stays", "goes")}
    method = ewc(trained, strength=2.0)
    fisher = dict.fromkeys(trained, torch.ones(1, dtype=torch.float64))
    for value in (0.0, 4.0):
        for parameter in trained.values():
            parameter.data.fill_(value)
        boundary(method, fisher)
    assert method.values["apart"] == {"stays": 8.0, "goes": 8.0}
    method.after_experience(SimpleNamespace(last=False, train=()))
    trained["goes"] = nn.Parameter(torch.ones(1, dtype=torch.float64))  # under the old name
    method.loop.write_id += 1
    method.before_step(None)
    assert {key for key in method.tensors if "goes" in key} == set()
    boundary(method, fisher)
    assert float(method.tensors["fisher/goes"]) == 1.0 and "goes" not in method.values["apart"]


# ---- the Fisher information
def probe(labels: str, monkeypatch: pytest.MonkeyPatch, drawn: torch.Tensor | None = None) -> tuple[Any, Any, Any]:
    """Fisher information of a linear head after one experience, and features and labels of its rows."""
    learner = build(["linear_probe", {"ewc": {"labels": labels, "rows": None}}], head="linear", dtype=torch.float64)
    experience = cases.experiences("bert", 2, rows=8)[0]
    method = learner.methods[1]
    if drawn is not None:
        queue = list(drawn)
        monkeypatch.setattr(method, "_drawn", lambda scores: queue.pop(0)[None])
    learner.learn(experience)
    (batch,) = learner.batches(experience.train)
    features = learner.objective.forward(learner.model, None, batch).features
    return learner, features.detach(), batch.labels


@pytest.mark.parametrize("labels", ["data", "model"])
def test_fisher_of_a_linear_head_is_the_mean_squared_gradient_of_each_row(labels, monkeypatch) -> None:
    drawn = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1])
    learner, f, y = probe(labels, monkeypatch, drawn if labels == "model" else None)
    y = drawn if labels == "model" else y
    module = learner.head.module
    with torch.no_grad():
        p = (f @ module.weight.double().T + module.bias.double()).softmax(-1)
    error = p - nn.functional.one_hot(y, 2)  # ∇ of −log p(y) with regard to the scores
    expected = (error[:, :, None] * f[:, None, :]).square().mean(0)
    found = learner.methods[1].tensors
    assert torch.allclose(found["fisher/head/weight"].double(), expected, rtol=1e-5, atol=1e-9)
    assert torch.allclose(found["fisher/head/bias"].double(), error.square().mean(0), rtol=1e-5)
    assert not torch.allclose(expected, (error[:, :, None] * f[:, None, :]).mean(0).square(), rtol=0.1)
    assert torch.equal(found["anchor/head/weight"], module.weight.detach())


def test_labels_are_drawn_from_the_model_by_the_loops_own_generator() -> None:
    method = ewc({})
    scores = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).expand(20000, 3)
    drawn = method._drawn(scores)
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert (shares - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.02
    method.loop.generator.manual_seed(0)
    assert torch.equal(method._drawn(scores), drawn)
    assert method._drawn(scores[:0]).shape == (0,)


def test_classes_that_were_only_declared_do_not_compete() -> None:
    spec = ["linear_probe", {"ewc": {"labels": "data", "rows": None}}]
    learner = build(
        spec, head="linear", protocol={"mask": "all"}, classes=[f"class{n}" for n in range(4)], dtype=torch.float64
    )
    learner.learn(cases.experiences("bert", 2, rows=8)[0])
    fisher = learner.methods[1].tensors["fisher/head/weight"]
    assert len(fisher) == 4 and bool(fisher[:2].any()) and not fisher[2:].any()


def test_fisher_of_a_language_model_sums_a_rows_answer_tokens_and_counts_them() -> None:
    name = "transformer.ln_f.weight"
    spec = [{"finetune": {"parameters": name}}, {"ewc": {"labels": "data", "rows": 2, "strength": 0.0}}]
    learner = build(spec, "gpt2", dtype=torch.float64)
    rows = [{"prompt": "ab ", "answer": "c" * n} for n in (1, 3, 2, 5)]
    learner.learn(Experience(0, "e", train=rows))
    parameter = dict(learner.model.named_parameters())[name]
    parameter.requires_grad_(True)
    total, tokens = torch.zeros_like(parameter), 0
    for row in (rows[0], rows[2]):  # two, evenly spaced
        (batch,) = learner.batches([row])
        answer = batch.labels[:, 1:] != -100
        scores = learner.model(**batch.inputs).logits[:, :-1][answer]
        nll = nn.functional.cross_entropy(scores, batch.labels[:, 1:][answer], reduction="sum")
        total += torch.autograd.grad(nll, parameter)[0].square()
        tokens += int(answer.sum())
    assert tokens == 1 + 1 + 2 + 1  # and an end token each
    assert torch.allclose(learner.methods[1].tensors[f"fisher/method/0/{name}"], total / tokens, rtol=1e-9)
    assert (learner.counters.extra_passes, learner.counters.extra_rows) == (1, 2)


def test_the_pass_changes_nothing_but_the_methods_own_generator() -> None:
    made, learners = cases.experiences("bert", 2), []
    for spec in ([LORA, {"ewc": {"labels": "data", "rows": 4}}], [LORA]):
        learners.append(build(spec, dropout=0.2))
        learners[-1].learn(made[0])
    learner, plain = learners
    mine, other = copied(learner.state_dict())[0], copied(plain.state_dict())[0]
    assert [name for name in other if not torch.equal(mine[name], other[name])] == []
    assert all(p.grad is None for _, p in learner.named_trainable())


# ---- in training
def losses(spec: Any, count: int, host: str = "bert", **options: Any) -> list[list[dict[str, float]]]:
    learner, found = build(spec, host, epochs=1, **options), []
    for experience in cases.experiences(host, count + 1)[:count]:
        found.append([])
        learner.learn(experience, on_step=lambda _, seen: found[-1].append(seen))
    return found


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("adapter", ["finetune", "lora"])
def test_the_penalty_is_zero_at_a_start_and_grows_from_the_second_experience_on(adapter: str, online: bool) -> None:
    first, second, third = losses([adapter, {"ewc": {"strength": 10.0, "rows": 4, "online": online}}], 3)
    assert all("ewc.penalty" not in step for step in first)
    for steps in (second, third) if online else (second,):
        values = [step["ewc.penalty"] for step in steps]
        assert values[0] == 0.0 and all(value > 0 for value in values[1:])
    if not online:
        assert third[0]["ewc.penalty"] > 0, "it is away from the first experience's anchor"


def test_a_stronger_penalty_keeps_what_is_sensitive_where_it_was() -> None:
    made = cases.experiences("bert", 3)
    moved = []
    for strength in (0.0, 1e4):
        spec = [
            {"finetune": {"parameters": "layer.1"}},
            {"ewc": {"strength": strength, "rows": None, "labels": "data"}},
        ]
        learner = build(spec, epochs=2, learning_rate=1e-3)
        learner.learn(made[0])
        anchor = {n: t.clone() for n, t in learner.methods[1].tensors.items()}
        learner.learn(made[1])
        distance = sum(
            float((anchor[f"fisher/{n}"] * (p.detach() - anchor[f"anchor/{n}"]).square()).sum())
            for n, p in learner.named_trainable() if not n.startswith("head/")
        )  # fmt: skip
        moved.append(distance)
    assert 0 < moved[1] < 0.2 * moved[0]


def test_accumulation_counts_the_penalty_once() -> None:
    made, ends = cases.experiences("bert", 3, rows=11), []
    for size, parts in ((4, 1), (2, 2)):
        learner = build(
            ["finetune", {"ewc": {"rows": 4, "labels": "data", "strength": 1.0}}], dtype=torch.float64, optimizer="sgd",
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, epochs=1,
        )  # fmt: skip
        for experience in made[:2]:
            learner.learn(experience)
        ends.append(torch.cat([p.detach().double().flatten() for p in learner.system.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_the_last_experience_takes_no_fisher_and_learning_goes_on_after_it() -> None:
    learner = build([LORA, {"ewc": {"rows": 4}}], epochs=1)
    made = cases.experiences("bert", 2)
    learner.learn(made[0])
    assert learner.counters.extra_passes == 1
    learner.learn(made[1])
    assert learner.counters.extra_passes == 1
    seen: list[dict[str, float]] = []
    learner.learn(cases.experiences("bert", 4)[2], on_step=lambda _, step: seen.append(step))
    assert seen[0]["ewc.penalty"] > 0 and learner.counters.extra_passes == 2


def test_a_state_from_the_middle_keeps_who_is_held() -> None:
    spec, states = [LORA, {"ewc": {"rows": 4, "strength": 10.0}}], []
    made = cases.experiences("bert", 3)
    learner = build(spec, dropout=0.2)
    learner.learn(made[0])
    learner.learn(
        made[1], on_step=lambda loop, _: states.append(copied(loop.state_dict())) if loop.position.step == 2 else None
    )
    fresh = build(spec, dropout=0.2)
    fresh.load_state_dict(*states[0])
    seen: list[dict[str, float]] = []
    fresh.learn(made[1], on_step=lambda _, step: seen.append(step))
    assert seen[0]["ewc.penalty"] > 0
    assert differences(copied(fresh.state_dict()), copied(learner.state_dict())) == []


# ---- bad input
def test_bad_settings_and_rows_are_refused() -> None:
    for settings, words in (
        ({"gamma": 0.9}, "gamma is of the online form; set online: true"),
        ({"gamma": 1.5, "online": True}, r"method\.ewc\.gamma"),
        ({"strength": -1}, r"method\.ewc\.strength"),
        ({"rows": 0}, r"method\.ewc\.rows"),
        ({"labels": "true"}, r"method\.ewc\.labels"),
    ):
        with pytest.raises(BadInput, match=words):
            build([LORA, {"ewc": settings}])
    learner = cases.build_learner("clip", [LORA, "ewc"])
    rows = [{"image": np.zeros((8, 8, 3), np.uint8), "text": f"a {n}"} for n in range(4)]
    with pytest.raises(BadInput, match=r"method\.ewc: the experience has rows with captions, and one alone has no"):
        learner.learn(Experience(0, "e", train=rows))
    assert learner.counters.steps == 0 and learner.history == []
