"""What errors leave behind: a model, a learner and a stream that can be gone on with; and misuse that is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loop_methods import Recorder, build, copied, differences

import perdure
from perdure.config import MethodConfig, TrainingConfig
from perdure.errors import BadInput, NonFiniteLoss
from perdure.hosts import Host
from perdure.learner import Learner
from perdure.methods import Method
from perdure.optim import rate_factor
from perdure.registry import METHODS
from perdure.streams import Experience
from tests.conformance import cases

FREE = {"boundaries": "none", "mask": "seen", "rehearsal": 8}
SHORT = {"classification": {"max_length": 32}}
ER = {"er": {"budget": 8, "per_step": 2}}
MORAM = {"moram": {"rank": 2, "top_k": 2}}


class Failing(Method):
    """Puts something in and then fails."""

    name = "failing"
    adapts = True

    def attach(self, host: Any) -> None:
        host.sites("query")[0].add("failing", torch.nn.Linear(16, 16))
        raise BadInput("sites: nothing fits")


class Choosing(Method):
    """Trains on rows that it draws."""

    name = "choosing"

    def sampler(self, experience: Experience) -> Any:
        chosen = torch.randperm(len(experience.train), generator=self.loop.generator)[:8]
        return [experience.train[number] for number in chosen.tolist()]


def facts(model: torch.nn.Module) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


def same(model: torch.nn.Module, before: Any) -> bool:
    now = facts(model)
    equal = list(now[0]) == list(before[0]) and all(torch.equal(now[0][name], before[0][name]) for name in now[0])
    return equal and now[1:] == before[1:] and not Host(model).attached() and not hasattr(model, "_perdure")


# ---- the model
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": MORAM, "head": "cosin"}, "did you mean cosine"),
        ({"method": MORAM, "head": ["cosine", "linear"]}, "takes one head"),
        ({"method": [MORAM, {"lora": {"targets": "atention"}}]}, "'atention' is unknown"),
        ({"method": [MORAM, "lora", Failing(MethodConfig())]}, "sites: nothing fits"),
    ],
)
def test_a_learner_that_cannot_be_made_leaves_the_model_as_it_was(settings: Any, words: str) -> None:
    model, processor = cases.build_host("bert")
    model.train()
    model.encoder.layer[0].eval()
    model.embeddings.requires_grad_(False)
    before = facts(model)
    with pytest.raises(BadInput, match=words):
        Learner(model, processor, objective=SHORT, **settings)
    assert same(model, before)
    learner = Learner(model, processor, objective=SHORT, method=MORAM)
    learner.learn(cases.experiences("bert", 1)[0])
    assert not model.training and learner.detach() is model
    assert same(model, before)


def test_a_model_has_one_owner() -> None:
    model, processor = cases.build_host("bert")
    first = Learner(model, processor, objective=SHORT, method="linear_probe")
    with pytest.raises(BadInput, match="a Learner with linear_probe holds it already"):
        Learner(model, processor, objective=SHORT, method=MORAM)
    with pytest.raises(BadInput, match="a Learner with linear_probe holds it already"):
        perdure.attach(model, MORAM)
    with pytest.raises(BadInput, match="that learner's own `detach`"):
        perdure.detach(model)
    first.detach()
    perdure.attach(model, MORAM)
    with pytest.raises(BadInput, match="moram is attached already"):
        Learner(model, processor, objective=SHORT)
    perdure.detach(model)
    Learner(model, processor, objective=SHORT)


def test_a_detached_learner_says_so() -> None:
    learner, (made, more) = build(MORAM), cases.experiences("bert", 2, rows=4)
    learner.learn(made)
    state = learner.state_dict()
    learner.detach()
    learner.model.requires_grad_(False)
    learner.detach()  # a second time it does nothing
    assert not any(p.requires_grad for p in learner.model.parameters())
    for use in (
        lambda: learner.learn(more), lambda: learner.evaluate([made]), lambda: learner.predict(made.test),
        lambda: learner.features(made.test), lambda: learner.forget(0), lambda: learner.abandon(), learner.state_dict,
        lambda: learner.load_state_dict(*state), lambda: learner.save_pretrained("nowhere"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match="it was detached from its model"):
            use()


# ---- an experience that fails
def fail(learner: Learner, rows: Any, after: int = 0) -> None:
    """Offers rows whose loss is not finite from the step `after` on."""
    plain = learner.objective.loss

    def broken(*given: Any) -> Any:
        total, count = plain(*given)
        return total * (math.nan if learner.position.step >= after else 1.0), count

    learner.objective.loss = broken  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss):
        learner.partial_fit(rows)
    learner.objective.loss = plain  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ([{"moram": {"rank": 2, "grow_every": 2}}, ER], {"protocol": FREE}),
        ("linear_probe", {"protocol": FREE, "head": "linear"}),
        ([MORAM, ER], {"protocol": {"rehearsal": 8}}),
        ({"lora": {"rank": 2, "grow": True}}, {"head": {"ridge": {"features": 8}}}),
        ("finetune", {}),
    ],
)
@pytest.mark.parametrize("learnt", [0, 1])
def test_what_fails_before_its_first_step_leaves_no_trace(spec: Any, options: Any, learnt: int) -> None:
    made, plain, failed = (
        cases.experiences("bert", 3, rows=8), *(build(spec, dropout=0.2, **options) for _ in range(2))
    )  # fmt: skip
    states = []
    for learner in (plain, failed):
        torch.manual_seed(4)
        for experience in made[:learnt]:
            learner.partial_fit(experience.train)
        if learner is failed:
            before = copied(learner.state_dict())
            fail(learner, made[2].train)
            assert differences(copied(learner.state_dict()), before) == []
        learner.partial_fit(made[1].train)
        states.append(copied(learner.state_dict()))
    assert differences(*states) == []


def test_half_a_pass_of_a_closed_form_head_is_taken_back() -> None:
    made = cases.experiences("bert", 2, rows=8)
    for method in ("linear_probe", {"lora": {"rank": 2}}):
        learner = build(method, head={"ridge": {"features": 8}}, per_device_eval_batch_size=2)
        learner.learn(made[0])
        head: Any = learner.head
        before, plain = {name: t.clone() for name, t in head.state_dict()[0].items()}, head._solve

        def broken(ridge: float) -> Any:
            raise NonFiniteLoss("ridge head: no")

        head._solve = broken  # after all rows were summed
        with pytest.raises(NonFiniteLoss):
            learner.learn(made[1])
        head._solve = plain
        assert torch.equal(head.state_dict()[0]["gram"], before["gram"]) and head.values["rows"] == 8
        learner.learn(made[1])  # goes on, and the rows are summed once
        assert head.values["rows"] == 16


def test_what_fails_in_its_middle_can_be_abandoned() -> None:
    made, learner = cases.experiences("bert", 3, rows=8), build(MORAM)
    learner.learn(made[0])
    learner.abandon()  # between experiences there is nothing to give up
    assert learner.position.experience == 1
    fail(learner, made[1].train, after=1)
    assert learner.position.step == 1 and learner.position.phase == "train"
    with pytest.raises(BadInput, match="stands at step 1 of 'arrival-1'.*call `abandon`"):
        learner.partial_fit(made[2].train)
    learner.abandon()
    learner.partial_fit(made[2].train)
    assert learner.seen == [f"class{n}" for n in range(6)] and learner.position.experience == 3


# ---- schedules without boundaries
def test_warm_up_goes_on_over_arrivals() -> None:
    seen, settings = [], {"warmup_steps": 3, "learning_rate": 0.1}
    learner = build("linear_probe", protocol=FREE, **settings)
    for experience in cases.experiences("bert", 5, rows=4):
        learner.learn(
            experience, on_step=lambda at, _: seen.append(at.optimization.kinds["adamw"].param_groups[0]["lr"])
        )
    expected = [0.1 * rate_factor(TrainingConfig(**settings), step, 5) for step in range(5)]
    assert seen == pytest.approx(expected) and seen[0] < seen[1] < seen[2] == seen[3]


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_schedule_needs_an_end(scheduler: str) -> None:
    with pytest.raises(BadInput, match=f"training.lr_scheduler: is {scheduler}.*boundaries none"):
        build("linear_probe", protocol=FREE, lr_scheduler=scheduler)


# ---- choosing rows
def test_rows_that_a_method_draws_are_the_same_after_a_resume() -> None:
    made, states = cases.experiences("bert", 2)[0], []
    whole = build(["linear_probe", Choosing(MethodConfig()), ER], protocol={"rehearsal": 8})
    whole.learn(made, on_step=lambda loop, _: states.append(copied(loop.state_dict())))
    again = build(["linear_probe", Choosing(MethodConfig()), ER], protocol={"rehearsal": 8})
    again.load_state_dict(*states[0])
    again.learn(made)
    assert differences(copied(again.state_dict()), copied(whole.state_dict())) == []


# ---- misuse
def test_classes_given_as_numbers_are_those_of_the_rows() -> None:
    learner = build("linear_probe", classes=[0, 1.0, "two"])
    rows = [{"text": "aa", "label": 0}, {"text": "bb", "label": 1}]
    learner.learn(Experience(0, "numbers", rows))
    assert learner.declared == ["0", "1", "two"] and learner.seen == ["0", "1"]
    assert learner.predict(rows, classes=[1]) == ["1", "1"]
    with pytest.raises(BadInput, match="'5' is outside the declared set of 3 classes"):
        learner.learn(Experience(1, "more", [{"text": "cc", "label": 5}]))
    with pytest.raises(BadInput, match=r"classes\[1\]"):
        build("linear_probe", classes=["a", None])


def test_arrivals_and_scores_that_make_no_sense_are_refused() -> None:
    made, learner = cases.experiences("bert", 2), build("linear_probe")
    with pytest.raises(BadInput, match="partial_fit: expected a list of rows, found NoneType"):
        learner.partial_fit(None)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="partial_fit: joint learns nothing before the last experience"):
        build([{"lora": {"rank": 2}}, "joint"]).partial_fit(made[0].train)
    with pytest.raises(BadInput, match="features: there are no rows"):
        learner.features([])
    learner.learn(made[0])
    with pytest.raises(BadInput, match="'e0' and 'other' both have the index 0"):
        learner.evaluate([made[0], Experience(0, "other", made[1].train, made[1].test)])


@pytest.mark.parametrize(
    ("training", "words"),
    [([1], r"training: expected a mapping of settings, found \[1\]"), ({1: 2}, "expected a mapping of settings"),
     ({"learning_rate": 1e39}, "training.learning_rate"), ({"head_learning_rate": math.inf}, "head_learning_rate")],
)  # fmt: skip
def test_training_settings_that_cannot_be(training: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Learner(*cases.build_host("bert"), method="linear_probe", objective=SHORT, training=training)


def test_the_largest_rate_is_a_number_to_the_optimizer() -> None:
    learner = build(Recorder(), learning_rate=1e30, head_learning_rate=1e30, max_steps=1, max_grad_norm=None)
    learner.learn(cases.experiences("bert", 1, rows=4)[0])
    assert learner.counters.steps == 1


def test_an_augmentation_that_would_reach_no_feature_is_refused() -> None:
    model, processor = cases.build_host("vit")
    spec = {"classification": {"augment": "flip_crop"}}
    with pytest.raises(BadInput, match=r"objective\.classification\.augment: is flip_crop, but linear_probe"):
        Learner(model, processor, method="linear_probe", objective=spec)
    Learner(model, processor, method=["linear_probe", ER], objective=spec, protocol={"rehearsal": 8})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("setting", [("codyra", "l1"), ("moram", "temperature"), ("seta", "anchor"), ("rwf", "beta")])
def test_a_setting_that_is_no_finite_number_is_refused(setting: tuple[str, str], value: float) -> None:
    method, field = setting
    with pytest.raises(BadInput, match=rf"method\.{method}\.{field}: .*(finite|greater)"):
        METHODS.parse({method: {field: value}}, "method")


def test_one_row_text_or_experience_in_place_of_a_list_is_named() -> None:
    learner, made = build(MORAM), cases.experiences("bert")
    learner.learn(made[0])
    for rows, message in (
        ({"text": "a"}, "rows: expected a list of rows, found one dict; put a row into a list"),
        ("a", "rows: expected a list of rows, found one str"),
        (["a"], "row 0: expected a mapping of fields, found str"),
    ):
        for use in (learner.predict, learner.features):
            with pytest.raises(BadInput, match=message):
                use(rows)
    with pytest.raises(BadInput, match=r"evaluate: expected a list of experiences, found .*give \[experience\]"):
        learner.evaluate(made[0])
