"""Worked numbers for the MoRAM layer (eqs 3-8), values and gradients, on every path."""

from __future__ import annotations

import pytest
import torch

from perdure.memory import read_atoms, self_activation
from perdure.memory.reference import rank_one

PATHS = ["auto", "reference", "dense", "gather"]
KEYS = [[1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0], [-1, 0, 0]]
VALUES = [[1.0, 0], [0, 1], [1, 1], [2, 0]]  # rows are b_i
X = [3.0, 4.0, 0.0]
TABLE = [  # k, tau, delta, weights per atom, dy
    (2, 0.1, 0.2, (0, 0.213847, 0.786153, 0), (3.930764, 4.786153)),
    (2, 0.1, 0.6, (0, 0, 0.786153, 0), (3.930764, 3.930764)),
    (4, 0.1, 0.0, (0.054971, 0.202087, 0.742919, 0.000022), (3.879377, 4.522946)),
    (2, 0.01, 0.2, (0, 2e-6, 0.999998, 0), (4.999989, 4.999998)),
]


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(X, dtype=dtype), torch.tensor(KEYS, dtype=dtype), torch.tensor(VALUES, dtype=dtype)


def read(x, keys, values, frozen, **settings):
    return read_atoms(x, keys[:frozen], values[:frozen], keys[frozen:], values[frozen:], **settings)


def by_formula(x, keys, values, k, tau, delta, grad_y):
    """dL/dx, dL/dA, dL/dB for L = grad_y . dy, written with explicit Jacobians."""
    p = keys @ x
    norm = p.norm()
    s = p / norm
    n = len(p)
    top = torch.argsort(s, descending=True, stable=True)[:k]
    w = torch.zeros_like(p)
    w[top] = torch.softmax(s[top] / tau, 0)
    kept = (s >= delta).to(p) if delta > 0 else torch.ones_like(p)
    eye = torch.eye(n, dtype=p.dtype)
    selected = torch.zeros_like(p)
    selected[top] = 1
    dw_ds = (w[:, None] * (eye - w[None, :])) / tau * selected[:, None] * selected[None, :]
    ds_dp = (eye - s[:, None] * s[None, :]) / norm
    dw_dp = kept[:, None] * (dw_ds @ ds_dp)  # [i, j]
    w = w * kept
    # d dy / d p_j = w_j b_j + sum_i p_i b_i dw_i/dp_j
    dy_dp = w[:, None] * values + dw_dp.t() @ (p[:, None] * values)  # [j, d_out]
    grad_p = dy_dp @ grad_y
    return grad_p @ keys, grad_p[:, None] * x[None, :], (w * p)[:, None] * grad_y[None, :]


def test_scores_of_the_worked_example():
    x, keys, _ = tensors()
    s, p = self_activation(x, keys)
    assert torch.allclose(p, torch.tensor([3.0, 4, 5, -3], dtype=p.dtype))
    expected = torch.tensor([0.390567, 0.520756, 0.650945, -0.390567], dtype=p.dtype)
    assert torch.allclose(s, expected, atol=5e-7, rtol=0)
    assert s.square().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", [0, 2, 4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("k", "tau", "delta", "weights", "dy"), TABLE)
def test_values(k, tau, delta, weights, dy, path, frozen, dtype):
    x, keys, values = tensors(dtype)
    got, routing = read(x, keys, values, frozen, k=k, tau=tau, delta=delta, path=path)
    full = torch.zeros(4, dtype=dtype).scatter(0, routing.indices, routing.weights)
    assert torch.allclose(full, torch.tensor(weights, dtype=dtype), atol=1e-6, rtol=0)
    assert torch.allclose(got, torch.tensor(dy, dtype=dtype), atol=3e-6, rtol=0)
    assert got.dtype == dtype and routing.size == 4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("k", "tau", "delta"), [row[:3] for row in TABLE])
def test_gradients_equal_the_closed_form(k, tau, delta, path):
    x, keys, values = tensors()
    x, new_keys, new_values = x.requires_grad_(), keys[1:].requires_grad_(), values[1:].requires_grad_()
    dy, _ = read_atoms(x, keys[:1], values[:1], new_keys, new_values, k=k, tau=tau, delta=delta, path=path)
    grad_y = torch.tensor([0.7, -1.3], dtype=torch.float64)
    got = torch.autograd.grad(dy, [x, new_keys, new_values], grad_y)
    with torch.no_grad():
        gx, ga, gb = by_formula(x, keys, values, k, tau, delta, grad_y)
    for name, have, want in zip("xAB", got, (gx, ga[1:], gb[1:]), strict=True):
        assert torch.allclose(have, want, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("k", "tau", "delta"), [row[:3] for row in TABLE])
def test_gradients_equal_finite_differences(k, tau, delta, path):
    x, keys, values = tensors()
    inputs = [t.clone().requires_grad_() for t in (x, keys[1:], values[1:])]

    def layer(x, new_keys, new_values):
        return read_atoms(x, keys[:1], values[:1], new_keys, new_values, k=k, tau=tau, delta=delta, path=path)[0]

    assert torch.autograd.gradcheck(layer, inputs, eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_an_unselected_key_learns_through_the_norm_and_an_unselected_value_does_not(path):
    x, keys, values = tensors()
    keys.requires_grad_()
    values.requires_grad_()
    dy, routing = read(x, keys, values, 0, k=2, tau=0.1, path=path)
    dy.sum().backward()
    assert sorted(routing.indices.tolist()) == [1, 2]
    assert keys.grad is not None and values.grad is not None
    assert keys.grad[0].abs().max() > 1e-3 and keys.grad[3].abs().max() > 1e-3
    assert values.grad[[0, 3]].abs().max() == 0 and values.grad[[1, 2]].abs().min() > 0


@pytest.mark.parametrize("path", PATHS)
def test_with_zero_values_the_first_step_moves_values_only(path):
    x, keys, _ = tensors()
    keys.requires_grad_()
    values = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    dy, _ = read(x, keys, values, 0, k=2, tau=0.1, path=path)
    assert dy.abs().max() == 0
    dy.sum().backward()
    assert keys.grad is not None and values.grad is not None
    assert keys.grad.abs().max() == 0 and values.grad.abs().max() > 0


@pytest.mark.parametrize("path", PATHS)
def test_scale_acts_on_new_values_alone(path):
    x, keys, values = tensors()
    got, _ = read(x, keys, values, 2, k=4, tau=0.1, scale=2.0, path=path)
    doubled = torch.cat([values[:2], values[2:] * 2])
    want, _ = rank_one(x, keys, doubled, k=4, tau=0.1)
    assert torch.allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_with_no_open_atom_adds_nothing_and_renormalising_needs_an_open_one(path):
    x, keys, values = tensors()
    off, routing = read(x, keys, values, 2, k=2, tau=0.1, delta=0.7, path=path)
    assert off.abs().max() == 0 and routing.weights.abs().max() == 0
    off, _ = read(x, keys, values, 2, k=2, tau=0.1, delta=0.7, renormalise=True, path=path)
    assert off.abs().max() == 0
    one, routing = read(x, keys, values, 2, k=2, tau=0.1, delta=0.6, renormalise=True, path=path)
    assert routing.weights.tolist() == [1.0, 0.0]
    assert torch.allclose(one, torch.tensor([5.0, 5.0], dtype=one.dtype))


@pytest.mark.parametrize("path", PATHS)
def test_the_released_floor_of_two_atoms_is_a_switch(path):
    x, keys, values = tensors()
    one, routing = read(x, keys, values, 1, k=1, tau=0.1, path=path)
    assert routing.indices.shape == (1,) and torch.allclose(one, torch.tensor([5.0, 5.0], dtype=one.dtype))
    two, routing = read(x, keys, values, 1, k=1, min_k=2, tau=0.1, path=path)
    assert routing.indices.tolist() == [2, 1]
    assert torch.allclose(two, torch.tensor(TABLE[0][4], dtype=two.dtype), atol=3e-6)


@pytest.mark.parametrize("path", PATHS)
def test_growing_by_empty_atoms_dilutes_the_scores(path):
    # Unlike LoRA, adding atoms that say nothing changes the output: through the norm, and through the top-k.
    x, keys, values = tensors()
    before, _ = read(x, keys, values, 4, k=2, tau=0.1, path=path)
    more_keys = torch.cat([keys, torch.tensor([[0.0, 0.3, 0.1]], dtype=keys.dtype)])
    more_values = torch.cat([values, torch.zeros(1, 2, dtype=values.dtype)])
    after, _ = read(x, more_keys, more_values, 4, k=2, tau=0.1, path=path)
    change = (after - before).abs().max()
    assert 0 < change < 0.1
