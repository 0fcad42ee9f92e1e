"""Invariants of input moments and of the projection of keys onto their null space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.memory import AtomBank, InputMoments, free_directions, leading_basis, project, read_atoms

quick = settings(max_examples=60, deadline=None)


def make_bank(size: int) -> AtomBank:
    generator = torch.Generator().manual_seed(0)
    bank = AtomBank(6, 5, dtype=torch.float64)
    bank.grow(size, owner=0, generator=generator)
    with torch.no_grad():
        bank.new_values.normal_(generator=generator)
    return bank


def read(bank: AtomBank, x: torch.Tensor, **options) -> torch.Tensor:
    return read_atoms(x, *bank.view()[:4], **{"k": 3, "tau": 0.1, **options})[0].detach()


@quick
@given(seed=st.integers(0, 10**6), d=st.integers(2, 9), rank=st.integers(1, 9), energy=st.floats(0.05, 0.999))
def test_projected_keys_do_not_answer_the_protected_directions(seed, d, rank, energy):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, min(rank, d), generator=generator, dtype=torch.float64)
    x = x @ torch.randn(min(rank, d), d, generator=generator, dtype=torch.float64)
    moments = InputMoments(d)
    moments.add(x.reshape(4, 10, d))
    basis = moments.basis(energy)
    q = basis.shape[1]
    assert 1 <= q <= min(rank, d) and q <= d - 1 and free_directions(basis) == d - q
    assert torch.allclose(basis.t() @ basis, torch.eye(q, dtype=torch.float64), atol=1e-9)
    keys = torch.randn(5, d, generator=generator, dtype=torch.float64)
    once = project(keys, basis)
    assert (once @ basis).abs().max() < 1e-9
    assert torch.allclose(project(once, basis), once, atol=1e-9)
    assert bool((once.norm(dim=-1) <= keys.norm(dim=-1) + 1e-9).all())
    # The share of the inputs' energy that is taken out is at least the one asked for, if no direction was reserved.
    taken = (x @ basis).square().sum() / x.square().sum()
    if q < d - 1:
        assert float(taken) >= energy - 1e-9
        if q > 1:
            assert float((x @ basis[:, :-1]).square().sum() / x.square().sum()) < energy + 1e-9


def test_the_basis_is_deterministic_and_does_not_depend_on_the_order_of_batches():
    x = torch.randn(60, 5, dtype=torch.float64) * torch.tensor([5.0, 3, 2, 1, 0.1], dtype=torch.float64)
    one, two, three = InputMoments(5), InputMoments(5), InputMoments(5)
    one.add(x)
    for part in x.split(20)[::-1]:
        two.add(part)
    three.add(x[:10])
    rest = InputMoments(5)
    rest.add(x[10:])
    three.merge(rest)
    assert torch.equal(one.basis(0.8), one.basis(0.8))
    for other in (two, three):
        assert other.count == 60 and torch.allclose(other.moment, one.moment)
        assert torch.allclose(other.basis(0.8), one.basis(0.8), atol=1e-9)


def test_moments_mask_padding_and_check_shapes():
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    moments = InputMoments(4)
    moments.add(x, mask)
    kept = x[mask].double()
    assert moments.count == 3 and torch.allclose(moments.moment, kept.t() @ kept)
    with pytest.raises(ValueError, match="mask"):
        moments.add(x, mask[:, :2])
    with pytest.raises(ValueError, match="features"):
        moments.add(torch.randn(2, 5))
    with pytest.raises(ValueError, match="dtype"):
        InputMoments(4, dtype=torch.bfloat16)


def test_moments_in_float64_keep_what_float32_loses():
    exact, rough = InputMoments(2), InputMoments(2, dtype=torch.float32)
    big, small = torch.tensor([[1e4, 0.0]]), torch.tensor([[1e-1, 1.0]])
    for moments in (exact, rough):
        for part in (big, *[small] * 100):
            moments.add(part)
    assert float(exact.moment[0, 0]) == pytest.approx(1e8 + 1, rel=1e-12)
    assert float(rough.moment[0, 0]) == 1e8
    exact.to(torch.bfloat16)
    assert exact.moment.dtype == torch.float64


def test_nothing_is_protected_before_anything_was_seen():
    basis = InputMoments(4).basis(0.8)
    keys = torch.randn(2, 4)
    assert basis.shape == (4, 0) and torch.equal(project(keys, basis), keys)


def test_when_the_null_space_runs_out_the_least_used_directions_stay_free():
    flat = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))
    reserved = leading_basis(flat, 0.999)
    assert reserved.shape == (4, 3)
    keys = torch.ones(1, 4, dtype=torch.float64)
    assert torch.allclose(project(keys, reserved), torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64), atol=1e-12)
    assert leading_basis(flat, 0.999, reserve=2).shape == (4, 2)
    full = leading_basis(flat, 0.999, reserve=0)
    assert full.shape == (4, 4) and free_directions(full) == 0
    assert project(keys, full).abs().max() == 0
    # Items without a key of their own never answer and never learn.
    bank = AtomBank(4, 3, dtype=torch.float64)
    bank.grow(2, owner=0)
    with torch.no_grad():
        bank.new_keys.copy_(project(bank.new_keys, full))
    dy = read_atoms(torch.ones(1, 4, dtype=torch.float64), *bank.view()[:4], k=2, tau=0.1)[0]
    dy.sum().backward()
    assert dy.abs().max() == 0 and bank.new_values.grad is not None and bank.new_values.grad.abs().max() == 0


def test_protected_atoms_leave_old_inputs_untouched():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(50, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 6, generator=generator, dtype=torch.float64
    )
    moments = InputMoments(6)
    moments.add(old)
    bank = make_bank(4)
    with torch.no_grad():
        bank.new_keys.copy_(project(bank.new_keys, moments.basis(0.999999)))
    fresh = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    assert read(bank, old).abs().max() < 1e-8
    assert read(bank, fresh).abs().max() > 1e-2


def test_bad_values_of_protection_are_refused():
    with pytest.raises(ValueError, match="energy"):
        leading_basis(torch.eye(3), 1.0)
    with pytest.raises(ValueError, match="reserve"):
        leading_basis(torch.eye(3), 0.5, reserve=4)
    with pytest.raises(ValueError, match="finite"):
        leading_basis(torch.full((3, 3), float("nan")), 0.5)
    with pytest.raises(ValueError, match="basis"):
        project(torch.ones(1, 4), torch.eye(3))
