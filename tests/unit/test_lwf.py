"""Distillation: of scores (lwf) and of features (feat_kd), against plain formulas and in training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loop_methods import build

from perdure.data import Batch, Output
from perdure.errors import BadInput
from perdure.registry import METHODS
from perdure.streams import Experience
from tests.conformance import cases

LORA = {"lora": {"rank": 2}}


def method(name: str, old: Output, classes: int = 2, **settings: Any) -> Any:
    """The method on a loop that has nothing but an old model."""
    cls = METHODS.get(name)
    made = cls(cls.Config(**settings))
    made.loop = SimpleNamespace(
        previous_model=lambda batch: old, has_previous_model=True, labels=dict.fromkeys(range(classes)),
        methods=(), predicts_tokens=False,
    )  # fmt: skip
    return made


def double(*numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ---- scores
def test_distillation_worked_by_hand() -> None:
    """Two old classes at T = 2: shares 3/4 and 1/4 of the old model, 1/2 and 1/2 of the new one."""
    old = double([2 * np.log(3.0), 0.0], [5.0, 5.0])
    new = double([1.0, 1.0, 9.0], [0.0, 0.0, -9.0]).requires_grad_(True)
    lwf = method("lwf", Output(logits=old), strength=0.5, temperature=2.0)
    batch = Batch({}, labels=torch.tensor([2, 2]))
    assert lwf.losses(batch, Output(logits=new)) == {}, "before a boundary there is nothing to keep"
    lwf.after_experience(None)
    loss = lwf.losses(batch, Output(logits=new))["distillation"]
    expected = 0.5 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5)) / 2  # of the two rows the second is as it was
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, new)
    # α / (T B) (share now − share before); nothing to the new class
    assert torch.allclose(gradient, double([-0.03125, 0.03125, 0.0], [0.0, 0.0, 0.0]), atol=1e-12)
    reverse = 0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)) / 2
    assert abs(loss.item() - reverse) > 0.003, "the released code's order of the two would show"


def test_rows_that_fill_up_and_classes_that_were_only_declared_take_no_part() -> None:
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    lwf = method("lwf", Output(logits=old), temperature=1.0, strength=1.0)
    lwf.after_experience(None)
    found = lwf.losses(Batch({}, labels=torch.tensor([2, -100, 2])), Output(logits=new))["distillation"]
    p, q = old[[0, 2], :2].softmax(-1), new[[0, 2], :2].softmax(-1)
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-10)
    none = lwf.losses(Batch({}, labels=torch.tensor([-100] * 3)), Output(logits=new))["distillation"]
    assert float(none) == 0


def test_language_models_are_distilled_over_the_vocabulary_at_each_answer_token() -> None:
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.randn(2, 4, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, -100, -100]])  # answers, then padding
    lwf = method("lwf", Output(logits=old), classes=0, temperature=3.0, strength=2.0)
    lwf.after_experience(None)
    found = lwf.losses(Batch({}, labels=labels), Output(logits=new))["distillation"]
    places = [(0, 1), (0, 2), (1, 0)]  # where the score of each answer token stands
    parts = []
    for place in places:
        p, q = (old[place] / 3).softmax(-1), (new[place] / 3).softmax(-1)
        parts.append(float((p * (p / q).log()).sum()))
    assert float(found) == pytest.approx(2 * sum(parts) / 3, rel=1e-10)


# ---- features
def test_feature_distance_worked_by_hand() -> None:
    features = double([1.0, 2.0], [3.0, 4.0], [7.0, 7.0]).requires_grad_(True)
    kd = method("feat_kd", Output(features=double([0.0, 0.0], [3.0, 2.0], [0.0, 0.0])), strength=0.5)
    batch = Batch({}, labels=torch.tensor([0, 1, -100]))
    assert kd.losses(batch, Output(features=features)) == {}
    kd.after_experience(None)
    loss = kd.losses(batch, Output(features=features))["distance"]
    assert loss.item() == 0.5 * (5 + 4) / 2
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.equal(gradient, double([0.5, 1.0], [0.0, 1.0], [0.0, 0.0]))


def test_captions_are_held_beside_their_images() -> None:
    old = Output(features=double([0.0]), other_features=double([2.0]))
    kd = method("feat_kd", old, strength=1.0)
    kd.after_experience(None)
    new = Output(features=double([1.0]), other_features=double([5.0]))
    assert float(kd.losses(Batch({}, labels=torch.tensor([0])), new)["distance"]) == 1 + 9
    learner = cases.build_learner("clip", [LORA, "feat_kd"])
    seen: list[dict[str, float]] = []
    for number in range(2):
        rows = [{"image": np.full((8, 8, 3), 20 * n, np.uint8), "text": f"{number} {n}"} for n in range(8)]
        learner.learn(Experience(number, f"e{number}", train=rows), on_step=lambda _, step: seen.append(step))
    assert seen[-2]["feat_kd.distance"] > 0


# ---- in training
@pytest.mark.parametrize(("host", "name"), [("bert", "lwf"), ("gpt2", "lwf"), ("clip", "lwf"), ("bert", "feat_kd")])
@pytest.mark.parametrize("adapter", ["lora", "moram"])
def test_zero_at_a_start_and_above_from_the_second_experience_on(host: str, name: str, adapter: str) -> None:
    learner, logged = cases.build_learner(host, [adapter, name], epochs=1, logging_steps=1), []
    key = f"{name}.{'distillation' if name == 'lwf' else 'distance'}"
    for experience in cases.experiences(host, 3):
        logged.append([])
        learner.learn(experience, on_step=lambda _, seen: logged[-1].append(seen))
    assert all(key not in seen for seen in logged[0])
    for steps in logged[1:]:
        # moram's new atoms take part in the norm and the places from the first step on
        assert abs(steps[0][key]) < (1e-6 if adapter == "lora" else 0.05)
        assert all(seen[key] > 0 for seen in steps[1:])


@pytest.mark.parametrize("name", ["lwf", "feat_kd"])
def test_more_of_it_keeps_the_outputs_on_new_rows_nearer_to_the_old_models(name: str) -> None:
    made, apart = cases.experiences("bert", 3), []
    for strength in (0.0, 100.0):
        learner = build([LORA, {name: {"strength": strength}}], learning_rate=5e-3, protocol={"mask": "seen"})
        learner.learn(made[0])
        (batch,) = learner.batches(made[1].test, unlabelled=True)
        with torch.no_grad():
            before = learner.forward(batch)
        learner.learn(made[1])
        with torch.no_grad():
            after = learner.forward(batch)
        if name == "lwf":
            old, new = (z.logits[:, :2].softmax(-1) for z in (before, after))
        else:
            old, new = before.features, after.features
        apart.append(float((new - old).square().sum()))
    assert 0 < apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize("name", ["lwf", "feat_kd"])
def test_uneven_parts_weigh_as_one_batch(name: str) -> None:
    made, ends = cases.experiences("bert", 3, rows=11), []
    for size, parts in ((4, 1), (2, 2)):
        learner = build(
            ["finetune", name], dtype=torch.float64, optimizer="sgd", per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
        )  # fmt: skip
        for experience in made[:2]:
            learner.learn(experience)
        ends.append(torch.cat([p.detach().double().flatten() for p in learner.system.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_the_scores_of_the_auxiliary_head_are_distilled_behind_a_closed_form_head() -> None:
    learner, seen = build([LORA, "lwf"], head={"ridge": {"features": 8}}), []
    for experience in cases.experiences("bert", 3)[:2]:
        learner.learn(experience, on_step=lambda _, step: seen.append(step))
    assert seen[-1]["lwf.distillation"] > 0


# ---- refusals
def test_bad_settings_rows_and_lists_are_refused() -> None:
    for spec, words in (
        ({"lwf": {"temperature": 0.0}}, r"method\.lwf\.temperature"),
        ({"lwf": {"strength": -1.0}}, r"method\.lwf\.strength"),
        ({"feat_kd": {"strength": -1.0}}, r"method\.feat_kd\.strength"),
    ):
        with pytest.raises(BadInput, match=words):
            build([LORA, spec])
    with pytest.raises(BadInput, match=r"method\.feat_kd: a language model.*use lwf"):
        build([LORA, "feat_kd"], "gpt2")
    with pytest.raises(BadInput, match=r"method\.feat_kd: linear_probe never changes the features"):
        build(["linear_probe", "feat_kd"])
    learner = cases.build_learner("clip", [LORA, "lwf"])
    rows = [{"image": np.zeros((8, 8, 3), np.uint8), "text": f"a {n}"} for n in range(4)]
    with pytest.raises(BadInput, match=r"method\.lwf: the experience has rows with captions.*use feat_kd"):
        learner.learn(Experience(0, "e", train=rows))
    assert learner.history == []
    probe, seen = build(["linear_probe", "lwf"]), []  # the head alone forgets, and is held
    for experience in cases.experiences("bert", 3)[:2]:
        probe.learn(experience, on_step=lambda _, step: seen.append(step))
    assert "lwf.distillation" in seen[-1]
