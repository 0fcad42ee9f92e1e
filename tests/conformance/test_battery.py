"""The conformance battery: one set of checks x every method x tiny hosts.

The outcome of every pair is committed in matrix.json with the reason for each refusal; a new refusal, or a pair that starts
to work, fails until the file says so. Checks of stillness first show that the trained adapter differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.errors import BadInput, PerdureError
from perdure.learner import Learner
from perdure.registry import METHODS

from . import cases

MATRIX = json.loads(Path(__file__).with_name("matrix.json").read_text())
METHOD_SETTINGS: dict[str, Any] = {name: cases.SETTINGS.get(name, name) for name in METHODS.names()} | cases.VARIANTS
PAIRS = [(method, host) for method in METHOD_SETTINGS for host in cases.HOSTS]
RUNNING = [pair for pair in PAIRS if MATRIX.get(pair[0], {}).get(pair[1]) == "runs"]


@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_matrix_says_what_happens(method: str, host: str) -> None:
    expected = MATRIX[method][host]
    try:
        learner = cases.build_learner(host, METHOD_SETTINGS[method])
        learner.learn(cases.experiences(host, 1)[0])
        found = "runs"
    except PerdureError as error:
        found = f"refused: {error}"
    assert found == expected, "the method x host matrix changed; if that is right, say so in matrix.json"


def test_matrix_has_no_stale_rows() -> None:
    assert set(MATRIX) == set(METHOD_SETTINGS)


@pytest.mark.parametrize(("method", "host"), RUNNING)
def test_attach_and_detach(method: str, host: str) -> None:
    made = cases.experiences(host)
    model, _ = cases.build_host(host)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = cases.build_learner(host, METHOD_SETTINGS[method])
    inputs = next(iter(learner.batches(made[0].test, unlabelled=True))).inputs
    with torch.no_grad():
        plain = model(**inputs)[0]
        if all(item.keeps_output for item in learner.methods):
            assert torch.equal(learner.model(**inputs)[0], plain)
        for experience in made:
            learner.learn(experience)
        changes_model = any(item.adapts for item in learner.methods)
        assert torch.equal(learner.model(**inputs)[0], plain) != changes_model, "the trained model must differ, a frozen one not"
        assert learner.detach() is learner.model
        assert torch.equal(learner.model(**inputs)[0], plain)
    restored = learner.model.state_dict()
    assert list(restored) == list(original)
    assert all(torch.equal(restored[name], original[name]) for name in original)


@pytest.mark.parametrize(("method", "host"), RUNNING)
def test_what_is_frozen_stays_and_what_trains_moves(method: str, host: str) -> None:
    learner = cases.build_learner(host, METHOD_SETTINGS[method], epochs=3)
    made = cases.experiences(host)
    base = {name: tensor.clone() for name, tensor in learner.frozen_base().items()}
    started: dict[str, torch.Tensor] = {}

    def on_step(loop: Any, _: dict[str, float]) -> None:
        if not started:  # the values after the first step: atoms with zero values move their keys from the second on
            started.update({name: p.detach().clone() for name, p in loop.named_trainable()})

    for experience in made:
        started.clear()
        learner.learn(experience, on_step=on_step)
        if experience.index == 0 and started:
            trained = dict(_all_trained(learner))
            still = [n for n, before in started.items() if n in trained and torch.equal(trained[n], before)]
            assert not still, f"declared as trainable, but did not move: {still}"
    after = learner.frozen_base()
    assert set(after) == set(base)
    assert all(torch.equal(after[name], base[name]) for name in base)


def _all_trained(learner: Learner) -> list[tuple[str, torch.Tensor]]:
    """Trained tensors after the experience; of a bank that has frozen its new rows, nothing is left to look at."""
    return [(name, p.detach()) for name, p in learner.named_trainable()]


@pytest.mark.parametrize(("method", "host"), RUNNING)
def test_state_of_any_moment_goes_on_bit_for_bit(method: str, host: str) -> None:
    """Dropout is on: an unsaved random state would show. The state is taken in mid-experience and after it."""
    made = cases.experiences(host)
    whole = cases.build_learner(host, METHOD_SETTINGS[method], dropout=0.2)
    states: list[tuple[Any, Any]] = []

    def on_step(loop: Any, _: dict[str, float]) -> None:
        if loop.position.experience == 1 and loop.position.step == 3:
            states.append(_copied(loop.state_dict()))

    for experience in made:
        whole.learn(experience, on_step=on_step)
        if experience.index == 1:
            states.append(_copied(whole.state_dict()))
    expected = whole.state_dict()[0]
    wanted = 1 if method in ("linear_probe", "joint") and cases.OBJECTIVE[host] == "causal_lm" else 2
    assert len(states) >= min(wanted, 1)
    for tensors, values in states:
        torch.manual_seed(99)  # whatever the process drew before must not matter
        fresh = cases.build_learner(host, METHOD_SETTINGS[method], dropout=0.2)
        fresh.load_state_dict(tensors, values)
        for experience in made[fresh.position.experience :]:
            fresh.learn(experience)
        found = fresh.state_dict()[0]
        assert set(found) == set(expected)
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differing


def _copied(state: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, values = state
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values))


@pytest.mark.parametrize(("method", "host"), RUNNING)
def test_save_and_load(method: str, host: str, tmp_path: Path) -> None:
    made = cases.experiences(host)
    learner = cases.build_learner(host, METHOD_SETTINGS[method])
    for experience in made:
        learner.learn(experience)
    learner.save_pretrained(tmp_path / "kept")
    again = Learner.from_pretrained(tmp_path / "kept", *cases.build_host(host))
    assert torch.equal(cases.outputs(again, made), cases.outputs(learner, made))
    assert again.evaluate(made) == learner.evaluate(made)
    other, processor = cases.build_host(host)
    frozen = dict(other.named_parameters())
    name = next(n for n in learner.frozen_base() if n in frozen) if learner.frozen_base() else None
    if name is not None:
        with torch.no_grad():
            frozen[name].add_(1.0)
        with pytest.raises(BadInput, match="load that model"):
            Learner.from_pretrained(tmp_path / "kept", other, processor)


@pytest.mark.parametrize(("method", "host"), RUNNING)
def test_bfloat16_runs(method: str, host: str) -> None:
    learner = cases.build_learner(host, METHOD_SETTINGS[method], bf16=True, max_steps=2)
    made = cases.experiences(host, 2)
    for experience in made:
        learner.learn(experience)
    assert torch.isfinite(cases.outputs(learner, made)).all()
    assert all(p.dtype == torch.float32 for _, p in learner.named_trainable())


@pytest.mark.parametrize(("method", "host"), RUNNING)
def test_evaluation_changes_nothing(method: str, host: str) -> None:
    made = cases.experiences(host)
    learner = cases.build_learner(host, METHOD_SETTINGS[method], dropout=0.2)
    learner.learn(made[0])
    before = _copied(learner.state_dict())
    learner.evaluate(made[:1])
    if learner.head is not None:
        learner.predict(made[0].test)
    after = learner.state_dict()
    assert json.loads(json.dumps(after[1])) == before[1]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


@pytest.mark.parametrize("head", ["linear", "cosine", "ridge"])
@pytest.mark.parametrize("method", ["linear_probe", "moram"])
def test_every_head_grows_saves_and_loads(method: str, head: str, tmp_path: Path) -> None:
    spec = {head: {"features": 32}} if head == "ridge" else head
    made = cases.experiences("bert", 10, rows=6)
    learner = cases.build_learner("bert", METHOD_SETTINGS[method], head=spec, epochs=1)
    for experience in made:
        learner.learn(experience)
    assert len(learner.seen) == 20
    learner.save_pretrained(tmp_path / "kept")
    again = Learner.from_pretrained(tmp_path / "kept", *cases.build_host("bert"))
    assert torch.equal(cases.outputs(again, made), cases.outputs(learner, made))
