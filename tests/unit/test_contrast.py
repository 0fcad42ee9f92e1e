"""Contrast keys: directions from two second moments, and new atoms that start along them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.errors import BadInput
from perdure.learner import Learner
from perdure.loading import evenly
from perdure.memory import contrast_directions, paired
from tests.conformance import cases

SPEC: dict[str, Any] = {"moram": {"rank": 3, "top_k": 2, "keys": "contrast"}}


def moment(rows: int, d: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (
        x
        * torch.linspace(0.2, 2, d, dtype=torch.float64)[
            torch.randperm(d, generator=torch.Generator().manual_seed(seed))
        ]
    )
    return x.t() @ x


# ---- the directions
@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 12), seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
def test_directions_against_the_full_decomposition(d: int, seed: int, scale: float) -> None:
    new, old, count = moment(40, d, seed), moment(40, d, seed + 1000), (d + 1) // 2
    found = contrast_directions(new * scale, old, count, iterations=300)
    # The reference: every eigenvector of the whitened moment.
    shrunk = old + 0.01 * old.trace() / d * torch.eye(d, dtype=old.dtype)
    root = torch.linalg.cholesky(shrunk)
    inverse = torch.linalg.inv(root)
    values = torch.linalg.eigvalsh(inverse @ new @ inverse.t()).flip(0)[:count]
    assert found is not None and found.shape == (count, d)
    quotients = ((found @ new) * found).sum(1) / ((found @ shrunk) * found).sum(1)
    assert torch.allclose(quotients, values, rtol=1e-3)
    assert torch.allclose(found.norm(dim=1), torch.ones(count, dtype=found.dtype))
    again = contrast_directions(new, old, count, iterations=300)
    assert again is not None and torch.allclose(found, again, atol=1e-4)  # scales do not matter


def test_what_only_new_inputs_have_wins() -> None:
    old, new = torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.0])), torch.diag(torch.tensor([9.0, 4.0, 1.0, 1.0]))
    found = contrast_directions(new, old, 1)
    assert found is not None and torch.allclose(found, torch.tensor([[0.0, 0, 0, 1]], dtype=found.dtype), atol=1e-6)
    # A direction that nothing ever used is not what new inputs have.
    unused = contrast_directions(torch.diag(torch.tensor([1.0, 2, 0])), torch.diag(torch.tensor([1.0, 1, 0])), 1)
    assert unused is not None and int(unused.abs().argmax()) == 1


def test_nothing_to_compare_and_bad_values() -> None:
    eye = torch.eye(3)
    assert (
        contrast_directions(eye, torch.zeros(3, 3), 1) is None
        and contrast_directions(torch.zeros(3, 3), eye, 1) is None
    )
    for new, old, count, shrink, message in (
        (torch.eye(2), eye, 1, 0.01, "new: found shape"), (eye, eye, 4, 0.01, "count: found 4; expected 1 to 3"),
        (eye, eye, 1, 0.0, "shrink: found 0.0"), (eye * float("nan"), eye, 1, 0.01, "not finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            contrast_directions(new, old, count, shrink=shrink)


def test_pairs_and_even_rows() -> None:
    rows = torch.tensor([[1.0, 0], [0, 1]])
    assert paired(rows, 4).tolist() == [[1, 0], [-1, 0], [0, 1], [0, -1]] and paired(rows, 3).shape == (3, 2)
    assert evenly([{"n": n} for n in range(7)], 3) == [{"n": 0}, {"n": 2}, {"n": 4}]
    assert len(evenly([{}] * 3, 5)) == 3


# ---- the keys of a method
def started(learner: Any, experience: Any) -> dict[str, torch.Tensor]:
    """Keys of the new atoms when the experience begins, before any step."""
    seen: dict[str, torch.Tensor] = {}
    method = learner.methods[0]
    before = method.before_experience

    def watch(given: Any) -> None:
        before(given)
        seen.update({name: memory.bank.new_keys.detach().clone() for name, memory in method.memories.items()})

    method.before_experience = watch
    learner.learn(experience)
    method.before_experience = before
    return seen


def test_keys_start_where_the_experience_differs() -> None:
    made = cases.experiences("bert")
    contrast, drawn = (
        cases.build_learner("bert", {"moram": {"rank": 3, "top_k": 2, "keys": keys}}) for keys in ("contrast", "drawn")
    )
    first, usual = started(contrast, made[0]), started(drawn, made[0])
    assert all(torch.equal(first[name], usual[name]) for name in first)  # nothing to differ from yet
    moments = {key: tensor.clone() for key, tensor in contrast.methods[0].tensors.items()}
    later = started(contrast, made[1])
    for keys in later.values():
        assert torch.allclose(keys.norm(dim=1), torch.full((3,), 3**-0.5), atol=1e-6)
        assert torch.allclose(keys[0], -keys[1])
    grown = contrast.methods[0].tensors
    assert all(not torch.equal(grown[key], moments[key]) for key in moments) and set(grown) == set(moments)
    assert contrast.counters.extra_passes == 2 and drawn.counters.extra_passes == 0
    # The answer to a key's own direction is larger on new inputs than on old ones, for that of random keys.
    name = next(key.partition("/")[2] for key in moments)
    old, both = moments[f"contrast/{name}"], grown[f"contrast/{name}"]

    def quotient(keys: torch.Tensor) -> float:
        return float((((keys @ (both - old)) * keys).sum(1) / ((keys @ old) * keys).sum(1)).mean())

    assert quotient(later[name]) > quotient(usual[name])


def test_more_keys_than_directions_leave_the_rest_drawn() -> None:
    made = cases.experiences("bert")
    learner = cases.build_learner("bert", {"moram": {"rank": 35, "top_k": 2, "keys": "contrast"}})
    learner.learn(made[0])
    narrow = [keys for keys in started(learner, made[1]).values() if keys.shape[1] == 16]
    for keys in narrow:
        assert torch.allclose(keys[:32:2], -keys[1:32:2]) and not torch.allclose(keys[32], -keys[33])
    assert narrow


def test_contrast_and_protection_together() -> None:
    made = cases.experiences("bert")
    learner = cases.build_learner("bert", {"moram": {**SPEC["moram"], "protect": {"inputs": 0.5}}})
    started(learner, made[0])
    method: Any = learner.methods[0]
    bases = dict(method._protection._bases)  # of the first experience; learning the second one replaces them
    keys = started(learner, made[1])
    assert {key.partition("/")[0] for key in method.tensors} == {"moment", "contrast"}
    for name, found in keys.items():
        basis = bases[method.values["sharing"][name]].to(found.dtype)
        assert float((found @ basis).norm()) < 1e-5 * float(found.norm()) + 1e-7


def test_forgetting_leaves_the_moments_and_says_so() -> None:
    """They are sums over experiences, so that one cannot be taken out; whoever asks to forget must be told."""
    made = cases.experiences("bert")
    learner = cases.build_learner("bert", {"moram": {**SPEC["moram"], "protect": {"inputs": 0.5}}})
    for experience in made[:2]:
        learner.learn(experience)
    moments = {name: tensor.clone() for name, tensor in learner.methods[0].tensors.items()}
    assert learner.forget(0)[0] > 0
    assert all(torch.equal(tensor, moments[name]) for name, tensor in learner.methods[0].tensors.items())
    told = learner.writes[0]["left"]
    assert len(told) == 2 and "second moments" in told[0] and "protect and keys: contrast" in told[0]
    assert "cosine" in told[1] and "left" not in learner.writes[1]
    plain = cases.build_learner("bert", {"moram": {"rank": 2, "top_k": 2}})
    plain.learn(made[0])
    plain.forget(0)
    assert plain.writes[0]["left"] == ["cosine: what the head learnt from it"]


def test_a_stream_without_boundaries_has_nothing_old() -> None:
    with pytest.raises(BadInput, match=r"method\.moram\.keys: contrast needs boundaries"):
        Learner(
            *cases.build_host("bert"), method={"moram": {**SPEC["moram"], "grow_every": 3}},
            objective={"classification": {"max_length": 32}}, protocol={"boundaries": "none"},
        )  # fmt: skip
