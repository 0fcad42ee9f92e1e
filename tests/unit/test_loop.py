"""The loop: hooks, masks, accumulation, protocol, refusals, resuming."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loop_methods import Distilled, Recorder, build, copied, differences

from perdure.config import TrainingConfig
from perdure.errors import BadInput, NonFiniteLoss, ProtocolRefused
from perdure.optim import rate_factor
from perdure.streams import Experience
from tests.conformance import cases


# ---- hooks
def test_hooks_are_called_in_the_documented_order() -> None:
    method, made = Recorder(), cases.experiences("bert", 2, rows=4)
    learner = build(method)
    learner.learn(made[0])
    learner.evaluate(made[:1])
    learner.methods[0].removal = "exact"  # type: ignore[misc]
    assert learner.forget(0) == [{"write": 0}]
    learner.detach()
    order = [name for name in method.calls if name != "parameter_groups"]
    assert order == [
        "attach", "before_experience", "sampler", "before_step", "criterion", "losses", "after_backward",
        "after_update",
        "after_step", "after_experience", "predict", "predict", "on_request", "detach",
    ]  # fmt: skip
    assert "parameter_groups" in method.calls
    assert len(method.seen_rows) == 4  # transform, once for each row


def test_no_more_than_is_granted_reaches_a_method() -> None:
    method = Recorder()
    rows = [{"text": "aa" * n, "label": "x", "domain": "secret", "task": 4} for n in range(1, 5)]
    learner = build(method)
    learner.learn(Experience(0, "e", train=rows, test=rows[:2], task=7))
    learner.evaluate([Experience(0, "e", train=rows, test=rows[:2], task=7)])
    (seen,) = method.seen
    assert len(seen.test) == len(seen.valid) == 0 and seen.task is None
    assert all(set(row) == {"text", "label"} for row in [*seen.train, *method.seen_rows])
    trained, scored, alone = method.batches  # a row is scored alone too, to see that it does not hang on the others
    assert len(alone.rows) == 1 and alone.labels is None
    assert all(set(row) == {"text", "label"} for row in trained.rows) and trained.task is None
    assert scored.labels is None and all(set(row) == {"text"} for row in scored.rows) and scored.task is None


@pytest.mark.parametrize(("grant", "expected"), [("train", (7, None)), ("test", (7, 7))])
def test_task_id_where_it_is_granted(grant: str, expected: tuple[int, int | None]) -> None:
    method, (made,) = Recorder(), cases.experiences("bert", 1, rows=4)
    made = replace(made, task=7)
    learner = build(method, protocol={"task_id": grant})
    learner.learn(made)
    learner.evaluate([made])
    found = tuple(None if batch.task is None else int(batch.task[0]) for batch in method.batches[:2])
    assert found == expected and method.seen[0].task == 7


# ---- the step
def _flat(learner) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in learner.system.parameters()])


def test_accumulation_equals_a_larger_batch() -> None:
    made = cases.experiences("bert", 1, rows=11)[0]
    ends, logs = [], []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        learner = build(["finetune", Distilled(None)], dtype=torch.float64, per_device_train_batch_size=size,
                        gradient_accumulation_steps=parts, optimizer="sgd")  # fmt: skip
        losses: list[float] = []
        learner.learn(made, on_step=lambda _, seen, losses=losses: losses.append(seen["loss"]))
        ends.append(_flat(learner))
        logs.append(losses)
    for end, losses in zip(ends[1:], logs[1:], strict=True):
        assert (end - ends[0]).abs().max() < 1e-6
        assert losses == pytest.approx(logs[0], abs=1e-6)


def test_a_methods_own_loss_weighs_uneven_parts_as_one_batch() -> None:
    """3 rows as 2 + 1: the mean of a per-row loss must not count the last row twice."""

    class Mean(Recorder):
        def losses(self, batch, output):
            return {"mean": (output.features.detach() @ self.modules["vector"]["v"] + 1).square().mean()}

    made, found = cases.experiences("bert", 1, rows=3)[0], []
    for size, parts in ((4, 1), (2, 2)):
        method = Mean()
        learner = build(method, per_device_train_batch_size=size, gradient_accumulation_steps=parts, optimizer="sgd")
        learner.learn(made)
        found.append(method.modules["vector"]["v"].detach())
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_loss_that_is_not_finite_stops_before_the_step() -> None:
    class Breaks(Recorder):
        def losses(self, batch, output):
            return {"bad": self.modules["vector"]["v"].sum() * (math.nan if self.loop.step == 2 else 1.0)}

    learner, good = build(Breaks()), []
    with pytest.raises(NonFiniteLoss, match="step 2"):
        learner.learn(
            cases.experiences("bert", 1, rows=16)[0], on_step=lambda loop, _: good.append(_flat(loop).clone())
        )
    assert len(good) == 2 and torch.equal(_flat(learner), good[-1])
    assert not learner.model.training


def test_gradient_that_is_not_finite_stops_before_the_step() -> None:
    class Breaks(Recorder):
        def losses(self, batch, output):
            return {"steep": self.modules["vector"]["v"].abs().sqrt().sum()}  # infinite gradient at 0

    learner = build(Breaks())
    with pytest.raises(NonFiniteLoss, match="gradient norm"):
        learner.learn(cases.experiences("bert", 1, rows=4)[0])
    assert (learner.methods[0].modules["vector"]["v"] == 0).all() and torch.isfinite(_flat(learner)).all()


def test_seconds_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    learner = build("linear_probe")
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    steps: list[float] = []
    learner.learn(cases.experiences("bert", 1, rows=8)[0], on_step=lambda loop, _: steps.append(loop.counters.seconds))
    assert steps == [1.0, 2.0] and learner.counters.seconds == 3.0


# ---- rates
def test_rates() -> None:
    def factors(**settings):
        return [rate_factor(TrainingConfig(**settings), step, 6) for step in range(6)]

    assert factors() == [1.0] * 6
    assert factors(warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert factors(warmup_steps=2, lr_scheduler="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(lr_scheduler="cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 6)) for s in range(6)])


def test_rates_and_decay_reach_the_optimizer() -> None:
    seen: list[list[float]] = []

    def on_step(loop, _) -> None:
        groups = loop.optimization.kinds["adamw"].param_groups
        seen.append([group["lr"] for group in groups] + [group["weight_decay"] for group in groups])

    made = cases.experiences("bert", 1, rows=12)[0]
    learner = build("finetune", learning_rate=0.1, head_learning_rate=0.2, weight_decay=0.3, warmup_steps=2)
    learner.learn(made, on_step=on_step)
    assert seen == [pytest.approx(row) for row in ([0.05, 0.1, 0.3, 0.0], [0.1, 0.2, 0.3, 0.0], [0.1, 0.2, 0.3, 0.0])]
    plain = build("finetune", optimizer="sgd", max_steps=1, max_grad_norm=None)
    before = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    gradients: dict[str, torch.Tensor] = {}
    plain.methods[0].after_backward = lambda: gradients.update(
        {n: p.grad.clone() for n, p in plain.model.named_parameters()}
    )
    plain.learn(made)
    for name, parameter in plain.model.named_parameters():
        assert torch.allclose(parameter, before[name] - 0.01 * gradients[name], atol=1e-7)


# ---- masks
@pytest.mark.parametrize(
    ("mask", "boundaries"), [("all", "train"), ("seen", "train"), ("current", "train"), ("current", "none")]
)
def test_masks(mask: str, boundaries: str) -> None:
    classes = [f"class{n}" for n in range(6)]
    learner = build(["linear_probe", {"er": {"budget": 8, "per_step": 2}}], protocol={
        "mask": mask, "boundaries": boundaries, "rehearsal": 8}, classes=classes)  # fmt: skip
    allowed: list = []
    plain = learner.allowed

    def noted(batch, logits):
        allowed.append((batch, plain(batch, logits)))
        return allowed[-1][1]

    learner.allowed = noted  # type: ignore[method-assign]
    for experience in cases.experiences("bert", 2, rows=8):
        learner.learn(experience)
    batch, last = allowed[-1]
    assert batch.rehearsed.tolist() == [False] * 4 + [True] * 2
    if mask == "all":
        assert last is None and learner.head is not None and learner.head.classes == 6
    elif mask == "seen":
        assert last.tolist() == [True] * 4
    else:
        assert last[:4].tolist() == [[False, False, True, True]] * 4
        assert last[4:].tolist() == [[True] * 4] * 2


def test_prediction_of_a_known_task() -> None:
    made = [replace(one, task=one.index) for one in cases.experiences("bert", 2, rows=8)]
    learner = build("linear_probe", protocol={"task_id": "test"})
    for experience in made:
        learner.learn(experience)
    assert learner._allowed_at_test(made[0]).tolist() == [True, True, False, False]
    assert set(learner.predict(made[0].test, classes=made[1].classes)) <= set(made[1].classes)
    with pytest.raises(BadInput, match="classes: .'nobody'"):
        learner.predict(made[0].test, classes=["nobody"])


# ---- refusals
@pytest.mark.parametrize(
    ("method", "protocol", "training", "names"),
    [
        ({"er": {"budget": 5}}, {"rehearsal": 4}, {}, "protocol.rehearsal"),
        ("linear_probe", {"passes": 1}, {"epochs": 2}, "training.epochs"),
        (Distilled(None), {"boundaries": "none"}, {}, "protocol.boundaries"),
        ("joint", {"boundaries": "none"}, {}, "protocol.boundaries"),
    ],
)
def test_protocol_refusals_name_the_field(method, protocol, training, names: str) -> None:
    with pytest.raises(ProtocolRefused, match=names):
        build(method, protocol=protocol, **training)


def test_bad_input_is_named_and_nothing_changes() -> None:
    good = [{"text": "aaa", "label": "x"}, {"text": "bbb", "label": "y"}]
    with pytest.raises(BadInput, match=r"protocol\.mask: all needs the classes"):
        build("linear_probe", protocol={"mask": "all"})
    with pytest.raises(BadInput, match="linear_probe trains a head only"):
        build("linear_probe", host="gpt2")
    learner = build({"moram": {"rank": 2}}, classes=["x", "y"])
    start = copied(learner.state_dict())
    for rows, words in (
        ([*good, {"text": "c", "label": "z"}], "'z' is outside the declared set"),
        ([*good, {"text": "c"}], "row 2: has no field 'label'"),
        ([*good, {"label": "x"}], "row 2: field 'text' is missing"),
    ):
        with pytest.raises(BadInput, match=words):
            learner.learn(Experience(0, "e", train=rows))
        assert differences(copied(learner.state_dict()), start) == []
    with pytest.raises(BadInput, match="'y' is not among its classes"):
        learner.learn(Experience(0, "e", train=good, classes=("x",)))
    with pytest.raises(BadInput, match="grow_every"):
        build({"moram": {"rank": 2}}, protocol={"boundaries": "none"})


def test_another_experience_in_the_middle_is_refused() -> None:
    made, states = cases.experiences("bert", 2, rows=8), []
    learner = build("linear_probe")
    learner.learn(made[0], on_step=lambda loop, _: states.append(copied(loop.state_dict())))
    fresh = build("linear_probe")
    fresh.load_state_dict(*states[0])
    with pytest.raises(BadInput, match="stands at step 1 of 'e0'"):
        fresh.learn(made[1])


# ---- passes
def _count_forwards(learner) -> list[int]:
    count = [0]
    learner.model.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


def test_linear_probe_computes_features_once() -> None:
    made = cases.experiences("bert", 2, rows=8)
    for head, epochs in ((None, 5), ({"ridge": {"features": 8}}, 1)):
        learner = build("linear_probe", head=head, epochs=epochs)
        count = _count_forwards(learner)
        learner.learn(made[0])
        assert count[0] == 1 and learner.counters.extra_passes == 0
        learner.evaluate(made)
        learner.evaluate(made)
        assert count[0] == 3  # each test set once
        other = replace(made[0], test=made[1].test, hash="")
        assert learner.evaluate([other]) == {0: 0.0}, "the features of another stream's rows were taken"


def test_features_stand_in_the_order_of_their_rows() -> None:
    rows = [{"text": "ab " * n, "label": "x"} for n in (3, 1, 5, 2, 4)]  # the passes take the shortest first
    learner = build("linear_probe", per_device_eval_batch_size=2)
    alone = torch.cat([learner.features([row]) for row in rows])
    assert torch.allclose(learner.features(rows), alone, atol=1e-5)
    assert len({tuple(row) for row in alone.mul(1e4).round().tolist()}) == len(rows)


def test_ridge_head_behind_an_adapter_counts_one_extra_pass() -> None:
    made = cases.experiences("bert", 2, rows=8)
    learner = build({"lora": {"rank": 2, "first_only": True}}, head={"ridge": {"features": 8}})
    learner.learn(made[0])
    assert (learner.counters.extra_passes, learner.counters.extra_rows, learner.counters.steps) == (1, 8, 2)
    learner.learn(made[1])  # nothing trains here, so the head's pass is the only one
    assert (learner.counters.extra_passes, learner.counters.steps) == (1, 2)
    assert not any(p.requires_grad and p.grad is not None for p in learner.model.parameters())


def test_a_row_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build(["linear_probe", {"er": {"budget": 8, "per_step": 2}}], protocol={"rehearsal": 8})
    encoded: list[int] = []
    plain = learner.objective.encode

    def watched(rows, *a, **k):  # what is looked for in a method's memory afterwards is no training
        encoded.append(len(rows) if k.get("training") else 0)
        return plain(rows, *a, **k)

    monkeypatch.setattr(learner.objective, "encode", watched)
    learner.learn(cases.experiences("bert", 1, rows=12)[0])
    assert sum(encoded) == 12 + 2 + 2 and learner.counters.samples == 16


def test_each_experience_may_have_its_own_number_of_passes() -> None:
    made = cases.experiences("bert", 3, rows=4)
    learner = build("finetune", epochs=[1, 3], per_device_train_batch_size=4)
    taken = []
    for experience in made[:2]:
        learner.learn(experience)
        taken.append(learner.counters.steps)
    assert taken == [1, 4]
    before = copied(learner.state_dict())
    with pytest.raises(BadInput, match="training.epochs: lists 2 numbers, and there is an experience 3; give one"):
        learner.learn(made[2])
    assert not differences(before, copied(learner.state_dict())) and learner.position.phase == "boundary"


@pytest.mark.parametrize(
    ("field", "value"), [*(("epochs", value) for value in ([], [0], [1, True], "2", [1.5], 2.0, True)), ("bf16", 1)]
)
def test_numbers_and_truth_are_not_read_into_each_other(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TrainingConfig.model_validate({field: value})
