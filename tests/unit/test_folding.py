from __future__ import annotations

import pytest
import torch

from perdure.memory import fold, read_atoms
from perdure.memory.folding import EVERY


def test_a_linear_memory_is_folded_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    found = fold(x, x @ delta.t(), ridge=1e-12)
    torch.testing.assert_close(found.delta, delta, rtol=1e-8, atol=1e-8)
    assert found.fitted < 1e-9 and found.held_out < 1e-9


def test_the_map_is_the_ridge_solution_on_the_rows_that_are_not_held_out() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(23, 4, generator=generator).double(), torch.randn(23, 3, generator=generator).double()
    found = fold(x, y, ridge=0.5)
    kept = [row for row in range(23) if row % EVERY != EVERY - 1]
    a, b = x[kept], y[kept]
    weight = 0.5 * (a.square().sum() / 4)
    augmented = torch.cat([a, weight.sqrt() * torch.eye(4).double()]), torch.cat([b, torch.zeros(4, 3).double()])
    expected = torch.linalg.lstsq(*augmented).solution.t()
    torch.testing.assert_close(found.delta, expected, rtol=1e-9, atol=1e-9)
    held = [row for row in range(23) if row % EVERY == EVERY - 1]
    loss = (y[held] - x[held] @ expected.t()).norm() / y[held].norm()
    assert found.held_out == pytest.approx(float(loss), rel=1e-9)


def test_what_routing_says_beyond_a_linear_map_is_the_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 40, 6, generator=generator).double()
    x = torch.randn(400, 6, generator=generator).double()
    none = keys[:0], values[:0]
    routed, _ = read_atoms(x, keys, values, *none, k=2, tau=0.03)
    all_alike, _ = read_atoms(x, keys, values, *none, k=40, tau=1e6)  # a mean over all atoms: linear in x
    assert fold(x, all_alike, ridge=1e-9).held_out < 1e-3
    assert fold(x, routed, ridge=1e-9).held_out > 0.3


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="found 3 rows for 2 inputs"):
        fold(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="ridge: found 0"):
        fold(torch.zeros(2, 4), torch.zeros(2, 4), ridge=0)
    assert fold(torch.zeros(2, 4), torch.zeros(2, 3)).delta.shape == (3, 4)


def test_nan_does_not_pass_for_a_small_loss() -> None:
    x, y = torch.randn(20, 3), torch.randn(20, 3)
    y[4] = float("nan")
    assert not fold(x, y).held_out < 1
