"""Worked numbers and laws of SETA-style sparse experts: effect and gradients on every path, gate, masks, split."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.layers import SequenceGate, SparseExperts
from perdure.layers.sparse_experts import Decision
from perdure.memory import SparseBank, Support, share_out, sparse_delta
from perdure.memory.kernels import sparse as kernel
from perdure.memory.reference import modulated_weight
from perdure.memory.routing import allocate, bernoulli_kl, gate_logits, pooled


def bank_of(dense: torch.Tensor, frozen: tuple[int, ...]) -> SparseBank:
    """A bank whose expert e has the non-zero entries of dense[e]; those in `frozen` are buffers."""
    experts, rows, columns = dense.shape
    bank = SparseBank(columns, rows)
    expert, i, j = dense.nonzero().T
    index = (i * columns + j).int()
    support = Support(index, expert.int(), dense[expert, i, j], torch.ones(len(index), dtype=dense.dtype))
    shuffled = torch.randperm(len(index))
    bank.set(Support(*(part[shuffled] for part in support)), [e for e in range(experts) if e not in frozen])
    return bank


def random_deltas(experts: int, rows: int, columns: int, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(experts, rows, columns, generator=generator, dtype=torch.float64)
    return values * (torch.rand(values.shape, generator=generator) < share)


# ---- the effect
def test_worked_example():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    gates = torch.tensor([[0.5, 1.0], [1.0, 0.0]], dtype=torch.float64)
    masks = torch.tensor([[[1, 0], [0, 0], [0, 1]], [[0, 0], [1, 0], [0, 0]]])
    deltas = torch.tensor([[[2.0, 9], [9, 9], [9, -1]], [[9, 9], [4, 9], [9, 9]]], dtype=torch.float64)
    # token 0: .5 * 2 * 1, 1 * 4 * 1, .5 * -1 * 2; token 1: 2 * 3, closed, -1 * -1
    expected = torch.tensor([[1.0, 4.0, -1.0], [6.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(modulated_weight(x, gates, masks, deltas), expected)
    bank = bank_of(masks * deltas, frozen=(0,))
    for path in ("auto", "sparse", "reference"):
        found = sparse_delta(x, gates, bank.frozen_values, bank.new_values, *bank.entries(), 3, path)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(("share", "chunk"), [(0.004, 1 << 22), (0.004, 40), (0.2, 1 << 22)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fast_path_equals_the_reference(share, chunk, dtype, sampled, monkeypatch):
    monkeypatch.setattr(kernel, "_AT_ONCE", chunk)
    monkeypatch.setattr(kernel, "SAMPLED_ON", ("cpu",) if sampled else ())
    rows, columns, tokens = 40, 60, 17
    dense = random_deltas(3, rows, columns, share).to(dtype)
    bank = bank_of(dense, frozen=(1,))
    assert bank.new_values.numel() > 0 and bank.frozen_values.numel() > 0
    bank.frozen_values.requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    found = {}
    for path in ("sparse", "reference"):
        generator.manual_seed(1)
        x = torch.randn(tokens, columns, generator=generator, dtype=dtype).requires_grad_(True)
        gates = torch.rand(tokens, 3, generator=generator, dtype=dtype).requires_grad_(True)
        y = sparse_delta(x, gates, bank.frozen_values, bank.new_values, *bank.entries(), rows, path)
        upstream = torch.randn(y.shape, generator=generator, dtype=dtype)
        grads = torch.autograd.grad(y, [x, gates, bank.frozen_values, bank.new_values], upstream)
        found[path] = [y, *grads]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for a, b in zip(found["sparse"], found["reference"], strict=True):
        assert a.dtype == dtype and b.abs().max() > 0 and (a - b).abs().max() < tolerance


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), tokens=st.integers(1, 7), experts=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), frozen=st.sets(st.integers(0, 3)), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape_strides_empty_experts_and_accumulation(rows, columns, tokens, experts, share, frozen, seed):
    bank = bank_of(random_deltas(experts, rows, columns, share, seed), tuple(frozen))
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path in ("sparse", "reference"):
        generator.manual_seed(seed)
        wide = torch.randn(columns, 2 * tokens, generator=generator, dtype=torch.float64)
        x = wide.t()[::2].detach().requires_grad_(True)  # neither contiguous nor a plain transpose
        gates = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).requires_grad_(True)
        bank.new_values.grad = None
        for _ in range(2):
            y = sparse_delta(x, gates, bank.frozen_values, bank.new_values, *bank.entries(), rows, path)
            y.square().sum().backward()
        assert bank.frozen_values.grad is None
        grads = [x.grad, gates.grad, bank.new_values.grad]
        found[path] = [y.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]
    for a, b in zip(found["sparse"], found["reference"], strict=True):
        assert a.shape == b.shape and (not a.numel() or (a - b).abs().max() < 1e-10)


def test_gradients_by_finite_differences():
    bank = bank_of(random_deltas(2, 4, 5, 0.5), frozen=(0,))
    frozen, new = bank.entries()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def run(x, gates, old, values):
        return sparse_delta(x, gates, old, values, frozen, new, 4)

    old = bank.frozen_values.detach().requires_grad_(True)
    assert torch.autograd.gradcheck(run, (x, gates, old, bank.new_values.detach().requires_grad_(True)))


def test_no_gradient_for_what_is_at_rest():
    bank = bank_of(random_deltas(2, 4, 5, 0.5).float(), frozen=(0,))
    y = sparse_delta(torch.randn(3, 5), torch.rand(3, 2), bank.frozen_values, bank.new_values, *bank.entries(), 4)
    y.sum().backward()
    assert bank.new_values.grad is not None and bank.frozen_values.grad is None and not bank.frozen_values.requires_grad


def test_under_autocast_sums_are_wide():
    bank = bank_of(random_deltas(2, 8, 8, 0.5).float(), frozen=())
    x, gates = torch.randn(5, 8), torch.rand(5, 2)
    wide = sparse_delta(x, gates, bank.frozen_values, bank.new_values, *bank.entries(), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = sparse_delta(x, gates, bank.frozen_values, bank.new_values, *bank.entries(), 8)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())


# ---- the bank
def test_bank_freezes_saves_and_loads_grown_sizes():
    bank = bank_of(random_deltas(3, 6, 7, 0.3).float(), frozen=(0,))
    before = bank.support()
    fresh = SparseBank(7, 6)
    fresh.load_state_dict(bank.state_dict())
    x, gates = torch.randn(4, 7), torch.rand(4, 3)

    def read(which):
        return sparse_delta(x, gates, which.frozen_values, which.new_values, *which.entries(), 6)

    assert torch.equal(read(fresh), read(bank))
    odd = bank.state_dict() | {"new_index": bank.state_dict()["new_index"].flip(0)}
    with pytest.raises(RuntimeError, match="not in order"):
        SparseBank(7, 6).load_state_dict(odd)
    parameter = fresh.new_values
    fresh.load_state_dict(bank.state_dict())
    assert fresh.new_values is parameter, "a parameter that fits stays the same object"
    bank.freeze()
    assert bank.new_values.numel() == 0 and bank.size == len(before.index)
    assert (read(bank) - read(fresh)).abs().max() < 1e-6
    broken = bank.state_dict() | {"frozen_values": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="disagree in number"):
        fresh.load_state_dict(broken)
    outside = bank.state_dict() | {"frozen_index": bank.frozen_index + 42}
    with pytest.raises(RuntimeError, match="outside"):
        fresh.load_state_dict(outside)


def test_pull_is_zero_until_values_move_and_weighs_each_entry():
    bank = SparseBank(2, 2)
    support = Support(torch.tensor([0, 3, 1]).int(), torch.tensor([0, 0, 1]).int(), torch.ones(3), torch.ones(3))
    bank.set(support, [0], torch.tensor([2.0, 5.0, 7.0]))
    assert bank.pulled() == 0
    with torch.no_grad():
        bank.new_values += torch.tensor([1.0, 0.1])
    assert bank.pulled().item() == pytest.approx(2 * 1 + 5 * 0.01)


# ---- the gate
def test_pooling_does_not_look_ahead_and_stands_from_the_limit_on():
    hidden = torch.randn(2, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    found = pooled(hidden, mask, causal=True, limit=2)
    assert torch.allclose(found[0, 2], hidden[0, 2]) and torch.allclose(found[0, 3:], hidden[0, 2:4].mean(0))
    assert torch.allclose(found[1, 0], hidden[1, 0]) and torch.allclose(found[1, 1:], hidden[1, :2].mean(0))
    other = hidden.clone()
    other[:, 4:] += 1
    assert torch.equal(
        pooled(other, mask, causal=True, limit=9)[:, :4], pooled(hidden, mask, causal=True, limit=9)[:, :4]
    )
    whole = pooled(hidden, mask, causal=False, limit=2)
    assert whole.shape == (2, 1, 3) and torch.allclose(whole[0, 0], hidden[0, 2:].mean(0))
    assert torch.equal(pooled(hidden, None, causal=False, limit=1)[:, 0], hidden.mean(1))


def test_gate_and_divergence_by_hand():
    address = torch.tensor([[1.0, 3.0]], dtype=torch.float64)  # layer norm: (-1, 1) up to eps
    logits = gate_logits(address, torch.tensor([[0.5, 2.0]]), torch.tensor([0.25]), temperature=2.0)
    assert logits.item() == pytest.approx(1.5 / 2 + 0.25, abs=1e-5)
    p, q = 0.8, 0.3
    old, new = (torch.tensor(math.log(v / (1 - v)), dtype=torch.float64) for v in (p, q))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert bernoulli_kl(old, new).item() == pytest.approx(expected, abs=1e-12)
    assert bernoulli_kl(old, old).item() == 0
    assert torch.isfinite(bernoulli_kl(torch.tensor(300.0), torch.tensor(-300.0)))


def gate_of(width=4, **changes) -> SequenceGate:
    settings = {"mode": "learned", "temperature": 1.0, "prompt_tokens": 3, "open_at": 2.0}
    return SequenceGate(width, **{**settings, **changes})


def test_gate_rows_are_inherited_and_its_losses_start_at_zero():
    gate = gate_of()
    gate.grow([-1], torch.zeros(0))
    assert torch.sigmoid(gate.bias).item() == pytest.approx(0.880797, abs=1e-6) and not gate.weight.any()
    with torch.no_grad():
        gate.weight.normal_()
    address = torch.randn(5, 4)
    gate.remember(address)
    gate.drawn = gate.draw(6, torch.Generator().manual_seed(0)).flatten(0, 1)
    gate.grow([0, -1], torch.tensor([0.5]))
    assert torch.equal(gate.weight[1], gate.weight[0]) and gate.usage.tolist() == [0.5, 0.5, 0]
    drift, opened = gate.losses(address)
    assert drift == 0 and opened.shape == (3,)
    with torch.no_grad():
        gate.bias[2] += 1  # the new expert may move freely
    assert gate.losses(address)[0] == 0
    with torch.no_grad():
        gate.bias[0] += 1
    drift = gate.losses(address)[0]
    assert drift > 0
    kl = [bernoulli_kl(gate.logits(h, old=True), gate.logits(h))[:, 0].mean() * 0.5 for h in (address, gate.drawn)]
    assert drift.item() == pytest.approx(sum(kl).item(), rel=1e-5)
    assert gate.drawn.mean(0) == pytest.approx(address.mean(0).tolist(), abs=1.5)


def test_decisions_of_threads_and_copies_do_not_meet():
    gate = gate_of()
    layer = SparseExperts(4, 4, site="x", decision=gate.decision)
    both = torch.nn.ModuleList([gate, layer])
    copied = copy.deepcopy(both)
    assert copied[0].decision is copied[1].decision and copied[0].decision is not gate.decision
    assert isinstance(pickle.loads(pickle.dumps(gate.decision)), Decision)
    gate.decision.gates = torch.ones(1, 1, 1)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(gate.decision.gates))
    thread.start()
    thread.join()
    assert seen == [None] and copied[0].decision.gates is None


# ---- masks
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 5000)), min_size=1, max_size=8),
    st.floats(0.001, 1), st.sampled_from([1.0, 4.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_allocation_keeps_the_budget_and_its_bounds(maps, density, spread):
    scores, sizes = [s for s, _ in maps], [n for _, n in maps]
    counts = allocate(scores, sizes, density, spread)
    wanted = max(1, round(density * sum(sizes)))
    share = wanted / sum(sizes)
    assert sum(counts) == wanted
    for count, size in zip(counts, sizes, strict=True):
        assert share / spread * size - 1 <= count <= min(size, share * spread * size + 1)


def test_allocation_follows_the_scores():
    assert allocate([1, 1], [1000, 1000], 0.01, 4) == [10, 10]
    assert allocate([3, 1], [1000, 1000], 0.01, 4) == [15, 5]
    assert allocate([1e-30, 1e-32], [1000, 1000], 0.02, 4) == [35, 5]  # clipped to a quarter of 20
    assert allocate([0, 0], [1000, 3000], 0.01, 4) == [10, 30]


# ---- split on share
def one(index, expert, sites=("a",)) -> dict[str, Support]:
    index, expert = torch.tensor(index).int(), torch.tensor(expert).int()
    return {site: Support(index, expert, torch.ones(len(index)), torch.ones(len(index))) for site in sites}


def test_split_by_hand():
    supports = one([0, 1, 2, 3, 10, 11], [0, 0, 0, 0, 1, 1])
    found = share_out([[0], [1]], supports, {"a": torch.tensor([2, 3, 10, 11, 20])}, task=2, least=0.05)
    assert found.experts == [[0], [1, 2], [0, 2], [2]]  # part of 0, all of 1, and one position nobody had
    assert found.parents == [0, -1] and found.overlap == 0.8
    assert found.moved["a"].tolist() == [0, 0, 2, 2, 1, 1] and found.fresh["a"].tolist() == [20]
    small = share_out([[0], [1]], supports, {"a": torch.tensor([3, 20, 21, 22])}, task=2, least=0.3)
    assert small.experts == [[0], [1], [2]] and small.fresh["a"].tolist() == [20, 21, 22]  # 1 < .3 * 4: left at rest
    few = share_out([[0], [1]], supports, {"a": torch.tensor([2, 3, 10, 11])}, task=2, least=0.05, smallest=3)
    assert few.experts == [[0], [1, 2]] and few.parents == [] and not few.fresh["a"].numel()
    alone = share_out([[0], [1]], supports, {"a": torch.tensor([2, 3])}, task=2, least=0, split=False)
    assert alone.experts == [[0], [1], [2]] and alone.fresh["a"].tolist() == [2, 3]


@given(st.lists(st.sets(st.integers(0, 30), min_size=1), min_size=1, max_size=5), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=80, deadline=None)
def test_supports_stay_disjoint_and_are_the_union_of_the_masks(masks, least):
    experts: list[list[int]] = []
    supports = one([], [])
    for task, mask in enumerate(masks):
        positions = torch.tensor(sorted(mask))
        found = share_out(experts, supports, {"a": positions}, task, least)
        old, experts = supports["a"], found.experts
        index = torch.cat([old.index.long(), found.fresh["a"]])
        owner = torch.cat([found.moved["a"], torch.full_like(found.fresh["a"], len(experts) - 1)])
        assert len(index) == len(index.unique()), "a position has two owners"
        assert set(index.tolist()) == set().union(*masks[: task + 1])
        assert len(index) <= sum(map(len, masks[: task + 1]))
        for position, expert in zip(old.index.tolist(), found.moved["a"].tolist(), strict=True):
            before = int(old.expert[old.index == position])
            if expert != before:  # only what the mask holds moves, to a child with this task
                assert position in mask and task in experts[expert]
        assert sorted(set(owner.tolist())) == list(range(len(experts))), "an expert without entries"
        supports = {"a": Support(index.int(), owner.int(), torch.ones(len(index)), torch.ones(len(index)))}
