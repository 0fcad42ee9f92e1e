"""A bank whose old atoms are split over processes does what a whole one does; the processes are simulated here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.layers import LinearMemory
from perdure.memory import AtomBank
from perdure.memory.parts import Share, refetched

Change = Callable[[AtomBank], object]
CHANGES: dict[str, Change] = {
    "grow": lambda bank: bank.grow(3, owner=int(bank.owners.max()) + 1, generator=torch.Generator().manual_seed(7)),
    "learn": lambda bank: bank.new_values.data.copy_(torch.linspace(-1, 2, bank.new_values.numel()).view(-1, 5)),
    "freeze": lambda bank: bank.freeze(0.5),
    "drop": lambda bank: bank.drop(1),
    "keep": lambda bank: bank.keep(torch.arange(bank.size) % 3 != 0),
    "use": lambda bank: bank.add_usage(torch.arange(bank.size, dtype=torch.float64)),
    "prune": lambda bank: bank.prune(usage_below=2.0),
    "merge": lambda bank: bank.merge(0.5, across_owners=True)[:2],
    "own": lambda bank: bank.own_new(9),
    "reload": lambda bank: bank.load_state_dict(copy.deepcopy(bank.state_dict())),
    "cast": lambda bank: bank.to(torch.float32).to(torch.float64),
}


def make_bank() -> AtomBank:
    bank = AtomBank(6, 5, dtype=torch.float64)
    for owner in range(3):
        bank.grow(2, owner=owner, generator=torch.Generator().manual_seed(owner))
        CHANGES["learn"](bank)
    bank.freeze()
    return bank


def as_one_of(banks: list[AtomBank], do: Change) -> list[object]:
    """What `do` returns in each of the processes that hold these banks; all see the parts of before."""
    parts = [(bank.frozen_keys, bank.frozen_values) for bank in banks]

    def all_gather(into: list[torch.Tensor], own: torch.Tensor) -> None:
        for rows, pair in zip(into, parts, strict=True):
            part = next(each for each in pair if each.shape[1] == own.shape[1])  # keys are 6 wide, values 5
            assert len(part) <= len(own)
            rows.zero_()[: len(part)] = part

    with mock.patch("torch.distributed.all_gather", all_gather):
        return [do(bank) for bank in banks]


def split_into(processes: int) -> list[AtomBank]:
    banks = [make_bank() for _ in range(processes)]
    for rank, bank in enumerate(banks):
        bank.split(rank, processes)
    return banks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.sampled_from(sorted(CHANGES)), max_size=8))
def test_every_change_is_that_of_a_whole_bank(processes: int, names: list[str]) -> None:
    whole, banks = make_bank(), split_into(processes)
    for name in ["grow", "learn", *names]:
        expected = CHANGES[name](whole)
        for found in as_one_of(banks, CHANGES[name]):
            if name in ("drop", "keep", "prune", "merge"):
                assert found == expected
        height = -(-whole.frozen_size // processes)
        assert all(len(bank.frozen_keys) == len(bank.frozen_values) <= height for bank in banks)
        assert torch.equal(torch.cat([bank.frozen_keys for bank in banks]), whole.frozen_keys)
        assert torch.equal(torch.cat([bank.frozen_values for bank in banks]), whole.frozen_values)
        for bank, state in zip(banks, as_one_of(banks, AtomBank.state_dict), strict=True):
            assert (bank.frozen_size, bank.size) == (whole.frozen_size, whole.size)
            assert all(torch.equal(state[key], tensor) for key, tensor in whole.state_dict().items())  # type: ignore


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("search", ["exact", "coarse"])
def test_a_layer_answers_as_with_a_whole_bank_and_keeps_only_its_part(training: bool, search: str) -> None:
    torch.manual_seed(0)
    rows = 1400 if search == "coarse" else 9
    layer = LinearMemory(384, 5, k=3, delta=0.01, search=search, dtype=torch.float64).train(training)  # type: ignore
    layer.bank.frozen_keys = torch.randn(rows, 384, dtype=torch.float64)
    layer.bank.frozen_values = torch.randn(rows, 5, dtype=torch.float64)
    layer.bank.owners, layer.bank.usage = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
    layer.bank.grow(2, owner=1, generator=torch.Generator().manual_seed(0))
    layer.bank.new_values.data.normal_()
    split = copy.deepcopy(layer)
    split.bank.split(0, 1)
    gathered = []

    def all_gather(into: list[torch.Tensor], own: torch.Tensor) -> None:
        gathered.append(own.shape)
        into[0].copy_(own)

    x = torch.randn(7, 384, dtype=torch.float64)
    results = []
    with mock.patch("torch.distributed.all_gather", all_gather):
        for each in (layer, split):
            given_x = x.clone().requires_grad_()
            said = each(given_x)
            before = len(gathered)
            said.square().sum().backward()
            results.append((said, given_x.grad, each.bank.new_keys.grad, each.bank.new_values.grad))
        assert before == 2 and len(gathered) >= 4, "keys and values once in each pass"
        index = split._indexed
        with torch.no_grad():
            assert torch.equal(split(x), layer(x))
        assert split._indexed is index, "made once per growth"
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert split._kept is None and (index is not None) == (search == "coarse")


def test_a_failed_change_changes_nothing() -> None:
    banks = split_into(2)
    before = [bank.frozen_keys for bank in banks]
    for bad in (lambda bank: bank.grow(0, owner=1), lambda bank: bank.keep(torch.ones(3, dtype=torch.bool))):
        with pytest.raises(ValueError, match=r"^(r|mask): found"):
            as_one_of(banks, bad)
    assert all(torch.equal(bank.frozen_keys, old) for bank, old in zip(banks, before, strict=True))
    with pytest.raises(ValueError, match="split already"):
        banks[0].split(0, 2)


def test_an_empty_bank_waits_for_nobody() -> None:
    bank = AtomBank(4, 3)
    bank.split(1, 2)
    assert bank.view().frozen_keys.shape == (0, 4) and bank.frozen_size == 0  # no process group is there
    assert LinearMemory(4, 3)(torch.ones(2, 4)).abs().sum() == 0


def test_what_is_not_fetched_is_kept_as_it_is() -> None:
    a, b = torch.ones(3, requires_grad=True), torch.ones(3)
    with refetched({b: lambda: torch.full((3,), 5.0)}):
        y = (a * b).sum() + (a * a).sum()
    assert torch.equal(torch.autograd.grad(y, a)[0], torch.full((3,), 7.0))
    assert Share(2, 3).part(torch.arange(5)).tolist() == [4] and Share(2, 3).part(torch.arange(4)).tolist() == []
