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
from perdure.memory import AtomBank, dispatch
from perdure.memory.parts import Share, as_held

Change = Callable[[AtomBank], object]
CHANGES: dict[str, Change] = {
    "grow": lambda bank: bank.grow(3, owner=bank.size, generator=torch.Generator().manual_seed(7)),
    "learn": lambda bank: bank.new_values.data.copy_(torch.linspace(-1, 2, bank.new_values.numel()).view(-1, 5)),
    "freeze": lambda bank: bank.freeze(0.5),
    "drop": lambda bank: bank.drop(1),
    "keep": lambda bank: bank.keep(torch.arange(bank.size) % 3 != 0),
    "use": lambda bank: bank.add_usage(torch.arange(bank.size, dtype=torch.float64)),
    "prune": lambda bank: bank.prune(usage_below=2.0),
    "limit": lambda bank: bank.limit(4, recent=2),
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

    def all_gather(into: torch.Tensor, own: torch.Tensor) -> None:
        for rows, pair in zip(into.chunk(len(banks)), parts, strict=True):
            part = next(each for each in pair if each.shape[1] == own.shape[1])  # keys are 6 wide, values 5
            assert len(part) <= len(own)
            rows.zero_()[: len(part)] = part

    with mock.patch("perdure.memory.parts._gather", all_gather):
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


def gathering(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """A group of one process; what it was asked for."""
    asked: list[torch.Size] = []

    def all_gather(into: torch.Tensor, own: torch.Tensor) -> None:
        asked.append(own.shape)
        into.copy_(own)

    monkeypatch.setattr("perdure.memory.parts._gather", all_gather)
    return asked


def make_layer(rows: int, **settings: object) -> LinearMemory:
    torch.manual_seed(0)
    layer = LinearMemory(384, 5, k=3, delta=0.01, dtype=torch.float64, **settings)  # type: ignore[arg-type]
    layer.bank.frozen_keys = torch.randn(rows, 384, dtype=torch.float64) * 384**-0.5  # as large as new ones
    layer.bank.frozen_values = torch.randn(rows, 5, dtype=torch.float64)
    layer.bank.owners, layer.bank.usage = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
    layer.bank.grow(2, owner=1, generator=torch.Generator().manual_seed(0))
    layer.bank.new_values.data.normal_()
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("search", ["exact", "coarse"])
def test_a_layer_answers_as_with_a_whole_bank(monkeypatch, training: bool, search: str) -> None:
    monkeypatch.setattr(dispatch, "quick_codes", lambda device: True)
    gathered = gathering(monkeypatch)
    layer = make_layer(1400 if search == "coarse" else 9, search=search, dropout=0.2, reserve=1).train(training)
    split = copy.deepcopy(layer)
    split.split(0, 1)
    x = torch.randn(7, 384, dtype=torch.float64)
    results = []
    for each in (layer, split):
        torch.manual_seed(3)  # of the dropout, which is drawn again in the backward pass
        given_x = x.clone().requires_grad_()
        said = each(given_x)
        before = len(gathered)
        said.square().sum().backward()
        results.append((said, given_x.grad, each.bank.new_keys.grad, each.bank.new_values.grad))
    assert before == 2 and len(gathered) == 4, "keys and values once in each pass"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(each.abs().max() > 0 for each in results[1][: 4 if training else 2])
    index = split._indexed
    with torch.no_grad():
        split.eval(), layer.eval()
        assert torch.equal(split(x), layer(x))
    assert split._indexed is index and (index is not None) == (search == "coarse"), "made once per growth"


@pytest.mark.parametrize("path", ["reference", "dense", "gather"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_autograd_keeps_no_atoms_between_the_passes(monkeypatch, path: str, dtype: torch.dtype) -> None:
    gathering(monkeypatch)
    kept: list[int] = []
    sizes = {}

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    for split in (False, True):
        layer = make_layer(90, path=path).to(dtype)
        layer.bank.frozen_values[0] = 0  # an empty one: an evaluated view is a copy then
        layer.eval()
        if split:
            layer.split(0, 1)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda saved: saved):
            layer(torch.randn(7, 384, dtype=torch.float64, requires_grad=True))
        sizes[split] = sum(kept)
    # What is saved inside is seen where nothing hides it, and hidden where it is computed again.
    assert sizes[False] > 80 * 384 * 4 and sizes[True] < 8 * 384 * 8, sizes


def test_an_index_made_in_inference_serves_training() -> None:
    layer = make_layer(400)
    with torch.inference_mode():
        layer.eval()(torch.randn(7, 384, dtype=torch.float64))
    assert layer._indexed is not None
    layer.train()(torch.randn(500, 384, dtype=torch.float64, requires_grad=True)).sum().backward()


def test_a_merge_is_measured_on_what_was_merged(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "quick_codes", lambda device: True)
    gathering(monkeypatch)
    found = []
    x = torch.randn(6, 384, dtype=torch.float64)
    for split in (False, True):
        layer = make_layer(2800, search="coarse").eval()  # enough to be searched coarsely after the merge too
        layer.bank.frozen_keys[2100:] = layer.bank.frozen_keys[:700] * 1.5
        if split:
            layer.split(0, 1)
        with torch.no_grad():
            layer(x)  # makes the index
            read = layer.read
            found.append(layer.bank.merge(0.99, across_owners=True, read=lambda view, read=read: read(view, x, None)))
    assert found[0][:2] == found[1][:2] and found[0].removed == 700
    assert found[0].measured == pytest.approx(found[1].measured, rel=1e-9) and found[0].measured > 0


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
    layer = LinearMemory(4, 3)
    layer.split(1, 2)
    assert layer.bank.view().frozen_keys.shape == (0, 4) and layer.bank.frozen_size == 0  # no process group is there
    assert layer(torch.ones(2, 4)).shape == (2, 3)


def test_the_last_processes_keep_fewer_rows_or_none() -> None:
    assert Share(2, 3).part(torch.arange(5)).tolist() == [4] and Share(2, 3).part(torch.arange(4)).tolist() == []


def test_what_a_process_holds_is_put_back_without_the_others() -> None:
    banks = split_into(3)
    with as_held():
        states = [copy.deepcopy(bank.state_dict()) for bank in banks]  # no process group is there
    expected = [(bank.frozen_keys, bank.frozen_size, bank.size) for bank in banks]
    for change in ("grow", "learn", "freeze", "drop"):
        as_one_of(banks, CHANGES[change])
    for bank, state, (part, old, size) in zip(banks, states, expected, strict=True):
        with as_held():
            bank.load_state_dict(state)
        assert torch.equal(bank.frozen_keys, part) and (bank.frozen_size, bank.size) == (old, size)
    whole = as_one_of(banks, lambda bank: bank.keys())
    assert torch.equal(whole[0], make_bank().keys())


def test_a_bank_that_is_read_does_not_change(monkeypatch) -> None:
    gathering(monkeypatch)
    bank = make_bank()
    bank.split(0, 1)
    with bank.whole(changes=False), pytest.raises(RuntimeError, match="being read"):
        bank.grow(2, owner=5)
    assert bank.frozen_size == make_bank().frozen_size and len(bank.owners) == bank.size
