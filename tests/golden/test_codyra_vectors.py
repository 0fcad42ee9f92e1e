"""Worked numbers for CoDyRA: the two threshold operators, the ramp, the gated layer with its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perdure.memory import reference
from perdure.memory.effects import gated_low_rank, low_rank_update
from perdure.memory.proximal import double_threshold, ramp, soft_threshold

KAPPA = 0.005
GATES = [-0.012, -0.004, 0.006, 0.0099, 0.01, 0.02, 0.0, 0.005, 1e-12]
SOFT = [-0.007, 0.0, 0.001, 0.0049, 0.005, 0.015, 0.0, 0.0, 0.0]
RELEASED = [-0.007, 0.0, 0.0, 0.0, 0.005, 0.015, 0.0, 0.0, 0.0]

KEYS = [[1.0, 0], [0, 2]]  # rows are a_i
VALUES = [[1.0, 1, 0], [0, 1, -1]]  # rows are b_i
G = [0.5, -2.0]
X = [3.0, 4.0]
DY = [1.5, -14.5, 16.0]
UPDATE = [[0.5, 0.0], [0.5, -4.0], [0.0, 4.0]]
GRAD_Y = [1.0, 2.0, 3.0]
GRADIENTS = {  # of GRAD_Y . dy
    "x": [1.5, 4.0],
    "keys": [[4.5, 6.0], [6.0, 8.0]],
    "values": [[1.5, 3.0, 4.5], [-16.0, -32.0, -48.0]],
    "gates": [9.0, -8.0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("operator", "expected"), [(soft_threshold, SOFT), (double_threshold, RELEASED)])
def test_operators(operator, expected, dtype):
    got = operator(torch.tensor(GATES, dtype=dtype), KAPPA)
    want = torch.tensor(expected, dtype=dtype)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-9)
    assert torch.equal(got == 0, want == 0), "zero is exactly zero: that is what decides which components stay"


@pytest.mark.parametrize("operator", [soft_threshold, double_threshold])
def test_without_a_threshold_nothing_moves(operator):
    gates = torch.tensor(GATES)
    assert torch.equal(operator(gates, 0.0), gates)


@given(st.floats(-2, 2), st.floats(1e-3, 1), st.floats(-3, 3))
def test_soft_threshold_minimises_the_proximal_objective(gate, kappa, other):
    def objective(z):
        return (z - gate) ** 2 / 2 + kappa * abs(z)

    found = soft_threshold(torch.tensor(gate, dtype=torch.float64), kappa).item()
    assert objective(found) <= objective(other) + 1e-12


@given(st.floats(-2, 2), st.floats(1e-3, 1))
def test_the_released_operator_gives_the_papers_value_or_zero(gate, kappa):
    each = torch.tensor(gate, dtype=torch.float64)
    soft, released = soft_threshold(each, kappa).item(), double_threshold(each, kappa).item()
    assert released == soft if abs(gate) - kappa >= kappa else released == 0


def test_the_ramp_of_the_released_schedule():
    steps = [ramp(step, 500, 0.5, KAPPA) for step in range(500)]
    assert steps[:251] == [0.0] * 251
    for step, stage in ((251, 1), (254, 1), (255, 2), (300, 11), (489, 48), (490, 49), (499, 49)):
        assert steps[step] == pytest.approx(stage * KAPPA / 49, rel=1e-12), step
    assert sum(steps) == pytest.approx(0.649898, abs=1e-6)
    assert sum(steps) == pytest.approx(KAPPA * 6369 / 49, rel=1e-12)


def test_the_ramp_of_short_and_extreme_trainings():
    assert [ramp(step, 6, 0.5, 49.0) for step in range(6)] == [0, 0, 0, 0, 17, 34]
    assert [ramp(step, 2, 0.5, 49.0) for step in range(2)] == [0, 0]
    assert [ramp(step, 4, 1.0, 49.0) for step in range(4)] == [0, 0, 0, 0]
    assert [ramp(step, 4, 0.0, 49.0) for step in range(4)] == [0, 13, 26, 38]


def test_without_gradients_the_first_draw_decides_what_the_released_numbers_keep():
    gates = torch.tensor([-0.70, 0.60, 0.66, 0.64, -2.0, 0.1], dtype=torch.float64)
    for step in range(500):
        gates = soft_threshold(gates, ramp(step, 500, 0.5, KAPPA))
    want = torch.tensor([-0.050102, 0.0, 0.010102, 0.0, -1.350102, 0.0], dtype=torch.float64)
    assert torch.allclose(gates, want, atol=1e-6) and torch.equal(gates == 0, want == 0)


# ---- the layer
def tensors(dtype):
    return [torch.tensor(each, dtype=dtype, requires_grad=True) for each in (X, KEYS, VALUES, G)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layer", [gated_low_rank, reference.gated_low_rank])
def test_values_and_gradients(layer, dtype):
    inputs = tensors(dtype)
    dy = layer(*inputs)
    assert torch.allclose(dy, torch.tensor(DY, dtype=dtype)) and dy.dtype == dtype
    got = torch.autograd.grad(dy, inputs, torch.tensor(GRAD_Y, dtype=dtype))
    for (name, want), have in zip(GRADIENTS.items(), got, strict=True):
        assert torch.allclose(have, torch.tensor(want, dtype=dtype)), name


def test_the_merged_update():
    _, keys, values, gates = (each.detach() for each in tensors(torch.float32))
    got = low_rank_update(keys, values * gates[:, None])
    assert got.dtype == torch.float64 and got.tolist() == UPDATE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fast_equals_reference(dtype):
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 7), (4, 7), (4, 5), (4,)]
    inputs = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    upstream = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64).to(dtype)
    fast, plain = gated_low_rank(*inputs), reference.gated_low_rank(*inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert torch.allclose(fast, plain, atol=tolerance)
    for have, want in zip(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        assert torch.allclose(have, want, atol=tolerance)


def test_a_narrow_input_is_widened_and_an_empty_set_says_nothing():
    x, keys, values, gates = (each.detach() for each in tensors(torch.float32))
    assert gated_low_rank(x.bfloat16(), keys, values, gates).dtype == torch.float32
    assert gated_low_rank(x.double(), keys, values, gates).dtype == torch.float64
    assert gated_low_rank(x, keys[:0], values[:0], gates[:0]).tolist() == [0.0, 0.0, 0.0]
