"""The conformance battery: one set of checks x every method x tiny hosts.

The outcome of every pair is committed in matrix.json with the reason for each refusal; a new refusal, or a pair that
starts to work, fails until the file says so. Checks of stillness first show that the trained adapter differs.

What is slow is to learn, so each pair learns one stream once (`story`), with dropout on, and the checks look at what
that left behind. A method more costs about two seconds on a slow core.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.errors import BadInput, PerdureError
from perdure.learner import Learner

from . import cases

SPECS = cases.all_specs()
PAIRS = [(method, host) for host in cases.HOSTS for method in SPECS]
RUNNING = [pair for pair in PAIRS if cases.runs(*pair)]
State = tuple[dict[str, torch.Tensor], dict[str, Any]]

every_pair = pytest.mark.parametrize(("method", "host"), RUNNING)


@dataclass
class Story:
    """One stream learnt by one method on one host, and what was noted on the way."""

    learner: Learner
    original: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    untouched: torch.Tensor
    attached: torch.Tensor
    inputs: dict[str, torch.Tensor]
    matrix: list[list[float | None]] = field(default_factory=list)
    moved: dict[str, bool] = field(default_factory=dict)
    mid: State | None = None
    boundary: State | None = None
    end: State | None = None
    evaluated: tuple[State, State] | None = None


@functools.cache
def story(method: str, host: str) -> Story:
    made = cases.experiences(host)
    model, _ = cases.build_host(host)
    learner = cases.build_learner(host, SPECS[method], dropout=0.2)
    inputs = cases.host_inputs(host, learner, made)
    with torch.no_grad():
        untouched, attached = model(**inputs)[0], learner.model(**inputs)[0]
    told = Story(learner, _clones(model.state_dict()), _clones(learner.frozen_base()), untouched, attached, inputs)
    started: dict[str, torch.Tensor] = {}

    def on_step(loop: Any, _: dict[str, float]) -> None:
        position = loop.position
        if position.step == 1:  # values of new atoms are zero at first, so their keys move from the second step on
            started.clear()
            started.update(_clones(dict(loop.named_trainable())))
        elif position.step == 5:  # before the end: a bank freezes its new rows there
            now = dict(loop.named_trainable())
            for name, before in started.items():
                told.moved[name] = told.moved.get(name, False) or not torch.equal(now[name], before)
        if position.experience == 1 and position.step == 3:
            told.mid = _copied(loop.state_dict())

    for experience in made:
        learner.learn(experience, on_step=on_step)
        told.matrix.append([*learner.evaluate(made[: experience.index + 1]).values(), *[None] * (2 - experience.index)])
        if experience.index == 1:
            told.boundary = _copied(learner.state_dict())
    told.end = _copied(learner.state_dict())
    learner.evaluate(made)
    if learner.head is not None:
        learner.predict(made[0].test)
    told.evaluated = told.end, _copied(learner.state_dict())
    return told


def _clones(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _copied(state: State) -> State:
    values = json.loads(json.dumps(state[1]))
    values["counters"]["seconds"] = 0.0
    return _clones(state[0]), values


def _differences(found: State, expected: State) -> list[str]:
    assert set(found[0]) == set(expected[0])
    tensors = [name for name in expected[0] if not torch.equal(found[0][name], expected[0][name])]
    return tensors + [name for name in expected[1] if found[1][name] != expected[1][name]]


# ---- the matrix
@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_matrix_says_what_happens(method: str, host: str) -> None:
    try:
        story(method, host)
        found = "runs"
    except PerdureError as error:
        found = f"refused: {error}"
    assert found == cases.MATRIX[method][host], (
        "the method x host matrix changed; if that is right, say so in matrix.json"
    )


def test_matrix_has_no_stale_rows() -> None:
    assert set(cases.MATRIX) == set(SPECS)
    assert all(set(row) == set(cases.HOSTS) for row in cases.MATRIX.values())


# ---- stillness and movement
@every_pair
def test_attach_leaves_the_outputs(method: str, host: str) -> None:
    told = story(method, host)
    if all(item.keeps_output for item in told.learner.methods):
        assert torch.equal(told.attached, told.untouched)


@every_pair
def test_what_trains_moves(method: str, host: str) -> None:
    told = story(method, host)
    if all(item.learns for item in told.learner.methods):
        assert told.moved, "nothing was declared as trainable"
    still = [name for name, moved in told.moved.items() if not moved]
    assert still == [], "declared as trainable, but did not move"


@every_pair
def test_what_is_frozen_stays(method: str, host: str) -> None:
    told = story(method, host)
    _assert_the_model_differs(told)
    after = told.learner.frozen_base()
    assert set(after) == set(told.base)
    assert all(torch.equal(after[name], told.base[name]) for name in told.base)


def _assert_the_model_differs(told: Story) -> None:
    with torch.no_grad():
        trained = told.learner.model(**told.inputs)[0]
    adapts = any(item.adapts for item in told.learner.methods)
    assert torch.equal(trained, told.untouched) != adapts, "an adapted model must differ now, a frozen one must not"


@every_pair
def test_evaluation_changes_nothing(method: str, host: str) -> None:
    before, after = story(method, host).evaluated or pytest.fail("not evaluated")
    assert _differences(after, before) == []


# ---- state
@every_pair
@pytest.mark.parametrize("moment", ["mid", "boundary"])
def test_state_goes_on_bit_for_bit(method: str, host: str, moment: str) -> None:
    """Dropout is on: an unsaved random state would show."""
    told = story(method, host)
    state = getattr(told, moment)
    assert told.end is not None
    if state is None:  # nothing trains before the last experience: there is no middle
        assert moment == "mid" and method in cases.WITHOUT_A_MIDDLE
        return
    torch.manual_seed(99)  # whatever the process drew before must not matter
    fresh = cases.build_learner(host, SPECS[method], dropout=0.2)
    fresh.load_state_dict(*_copied(state))
    for experience in cases.experiences(host)[fresh.position.experience :]:
        fresh.learn(experience)
    assert _differences(_copied(fresh.state_dict()), told.end) == []


@every_pair
def test_save_and_load(method: str, host: str, tmp_path: Path) -> None:
    made, learner = cases.experiences(host), story(method, host).learner
    learner.save_pretrained(tmp_path / "kept")
    again = Learner.from_pretrained(tmp_path / "kept", *cases.build_host(host))
    assert torch.equal(cases.outputs(again, made), cases.outputs(learner, made))
    assert again.evaluate(made) == learner.evaluate(made)
    assert again.stored_bytes() > 0
    other, processor = cases.build_host(host)
    own = dict(other.named_parameters())
    frozen = next((name for name in learner.frozen_base() if name.replace(".base_layer", "") in own), None)
    if frozen is not None:
        with torch.no_grad():
            own[frozen.replace(".base_layer", "")].add_(1.0)
        with pytest.raises(BadInput, match="load that model"):
            Learner.from_pretrained(tmp_path / "kept", other, processor)


# ---- taking back
@every_pair
def test_forget_or_undo(method: str, host: str) -> None:
    """Structural removal leaves nothing of a write; where a method can only be rolled back, an older state does it."""
    told, made = story(method, host), cases.experiences(host)
    fresh = cases.build_learner(host, SPECS[method], dropout=0.2)
    fresh.load_state_dict(*_copied(told.end or pytest.fail("no state")))
    before = cases.outputs(fresh, made)
    assert torch.equal(before, cases.outputs(told.learner, made))
    if any(item.removal == "rollback" for item in fresh.methods):
        with pytest.raises(BadInput, match="undo"):
            fresh.forget(1)
        fresh.load_state_dict(*_copied(told.boundary or pytest.fail("no state")))
        fresh.learn(made[2])
        assert torch.equal(cases.outputs(fresh, made), before)
        return
    gone = fresh.forget(1)
    assert min(gone) > 0
    assert all((owners != 1).all() for name, owners in fresh.state_dict()[0].items() if name.endswith("owners"))
    assert not torch.equal(cases.outputs(fresh, made), before)
    with pytest.raises(BadInput, match="forgotten before"):
        fresh.forget(1)
    fresh.learn(cases.experiences(host, 4)[3])  # goes on from there
    assert torch.isfinite(cases.outputs(fresh, made)).all()


# ---- use
@every_pair
def test_bfloat16_runs(method: str, host: str) -> None:
    learner = cases.build_learner(host, SPECS[method], bf16=True, max_steps=2)
    made = cases.experiences(host, 2)
    for experience in made:
        learner.learn(experience)
    assert torch.isfinite(cases.outputs(learner, made)).all()
    assert all(p.dtype == torch.float32 for _, p in learner.named_trainable())


@pytest.mark.parametrize(("method", "host"), [pair for pair in RUNNING if cases.OBJECTIVE[pair[1]] == "causal_lm"])
def test_generate_with_a_cache(method: str, host: str) -> None:
    model = story(method, host).learner.model
    prompt = torch.tensor([[72, 101, 108, 108], [120, 121, 122, 33]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
        plain = model.generate(prompt, attention_mask=mask, use_cache=False, **options)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, plain)


@every_pair
def test_report_builds(method: str, host: str, tmp_path: Path) -> None:
    cases.build_a_report(story(method, host).learner, story(method, host).matrix, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in text and story(method, host).learner.methods[0].name in text


# ---- last, because the shared learner is taken apart
@every_pair
def test_detach_restores_the_model(method: str, host: str) -> None:
    told = story(method, host)
    assert told.learner.detach() is told.learner.model
    restored = told.learner.model.state_dict()
    assert list(restored) == list(told.original)
    assert all(torch.equal(restored[name], told.original[name]) for name in told.original)
    assert all(p.requires_grad for p in told.learner.model.parameters())
    with torch.no_grad():
        assert torch.equal(told.learner.model(**told.inputs)[0], told.untouched)


@pytest.mark.parametrize("head", ["linear", "cosine", "ridge", "ncm", "slda", "slca"])
@pytest.mark.parametrize("method", ["linear_probe", "moram"])
def test_every_head_grows_saves_and_loads(method: str, head: str, tmp_path: Path) -> None:
    spec = {head: {"features": 32}} if head == "ridge" else head
    made = cases.experiences("bert", 10, rows=6)
    learner = cases.build_learner("bert", SPECS[method], head=spec, epochs=1)
    for experience in made:
        learner.learn(experience)
    assert len(learner.seen) == 20
    learner.save_pretrained(tmp_path / "kept")
    again = Learner.from_pretrained(tmp_path / "kept", *cases.build_host("bert"))
    assert torch.equal(cases.outputs(again, made), cases.outputs(learner, made))
