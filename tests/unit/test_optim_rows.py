"""Optimizers by rows: each row an optimizer of its own, a row that is not used unmoved to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from perdure.config import TrainingConfig
from perdure.optim import Optimization
from perdure.optim_rows import RowAdamW, RowSGD

STEPS = [[0, 2], [2], [0, 1, 2], [1], [], [0]]  # rows that get a gradient in each step; row 3 never does


def gradients(shape: tuple[int, ...], rows: list[int], step: int) -> torch.Tensor:
    full = torch.randn(*shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    made = torch.zeros(shape, dtype=torch.float64)
    made[rows] = full[rows]
    return made


def optimization(parameter: torch.nn.Parameter, optimizer: Any = "adamw", rows: bool = True) -> Optimization:
    training = TrainingConfig(optimizer=optimizer, weight_decay=0.1, adam_beta2=0.99)
    return Optimization(training, [{"params": [("p", parameter)], "lr": 0.05, "rows": rows}])


def start(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_each_row_is_an_optimizer_that_sees_its_own_steps_alone(shape: tuple[int, ...], optimizer: str) -> None:
    whole = start(*shape)
    apart = [torch.nn.Parameter(whole[row : row + 1].detach().clone()) for row in range(4)]
    mine = optimization(whole, optimizer)
    others = [optimization(row, optimizer, rows=False) for row in apart]
    assert [type(each) for each in mine.kinds.values()] == [RowAdamW if optimizer == "adamw" else RowSGD]
    for step, rows in enumerate(STEPS):
        before, whole.grad = whole.detach().clone(), gradients(shape, rows, step)
        mine.step(step, len(STEPS))
        for row in range(4):
            if row in rows:
                apart[row].grad = gradients(shape, rows, step)[row : row + 1]
                others[row].step(0, 1)
                assert not torch.equal(whole[row], before[row])
            else:
                assert torch.equal(whole[row], before[row])
    assert torch.allclose(whole, torch.cat(apart), rtol=1e-12)


def test_a_row_that_waits_keeps_its_moments() -> None:
    whole = start(4, 3)
    mine = optimization(whole)
    kept: dict[str, torch.Tensor] = {}
    for step, rows in enumerate([[0, 1], [1], [1]]):
        whole.grad = gradients((4, 3), rows, step)
        mine.step(step, 3)
        state = {key: value[0].clone() for key, value in mine.kinds["adamw"].state[whole].items()}
        kept = kept or state
    assert (kept["exp_avg"] != 0).all() and all(torch.equal(state[key], kept[key]) for key in kept)
    assert mine.kinds["adamw"].state[whole]["visits"].tolist() == [1, 3, 0, 0]


def test_negative_zeros_stay_negative() -> None:
    whole = torch.nn.Parameter(torch.tensor([[-0.0, 1.0], [1.0, 1.0]]))
    mine = optimization(whole)
    whole.grad = torch.tensor([[0.0, -0.0], [1.0, 1.0]])
    mine.step(0, 1)
    assert torch.signbit(whole[0, 0]) and whole[1, 0] != 1


def test_an_ordinary_adamw_does_move_what_is_not_used() -> None:
    """What the rows are for: momentum and decay, each by itself."""
    for decay, rows in ((0.1, [[1], [1]]), (0.0, [[0, 1], [1]])):
        whole = start(4, 3)
        plain = torch.optim.AdamW([whole], lr=0.05, weight_decay=decay)
        for step, used in enumerate(rows):
            before, whole.grad = whole.detach().clone(), gradients((4, 3), used, step)
            plain.step()
        assert not torch.equal(whole[0], before[0])


def test_groups_without_rows_are_torchs_own() -> None:
    one, two, alone = start(4, 3), start(5), start(5)
    training = TrainingConfig(weight_decay=0.1)
    groups = [{"params": [("one", one)], "lr": 0.1, "rows": True}, {"params": [("two", two)], "lr": 0.1}]
    both = Optimization(training, groups)
    plain = Optimization(training, [{"params": [("two", alone)], "lr": 0.1}])
    assert type(plain.kinds["adamw"]) is torch.optim.AdamW
    for step in range(3):
        one.grad = gradients((4, 3), [1], step)
        two.grad = alone.grad = gradients((5,), [0, 1, 2, 3, 4], step)
        both.step(step, 3)
        plain.step(step, 3)
    assert torch.equal(two, alone) and len(both.kinds["adamw"].param_groups) == 2


def test_state_goes_on_where_it_was() -> None:
    one, two = start(4, 3), start(4, 3)
    first = optimization(one)
    for step in range(2):
        one.grad = gradients((4, 3), STEPS[step], step)
        first.step(step, 4)
    tensors, values = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        two.copy_(one)
    second = optimization(two)
    second.load_state_dict(tensors, values)
    for step in (2, 3):
        one.grad = two.grad = gradients((4, 3), STEPS[step], step)
        first.step(step, 4)
        second.step(step, 4)
    assert torch.equal(one, two) and (one != start(4, 3)).any()
