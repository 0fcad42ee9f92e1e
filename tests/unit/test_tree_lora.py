"""TreeLoRA: trees and bounds worked by hand, the pull's value and gradient, what is stored, and what it does."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from loop_methods import build

from perdure.errors import BadInput
from perdure.memory import (
    TaskNode,
    direction_gap,
    drawn_as_released,
    least_bound,
    relative_pull,
    released_alignment,
    tree_of_changes,
    tree_of_directions,
)
from tests.conformance import cases

SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 4.0, "dropout": 0.0}


def tree_lora(**settings: Any) -> Any:
    return {"tree_lora": SETTINGS | settings}


def method_of(learner: Any) -> Any:
    return learner.methods[0]


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---- the tree
def test_gaps_of_directions_by_hand() -> None:
    a, b = matrix([3.0, -1.0], [0.0, 0.0]), matrix([-2.0, -2.0], [5.0, 0.0])
    assert direction_gap(a, b).tolist() == [0.75, 0.5]  # ½ (|¾ + ½| + |−¼ + ½|); no direction is half-way to all
    assert direction_gap(a, -a).tolist() == [1.0, 0.0] and direction_gap(a, 7 * a).tolist() == [0.0, 0.0]


def test_the_tree_of_four_tasks_by_hand() -> None:
    first = matrix([1, 0], [2, 2], [0, 1], [0.5, 0.5])  # 0 and 2 lie 1 away from the mean direction (½, ½)
    second = matrix([1, 0], [3, 0], [1, 0], [0, 1])
    root = tree_of_directions([first, second])
    assert root.tasks == (0, 1, 2, 3) and root.spread == 0.75 and root.middle == 0.0
    near, far = root.children
    assert (near.tasks, near.spread) == ((1, 3), 0.5) and (far.tasks, far.spread) == ((0, 2), 0.5)
    assert [child.tasks for child in (*near.children, *far.children)] == [(1,), (3,), (0,), (2,)]
    assert all(not leaf.children and leaf.spread == 0 for leaf in near.children)
    assert tree_of_directions([first[:1], second[:1]]) == TaskNode((0,))


def test_the_tree_against_a_plain_reference() -> None:
    draw = torch.Generator().manual_seed(4)
    layers = [torch.randn(9, width, generator=draw, dtype=torch.float64) for width in (5, 3, 4)]
    unit = [[[x / sum(map(abs, row)) for x in row] for row in rows.tolist()] for rows in layers]

    def gap(i: int, j: int) -> float:
        parts = [sum(abs(x - y) for x, y in zip(rows[i], rows[j], strict=True)) / 2 for rows in unit]
        return sum(parts) / len(parts)

    def check(node: TaskNode, depth: int) -> list[int]:
        pairs = [gap(i, j) for i, j in itertools.combinations(node.tasks, 2)]
        assert node.spread == pytest.approx(max(pairs, default=0.0))
        if not node.children:
            return list(node.tasks)
        rows = unit[depth % 3]
        mean = [sum(rows[i][d] for i in node.tasks) / len(node.tasks) for d in range(len(rows[0]))]
        far_from = {i: sum(abs(x - m) for x, m in zip(rows[i], mean, strict=True)) for i in node.tasks}
        near, far = node.children
        if len(node.tasks) > 2:  # two are as far from their mean
            assert max(far_from[i] for i in near.tasks) < min(far_from[i] for i in far.tasks)
        assert len(near.tasks) == (len(node.tasks) + 1) // 2
        return check(near, depth + 1) + check(far, depth + 1)

    assert sorted(check(tree_of_directions(layers), 0)) == list(range(9))


def test_the_released_tree_by_hand() -> None:
    layers = [matrix([1, 0], [3, 0], [3, 1]), matrix([1], [2], [2])]
    root = tree_of_changes(layers)  # changes (1, 0), (2, 0), (0, 1): products with their mean 1, 2, ⅓
    assert root.middle == 1.0 and [child.tasks for child in root.children] == [(0, 1), (2,)]
    assert root.children[0].middle == 1.0 and [c.tasks for c in root.children[0].children] == [(0,), (1,)]


# ---- the choice
def three(spread: float) -> TaskNode:
    pair = TaskNode((0, 1), spread, 0.0, (TaskNode((0,)), TaskNode((1,))))
    return TaskNode((0, 1, 2), 0.9, 0.0, (pair, TaskNode((2,))))


def test_the_lower_confidence_bound_by_hand() -> None:
    """log 15 = 2.708: leaves −1.146, −1.346, −1.044; the pair's own bound .4 − 1.164 − δ."""
    choices, gaps = [4, 4, 6], [0.5, 0.3, 0.3]
    assert least_bound(three(0.1), choices, gaps) == 2, "the pair is bounded by −.864, its tasks are alike"
    assert least_bound(three(1.0), choices, gaps) == 1, "a wide pair is bounded by its better task alone, −1.346"
    assert least_bound(three(0.1), choices, [0.5, 0.3, 0.31], exploration=0.0) == 1
    assert least_bound(three(0.1), choices, [0.5, 0.3, 0.29], exploration=0.0) == 2
    assert least_bound(TaskNode((0,)), [0], [0.0]) == 0


def test_what_was_never_chosen_comes_first_where_its_group_may_be_near() -> None:
    assert least_bound(three(0.1), [0, 0, 0], [0.0] * 3) == 0
    assert least_bound(three(0.1), [1, 0, 0], [0.5, 0.0, 0.0]) == 2
    assert least_bound(three(0.1), [1, 0, 1], [0.5, 0.0, 0.9]) == 1  # −1.696 against −1.196
    assert least_bound(three(0.1), [9, 0, 9], [0.9, 0.0, 0.1], exploration=0.2) == 2, "0 is far, and 1 is like 0"


def test_the_search_finds_the_nearest_of_many() -> None:
    """Directions (p, 1 − p) lie on a line: their gap is the distance in p."""
    places = [0.05, 0.9, 0.35, 0.95, 0.1, 0.3, 0.85, 0.8]
    root = tree_of_directions([torch.tensor([[p, 1 - p] for p in places], dtype=torch.float64)])
    draw = torch.Generator().manual_seed(0)
    choices, sums = [0] * 8, [0.0] * 8
    for _ in range(300):
        gaps = [s / max(1, n) for s, n in zip(sums, choices, strict=True)]
        task = least_bound(root, choices, gaps, exploration=0.2)
        choices[task] += 1
        sums[task] += abs(places[task] - 0.36) + 0.1 * float(torch.rand((), generator=draw)) - 0.05
    assert max(range(8), key=choices.__getitem__) == 2
    assert choices[2] + choices[5] > 200


def test_the_released_draw_by_hand() -> None:
    """μ 1 and 3, once chosen each: divided by their range 2 they lie 1 apart, so that the farther has e / (1 + e)."""
    root = TaskNode((0, 1), 0.0, 2.0, (TaskNode((0,)), TaskNode((1,))))
    draw = torch.Generator().manual_seed(1)
    choices, gaps = torch.ones(2, 3, dtype=torch.float64), matrix([1.0] * 3, [3.0] * 3)
    drawn = [drawn_as_released(root, choices, gaps, 0, 10, draw) for _ in range(1000)]
    assert sum(map(sum, drawn)) / 3000 == pytest.approx(math.e / (1 + math.e), abs=0.03)
    assert choices.eq(1).all() and gaps[1].eq(3).all()
    assert drawn_as_released(TaskNode((0,)), choices[:1], gaps[:1], 3, 10, draw) == [0, 0, 0]


def test_the_released_draw_scales_the_half_of_the_tree_that_it_falls_in() -> None:
    pair = TaskNode((0, 1), 0.0, 0.25, (TaskNode((0,)), TaskNode((1,))))
    root = TaskNode((0, 1, 2), 0.0, 1.0, (pair, TaskNode((2,))))
    choices, gaps, step, steps = matrix([2.0], [1.0], [4.0]), matrix([0.5], [0.9], [0.1]), 3, 7
    width = math.sqrt(math.log(2 * 7 * 4 * 5))
    raw = [g + width / math.sqrt(2 * n + 1e-5) for g, n in ((0.5, 2), (0.9, 1), (0.1, 4))]
    raw = [value + min(raw) for value in raw]

    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(value) for value in values]
        return [power / sum(powers) for power in powers]

    expected = [0.0] * 3
    for share, factors in zip(softmax(raw), ((0.25, 0.25, 1), (0.25, 0.25, 1), (1, 1, 1)), strict=True):
        scaled = [value * factor for value, factor in zip(raw, factors, strict=True)]
        parts = softmax([value / (max(scaled) - min(scaled) + 1e-5) for value in scaled])
        expected = [e + share * part for e, part in zip(expected, parts, strict=True)]
    draw = torch.Generator().manual_seed(2)
    drawn = [drawn_as_released(root, choices, gaps, step, steps, draw)[0] for _ in range(2500)]
    assert [drawn.count(task) / 2500 for task in range(3)] == pytest.approx(expected, abs=0.03)


# ---- the terms
def test_the_pull_and_its_gradient_by_hand() -> None:
    layers = [matrix([1, -2])[0].requires_grad_(), matrix([3])[0].requires_grad_()]
    targets = [matrix([2, -2])[0], matrix([1])[0]]
    pull = relative_pull(layers, targets)
    assert pull.item() == 1.125  # ½ (1/4 + 2/1)
    found = torch.autograd.grad(pull, layers)
    assert [each.tolist() for each in found] == [[-0.125, 0.0], [0.5]]
    assert relative_pull(targets, targets).item() == 0
    draw = torch.Generator().manual_seed(0)
    away = [torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    fixed = [torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(3)]
    found = torch.autograd.grad(relative_pull(away, fixed), away)
    for gradient, now, then in zip(found, away, fixed, strict=True):
        assert torch.allclose(gradient, (now - then).sign() / (3 * then.abs().sum()), rtol=0, atol=1e-15)
    assert torch.isfinite(relative_pull(away[:2], [torch.zeros(6), fixed[1]]))


def test_the_released_term_is_one_and_its_gradient_that_of_a_logarithm() -> None:
    now, then = matrix([1, 2])[0].requires_grad_(), matrix([3, 1])[0]
    for sign in (1, -1):  # of ⟨A, T⟩: where it is negative the gradient makes it more so
        term = released_alignment([now], [sign * then])
        assert term.item() == pytest.approx(1.0, abs=1e-5)
        (found,) = torch.autograd.grad(term, now)
        (wanted,) = torch.autograd.grad((now @ then).abs().log(), now)
        assert torch.allclose(found, wanted, rtol=1e-5) and found.tolist() == pytest.approx([0.6, 0.2], rel=1e-5)


# ---- in training
def noted_steps(learner: Any, made: Any) -> list[dict[str, Any]]:
    """Each step: its experience, A, the gradients that arrive, what was chosen, and the losses of the method."""
    noted: list[dict[str, Any]] = []
    method = method_of(learner)
    observe = method.after_backward

    def after_backward() -> None:
        downs = method._downs()
        noted.append({
            "experience": learner.position.experience, "step": learner.position.step, "chosen": method.values["chosen"],
            "A": {n: a.detach().clone() for n, a in downs.items()}, "g": {n: a.grad.clone() for n, a in downs.items()},
        })  # fmt: skip
        observe()

    method.after_backward = after_backward
    for experience in made:
        learner.learn(experience, on_step=lambda _, losses: noted[-1].update(losses=losses))
        noted[-1]["left"] = {n: a.detach().clone() for n, a in method._downs().items()}
    return noted


def test_the_loss_and_what_is_stored_are_the_formulas() -> None:
    learner = cases.build_learner("bert", tree_lora(strength=3.0), logging_steps=1)
    noted = noted_steps(learner, cases.experiences("bert"))
    assert len(noted) == 18
    left = [step["left"] for step in noted if "left" in step]
    signatures: dict[str, list[torch.Tensor]] = {name: [] for name in left[0]}
    for number in range(3):
        mine = [step for step in noted if step["experience"] == number]
        sums = {name: torch.zeros_like(a) for name, a in left[0].items()}
        for s, step in enumerate(mine):
            if number == 0:
                assert not step["chosen"] and "tree_lora.pull" not in step["losses"]
                sums = {name: total + step["g"][name] for name, total in sums.items()}
                continue
            (task,) = set(step["chosen"])
            assert 0 <= task < number and len(step["chosen"]) == len(sums) == 4
            weight, pull = 3.0 * s / 6, 0.0
            for name, total in sums.items():
                away, size = step["A"][name] - left[task][name], left[task][name].abs().sum()
                pull += float(away.abs().sum() / size) / 4
                sums[name] = total + step["g"][name] - weight * away.sign() / size / 4
            assert step["losses"]["tree_lora.pull"] == pytest.approx(weight * pull, rel=1e-4, abs=1e-7)
        for name, total in sums.items():
            signatures[name].append(total / 6)
    tensors = method_of(learner).tensors
    assert {name.partition("/")[0] for name in tensors} == {"signature", "adapter"}
    for name, rows in signatures.items():
        assert tensors[f"signature/{name}"].shape == (3, rows[0].numel())
        for k, row in enumerate(rows):
            size = float(row.abs().max())  # far below the pull's own gradient, which must not be in it
            assert size > 1e-6
            assert torch.allclose(tensors[f"signature/{name}"][k], row.flatten(), rtol=0, atol=0.01 * size)
            assert torch.equal(tensors[f"adapter/{name}"][k], left[k][name].flatten())


def test_choices_and_gaps_are_counted_as_they_are_seen() -> None:
    learner = cases.build_learner("bert", tree_lora())
    method, seen = method_of(learner), []

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.experience != 2:
            return
        pairs = {name: (method.tensors[f"running/{name}"], method.tensors[f"signature/{name}"])
                 for name in method.branches}  # fmt: skip
        gaps = torch.stack([direction_gap(now, past) for now, past in pairs.values()], 1)
        seen.append((method.tensors["choices"].clone(), method.tensors["gaps"].clone(), gaps.double()))

    for experience in cases.experiences("bert"):
        learner.learn(experience, on_step=on_step)
    assert len(seen) == 6
    before = (torch.zeros(2, 4), torch.zeros(2, 4))
    for choices, gaps, wanted in seen:
        new = choices - before[0]
        assert sorted(new[:, 0].tolist()) == [0.0, 1.0] and (new == new[:, :1]).all(), "one task, all maps"
        assert torch.allclose(gaps - before[1], new * wanted)
        before = (choices, gaps)
    assert method.plasticity() == {"focus": float(before[0][:, 0].max() / 6)}


def test_one_adapter_lives_on_and_the_pull_holds_it() -> None:
    away = {}
    for strength in (0.0, 100.0):
        learner = cases.build_learner("bert", tree_lora(strength=strength), epochs=6)
        made = cases.experiences("bert", 2)
        learner.learn(made[0])
        method = method_of(learner)
        before = {name: a.detach().clone() for name, a in method._downs().items()}
        parameters = {id(p) for _, p in method.parameter_groups()[0]["params"]}
        learner.learn(made[1])
        assert {id(p) for _, p in method.parameter_groups()[0]["params"]} == parameters
        assert {(b.bank.frozen_size, b.bank.new_size) for b in method.branches.values()} == {(0, 2)}
        away[strength] = sum(float((a.detach() - before[name]).abs().sum()) for name, a in method._downs().items())
    assert away[0.0] > 0 and away[100.0] < 0.7 * away[0.0]


def test_an_experience_that_comes_again_is_found() -> None:
    learner = cases.build_learner("bert", tree_lora(exploration=0.02), epochs=8)
    made, choices = cases.experiences("bert", 2), []

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.experience == 2:
            choices.append(method_of(loop).tensors["choices"][:, 0].tolist())

    for experience in (*made, made[0]):
        learner.learn(experience, on_step=on_step)
    again, other = choices[-1]
    assert again + other == 24 and again > other


# ---- the released form
def test_the_released_form_keeps_means_of_a_and_draws_a_task_for_each_map() -> None:
    learner = cases.build_learner("bert", tree_lora(form="released", strength=0.8), logging_steps=1)
    noted = noted_steps(learner, cases.experiences("bert"))
    tensors = method_of(learner).tensors
    assert {name.partition("/")[0] for name in tensors} == {"signature"}
    for number in range(3):
        mine = [step for step in noted if step["experience"] == number]
        for name in mine[0]["A"]:
            mean = torch.stack([step["A"][name].flatten() for step in mine]).mean(0)
            assert torch.allclose(tensors[f"signature/{name}"][number], mean, atol=1e-6)
        for s, step in enumerate(mine):
            share = step["losses"].get("tree_lora.align")
            assert (share is None) == (number == 0)
            if share is not None:
                assert share == pytest.approx(-0.8 * s / 6 * step["losses"]["loss"], rel=1e-4, abs=1e-7)
    assert any(len(set(step["chosen"])) > 1 for step in noted if step["experience"] == 2)


def test_the_released_draw_alone_uses_the_random_stream() -> None:
    used = {}
    for form in ("paper", "released"):
        learner = build(tree_lora(form=form))
        made = cases.experiences("bert")
        learner.learn(made[0])
        states = [learner.generator.get_state()]
        for experience in made[1:]:
            learner.learn(experience)
            states.append(learner.generator.get_state())
        used[form] = not all(torch.equal(states[0], state) for state in states)
    assert used == {"paper": False, "released": True}


# ---- settings and state
@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_loaded_state_rebuilds_the_tree(form: str) -> None:
    learner = cases.build_learner("bert", tree_lora(form=form))
    made = cases.experiences("bert", 4)
    for experience in made[:3]:
        learner.learn(experience)
    fresh = cases.build_learner("bert", tree_lora(form=form))
    other = cases.experiences("bert", 2)
    fresh.learn(other[0])
    fresh.learn(other[1])
    assert len(method_of(fresh)._root().tasks) == 2
    fresh.load_state_dict(*learner.state_dict())
    learnt = method_of(learner)
    learnt._tree = None
    assert method_of(fresh)._root() == learnt._root() and len(learnt._root().tasks) == 3


def test_it_stands_beside_a_penalty_on_what_lives_on() -> None:
    learner = cases.build_learner("bert", [tree_lora(), {"l2_anchor": {"strength": 0.1}}])
    for experience in cases.experiences("bert", 2):
        learner.learn(experience)
    assert learner.methods[1].plasticity()["held_share"] > 0.3


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="exploration is of the form paper; remove it"):
        cases.build_learner("bert", tree_lora(form="released", exploration=1.0))
    with pytest.raises(BadInput, match=r"method\.tree_lora\.strength"):
        cases.build_learner("bert", tree_lora(strength=-1.0))
    with pytest.raises(Exception, match=r"protocol\.boundaries: is none, but tree_lora needs them"):
        build(tree_lora(), protocol={"boundaries": "none"})
    learner = build(tree_lora(), epochs=1)
    learner.learn(cases.experiences("bert", 1)[0])
    with pytest.raises(BadInput, match="tree_lora can only be rolled back"):
        learner.forget(0)
