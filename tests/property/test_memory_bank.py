"""Invariants of the atom bank: owners, growth, freezing, removal, merging, state."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.memory import SHARED, AtomBank, read_atoms
from perdure.memory.merging import fair_shares

quick = settings(max_examples=60, deadline=None)


def filled(bank: AtomBank, seed: int) -> AtomBank:
    with torch.no_grad():
        bank.new_values.normal_(generator=torch.Generator().manual_seed(seed))
    return bank


def read(bank: AtomBank, x: torch.Tensor, **options) -> torch.Tensor:
    return read_atoms(x, *bank.view()[:4], **{"k": 3, "tau": 0.1, **options})[0].detach()


def make_bank(sizes: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> AtomBank:
    bank = AtomBank(6, 5, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for owner, size in enumerate(sizes):
        bank.grow(size, owner=owner, generator=generator)
        filled(bank, seed + owner)
    return bank


def check_bank(bank: AtomBank) -> None:
    n = bank.frozen_size + bank.new_size
    assert bank.size == n == bank.owners.numel() == bank.usage.numel() == len(bank.keys()) == len(bank.values())
    assert bank.frozen_values.shape == (bank.frozen_size, 5) and bank.new_values.shape == (bank.new_size, 5)
    assert bank.usage.dtype == torch.float64 and bank.owners.dtype == torch.int64
    assert not bank.frozen_keys.requires_grad and not bank.frozen_values.requires_grad
    assert [name for name, _ in bank.named_parameters()] == ["new_keys", "new_values"]


@quick
@given(
    sizes=st.lists(st.integers(1, 4), max_size=5),
    drops=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 99),
)
def test_owners_follow_their_items_through_growth_freezing_and_removal(sizes, drops, seed):
    bank = make_bank(sizes, seed)
    check_bank(bank)
    by_owner = {owner: bank.values()[bank.owners == owner].clone() for owner in range(len(sizes))}
    for owner in drops:
        count = bank.drop(owner)
        assert count == len(by_owner.pop(owner, ()))
        check_bank(bank)
    assert bank.size == sum(len(rows) for rows in by_owner.values())
    for owner, rows in by_owner.items():
        assert torch.equal(bank.values()[bank.owners == owner], rows)


@quick
@given(
    sizes=st.lists(st.integers(1, 4), max_size=5), other=st.lists(st.integers(1, 4), max_size=5), frozen=st.booleans()
)
def test_state_round_trip_when_sizes_differ(sizes, other, frozen):
    bank, target = make_bank(sizes, 1), make_bank(other, 2)
    if frozen:
        bank.freeze()
    bank.add_usage(torch.arange(bank.size, dtype=torch.float64))
    root, empty = torch.nn.ModuleDict({"bank": bank}), torch.nn.ModuleDict({"bank": target})
    empty.load_state_dict(copy.deepcopy(root.state_dict()))
    check_bank(target)
    assert target.frozen_size == bank.frozen_size
    for name, tensor in bank.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(read(bank, x), read(target, x))


def test_loading_the_same_sizes_keeps_the_parameter_objects():
    bank, target = make_bank([2, 3], 1), make_bank([2, 3], 2)
    held = target.new_keys
    target.load_state_dict(bank.state_dict())
    assert target.new_keys is held and torch.equal(held, bank.new_keys)


def test_a_damaged_or_foreign_state_is_refused():
    bank = make_bank([2, 3])
    state = bank.state_dict()
    with pytest.raises(RuntimeError, match="damaged"):
        make_bank([2]).load_state_dict({**state, "owners": state["owners"][:-1]})
    with pytest.raises(RuntimeError, match="in_features"):
        AtomBank(7, 5).load_state_dict(state)
    with pytest.raises(RuntimeError, match="usage"):
        make_bank([2]).load_state_dict({k: v for k, v in state.items() if k != "usage"})


def test_growth_is_seeded_bounded_and_silent():
    one, two = make_bank([4], 3, torch.float32), make_bank([4], 3, torch.float64)
    assert torch.equal(one.new_keys.double(), two.new_keys)
    assert one.new_keys.abs().max() <= 6**-0.5 and one.new_keys.abs().max() > 0.5 * 6**-0.5
    bank = AtomBank(6, 5)
    bank.grow(4, owner=0)
    assert bank.new_values.abs().max() == 0 and bank.new_keys.requires_grad
    assert read(bank, torch.randn(3, 6)).abs().max() == 0
    held = filled(bank, 0).new_keys
    bank.grow(2, owner=1)
    assert bank.new_keys is not held and bank.frozen_size == 4 and torch.equal(bank.frozen_keys, held)
    for r, owner in ((0, 0), (1, -1)):
        with pytest.raises(ValueError):
            bank.grow(r, owner=owner)
    check_bank(bank)


@quick
@given(scale=st.sampled_from([0.5, 1.0, 2.0, 4.0]), seed=st.integers(0, 999))
def test_freezing_folds_the_scale_so_that_the_output_stays(scale, seed):
    bank = make_bank([3, 4], seed)
    x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = read(bank, x, scale=scale)
    bank.freeze(scale)
    assert bank.new_size == 0 and bank.owners.tolist() == [0] * 3 + [1] * 4
    assert torch.allclose(read(bank, x, scale=scale), before, rtol=1e-12, atol=1e-12)
    check_bank(bank)


@quick
@given(
    dead=st.lists(st.booleans(), min_size=1, max_size=6), scale=st.sampled_from([0.5, 2.0]), grows=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_atoms_that_were_never_trained_do_not_freeze(dead, scale, grows, seed):
    bank, x = make_bank([3, len(dead)], seed), torch.randn(9, 6, dtype=torch.float64)
    bank.add_usage(torch.arange(bank.size, dtype=torch.float64) + 1)
    with torch.no_grad():
        bank.new_values[torch.tensor(dead)] = 0
    before = read_atoms(x, *bank.without_empty()[:4], k=3, tau=0.1, scale=scale)[0].detach()
    stays = torch.tensor([True] * 3 + [not one for one in dead])
    keys, usage, owners = bank.keys()[stays].detach(), bank.usage[stays], bank.owners[stays]
    if grows:
        bank.grow(2, owner=7, scale=scale)
        assert bank.owners[-2:].tolist() == [7, 7] and bank.usage[-2:].tolist() == [0, 0]
        bank.keep(torch.arange(bank.size) < bank.frozen_size)
    else:
        kept = bank.freeze(scale)
        assert torch.equal(kept, stays) if any(dead) else kept is None
    assert bank.new_size == 0 and torch.equal(bank.frozen_keys, keys)
    assert torch.equal(bank.usage, usage) and torch.equal(bank.owners, owners)
    assert torch.allclose(read(bank, x), before, rtol=1e-12, atol=1e-12)
    assert bank.freeze(scale) is None
    check_bank(bank)


def test_new_items_change_their_owner():
    bank = make_bank([2, 3])
    bank.own_new(SHARED)
    assert bank.owners.tolist() == [0, 0, *[SHARED] * 3] and bank.drop(1) == 0
    check_bank(bank)


def test_frozen_rows_stay_byte_identical_while_new_ones_train():
    bank = make_bank([3, 4])
    keys, values, new = bank.frozen_keys.clone(), bank.frozen_values.clone(), bank.new_values.detach().clone()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        read_atoms(x, *bank.view()[:4], k=3, tau=0.1)[0].square().sum().backward()
        optimizer.step()
    assert torch.equal(bank.frozen_keys, keys) and torch.equal(bank.frozen_values, values)
    assert not torch.equal(bank.new_values, new)


def test_a_deep_copy_is_independent():
    bank = make_bank([2, 2])
    twin = copy.deepcopy(bank)
    twin.grow(1, owner=5)
    assert bank.size == 4 and twin.size == 5


@quick
@given(sizes=st.lists(st.integers(1, 4), max_size=4), trained=st.booleans(), hole=st.booleans())
def test_inference_leaves_out_atoms_that_were_never_trained(sizes, trained, hole):
    bank = make_bank(sizes)
    if not trained and bank.new_size:
        with torch.no_grad():
            bank.new_values.zero_()
    if hole and bank.frozen_size:
        bank.frozen_values[0] = 0
    view = bank.without_empty()
    keep = (bank.values() != 0).any(-1)
    assert torch.equal(torch.cat([view.frozen_values, view.new_values]), bank.values()[keep])
    assert torch.equal(torch.cat([view.frozen_keys, view.new_keys]), bank.keys()[keep])
    if view.index is None:
        assert bool(keep.all()) and view.frozen_keys is bank.frozen_keys
    else:
        assert torch.equal(view.index, keep.nonzero().flatten())
        bank.add_usage(torch.ones(len(view.index), dtype=torch.float64), view.index)
        assert torch.equal(bank.usage, keep.double())


def test_empty_atoms_dilute_and_the_view_undoes_it():
    bank = make_bank([4])
    x = torch.randn(9, 6, dtype=torch.float64)
    before = read(bank, x)
    bank.grow(4, owner=1)
    assert (read(bank, x) - before).abs().max() > 1e-6
    assert torch.equal(read_atoms(x, *bank.without_empty()[:4], k=3, tau=0.1)[0], before)


def test_keep_and_prune():
    bank = make_bank([3, 2])
    new_keys = bank.new_keys
    bank.add_usage(torch.tensor([5.0, 0, 9, 0, 0], dtype=torch.float64))
    with pytest.raises(ValueError, match="mask"):
        bank.keep(torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="counts"):
        bank.add_usage(torch.ones(4))
    values = bank.values().detach().clone()
    assert bank.prune(usage_below=1) == 1  # new items are never pruned
    assert torch.equal(bank.values(), values[[0, 2, 3, 4]]) and bank.usage.tolist() == [5, 9, 0, 0]
    assert bank.new_keys is new_keys
    bank.frozen_values[0] = 0
    assert bank.prune(strength_below=1e-9) == 1 and bank.frozen_size == 1
    assert bank.prune() == 0
    check_bank(bank)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 4)), max_size=14), st.integers(1, 16))
def test_shares_are_those_of_taking_turns(items, size):
    left = {owner: [] for owner in sorted({owner for owner, _ in items})}
    for index, (owner, worth) in enumerate(items):
        left[owner].append((-worth, index))
    turn, kept = 0, []
    while len(kept) < min(size, len(items)):
        best = [sorted(each)[turn] for each in left.values() if len(each) > turn]
        kept += [index for _, index in sorted(best)][: size - len(kept)]
        turn += 1
    owners, worth = (
        (torch.tensor(each, dtype=torch.int64) for each in zip(*items, strict=True))
        if items
        else (torch.zeros(0, dtype=torch.int64),) * 2
    )
    have = fair_shares(worth.double(), owners, size)
    assert have.nonzero().flatten().tolist() == sorted(kept)


def test_a_limited_bank_keeps_the_most_used_of_every_write():
    bank = make_bank([3, 2, 2])
    bank.freeze()
    bank.grow(2, owner=7)
    bank.add_usage(torch.tensor([5.0, 1, 9, 2, 8, 3, 4, 0, 0], dtype=torch.float64))
    new_keys, keys, usage = bank.new_keys, bank.keys().detach().clone(), bank.usage.clone()
    assert bank.limit(7) is None and bank.frozen_size == 7
    assert bank.limit(4).tolist() == [True, False, True, False, True, False, True, True, True]  # 9, 8, 4 | 5
    assert torch.equal(bank.keys(), keys[[0, 2, 4, 6, 7, 8]]) and bank.new_keys is new_keys
    assert torch.equal(bank.usage, usage[[0, 2, 4, 6, 7, 8]]) and bank.owners.tolist() == [0, 0, 1, 2, 7, 7]
    with pytest.raises(ValueError, match="size: found 0"):
        bank.limit(0)
    bank.limit(2, usage=torch.tensor([1.0, 2, 3, 4, 0, 0]))
    assert torch.equal(bank.keys(), keys[[4, 6, 7, 8]])
    check_bank(bank)


@pytest.mark.parametrize("writes", [3, 9])
def test_what_was_just_learnt_has_a_place_in_a_limited_bank(writes):
    bank = AtomBank(6, 5, dtype=torch.float64)
    for write in range(writes):
        bank.grow(2, owner=write, generator=torch.Generator().manual_seed(write))
        filled(bank, write)
        bank.freeze()
        bank.add_usage(torch.full((bank.size,), 1.0, dtype=torch.float64))  # older ones have more of it
        bank.limit(4, recent=2)
        assert bank.owners[-1] == write and bank.size <= 4
    assert bank.owners.tolist() == ([0, 1, 2, 2] if writes == 3 else [0, 1, 8, 8])
    check_bank(bank)


def test_casting_a_model_keeps_counts_exact():
    bank = make_bank([3], dtype=torch.float32)
    bank.add_usage(torch.tensor([257.0, 2.0**40 + 1, 0.0], dtype=torch.float64))
    bank.to(torch.bfloat16)
    assert bank.new_keys.dtype == torch.bfloat16 and bank.usage.tolist() == [257, 2**40 + 1, 0]
    check_bank(bank)


@quick
@given(seed=st.integers(0, 10**6), copies=st.integers(1, 4))
def test_merging_exact_duplicates_has_no_residual_and_keeps_the_mean(seed, copies):
    bank = make_bank([3], seed)
    bank.freeze()
    keys, values = bank.frozen_keys.clone(), bank.frozen_values.clone()
    bank.frozen_keys = torch.cat([keys, keys[:1].repeat(copies, 1)])
    bank.frozen_values = torch.cat([values, values[:1].repeat(copies, 1)])
    bank.owners, bank.usage = torch.zeros(3 + copies, dtype=torch.int64), torch.ones(3 + copies, dtype=torch.float64)
    report = bank.merge(0.999999)
    assert report.removed == copies and report.residual < 1e-12 and report.measured is None
    assert torch.allclose(bank.frozen_keys, keys) and torch.allclose(bank.frozen_values, values)
    assert bank.usage.tolist() == [1.0 + copies, 1, 1]
    check_bank(bank)


@quick
@given(seed=st.integers(0, 10**6), noise=st.floats(0.0, 0.1))
def test_the_residual_of_a_merge_bounds_the_change_at_held_weights(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(6, generator=generator, dtype=torch.float64)
    keys = key + noise * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    values = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    bank = AtomBank(6, 5, dtype=torch.float64)
    bank.grow(3, owner=0)
    filled(bank, seed).freeze()
    bank.frozen_keys, bank.frozen_values = keys.clone(), values.clone()
    bank.usage = torch.tensor([0.0, 1, 5], dtype=torch.float64)
    share = (bank.usage + 1) / (bank.usage + 1).sum()
    report = bank.merge(0.3)
    if report.removed != 2:
        return  # the noise made the keys differ too much
    before = torch.einsum("i,id,io->do", share, keys, values)
    after = torch.outer(bank.frozen_keys[0], bank.frozen_values[0])
    assert report.residual == pytest.approx(float((before - after).norm()), abs=1e-12)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    change = (x @ (before - after)).norm(dim=-1)
    assert bool((change <= report.residual * x.norm(dim=-1) + 1e-12).all())


def test_merging_respects_owners_unless_told_and_measures_its_loss():
    def twins() -> AtomBank:
        bank = make_bank([3, 3], 4)
        bank.freeze()
        bank.frozen_keys[3:] = bank.frozen_keys[:3]
        return bank

    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bank = twins()
    assert bank.merge(0.999).removed == 0 and bank.owners.tolist() == [0, 0, 0, 1, 1, 1]
    before = read(bank, x)
    report = bank.merge(0.999, across_owners=True, read=lambda view: read_atoms(x, *view[:4], k=3, tau=0.1)[0])
    assert report.removed == 3 and bank.owners.tolist() == [SHARED] * 3
    assert report.measured == pytest.approx(float((read(bank, x) - before).norm() / before.norm()))
    assert report.measured is not None and report.measured > 0
    with pytest.raises(ValueError, match="cosine"):
        bank.merge(0.0)
    assert AtomBank(6, 5).merge().removed == 0
