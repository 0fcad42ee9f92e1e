"""Fast paths equal the reference, and the invariants of routing, banks and projections, over random cases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.memory import (
    SHARED,
    AtomBank,
    InputMoments,
    choose_path,
    free_directions,
    leading_basis,
    open_items,
    project,
    read_atoms,
    select,
    self_activation,
    weight,
)
from perdure.memory.kernels import atoms
from perdure.memory.routing import _select_packed

FAST = ["dense", "gather"]
quick = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw):
    """A bank, inputs and settings; `integers` makes exact ties likely without any rounding."""
    case = {
        "old": draw(st.integers(0, 9)),
        "new": draw(st.integers(0, 5)),
        "d_in": draw(st.integers(1, 7)),
        "d_out": draw(st.integers(1, 6)),
        "leading": draw(st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4), (0,), (2, 0)])),
        "k": draw(st.integers(1, 10)),
        "min_k": draw(st.sampled_from([1, 2])),
        "tau": draw(st.sampled_from([0.03, 0.1, 1.0])),
        "delta": draw(st.sampled_from([None, 0.0, 0.2, 0.6])),
        "renormalise": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.0])),
        "integers": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }
    return case


def build(case, dtype):
    generator = torch.Generator().manual_seed(case["seed"])

    def make(*shape):
        if case["integers"]:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = make(*case["leading"], case["d_in"])
    if case["strided"]:
        wide = torch.zeros(*case["leading"], 2 * case["d_in"], dtype=dtype)
        wide[..., ::2] = x
        x = wide[..., ::2]
        if x.ndim > 2:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
    bank = [make(case["old"], case["d_in"]), make(case["old"], case["d_out"])]
    bank += [make(case["new"], case["d_in"]), make(case["new"], case["d_out"])]
    names = ("k", "min_k", "tau", "delta", "renormalise", "scale")
    return x, bank, {name: case[name] for name in names}


def run(x, bank, options, path, grad_y=None):
    x = x.detach().requires_grad_()
    new = [t.detach().requires_grad_() for t in bank[2:]]
    dy, routing = read_atoms(x, bank[0], bank[1], *new, path=path, **options)
    if grad_y is None or not dy.requires_grad:
        return dy.detach(), routing, None
    grads = torch.autograd.grad(dy, [x, *new], grad_y, allow_unused=True, materialize_grads=True)
    return dy.detach(), routing, grads


def close(have, want, dtype, name):
    rtol = 1e-9 if dtype == torch.float64 else 2e-3
    bound = rtol * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
    worst = float((have - want).abs().max()) if want.numel() else 0.0
    assert worst <= bound, f"{name}: {worst} > {bound}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@quick
@given(case=cases())
def test_fast_paths_equal_the_reference_in_values_and_gradients(dtype, case):
    x, bank, options = build(case, dtype)
    grad_y = torch.randn(*case["leading"], case["d_out"], generator=torch.Generator().manual_seed(1)).to(dtype)
    want, routing, want_grads = run(x, bank, options, "reference", grad_y)
    size = case["old"] + case["new"]
    expected_k = min(max(case["k"], case["min_k"]), size)
    assert want.shape == (*case["leading"], case["d_out"]) and want.dtype == dtype
    assert routing.indices.shape == (*case["leading"], expected_k) and routing.size == size
    for path in [*FAST, "auto"]:
        have, chosen, grads = run(x, bank, options, path, grad_y)
        assert torch.equal(chosen.indices, routing.indices), path
        close(chosen.weights, routing.weights, dtype, f"{path} weights")
        close(have, want, dtype, f"{path} dy")
        if want_grads is None:
            assert grads is None
            continue
        assert grads is not None
        for name, a, b in zip(("x", "keys", "values"), grads, want_grads, strict=True):
            close(a, b, dtype, f"{path} grad {name}")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), old=st.integers(0, 20), new=st.integers(1, 4), threshold=st.sampled_from([0.0, 1e9]))
def test_the_gram_form_of_the_input_gradient_is_exact(seed, old, new, threshold):
    case = {"old": old, "new": new, "d_in": 3, "d_out": 4, "leading": (8,), "seed": seed}
    case |= {"integers": False, "strided": False, "k": 3, "min_k": 1, "tau": 0.1, "delta": None}
    x, bank, options = build(case | {"renormalise": False, "scale": 1.0}, torch.float64)
    grad_y = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    _, _, want = run(x, bank, options, "reference", grad_y)
    before = atoms.GRAM_FROM
    atoms.GRAM_FROM = threshold
    try:
        _, _, have = run(x, bank, options, "gather", grad_y)
    finally:
        atoms.GRAM_FROM = before
    assert have is not None and want is not None
    for a, b in zip(have, want, strict=True):
        close(a, b, torch.float64, f"threshold {threshold}")


@pytest.mark.parametrize("path", [*FAST, "reference"])
@pytest.mark.parametrize("needs", ["x", "keys", "values", "none"])
def test_gradients_asked_for_one_by_one(path, needs):
    case = {"old": 5, "new": 3, "d_in": 4, "d_out": 3, "leading": (6,), "seed": 3, "integers": False, "strided": False}
    case |= {"k": 3, "min_k": 1, "tau": 0.2, "delta": None, "renormalise": False, "scale": 2.0}
    x, bank, options = build(case, torch.float64)
    _, _, want = run(x, bank, options, "reference", torch.ones(6, 3, dtype=torch.float64))
    assert want is not None
    wanted = {"x": x, "keys": bank[2], "values": bank[3]}
    if needs != "none":
        wanted[needs].requires_grad_()
    dy, _ = read_atoms(x, *bank, path=path, **options)
    assert dy.requires_grad == (needs != "none")
    if needs != "none":
        (grad,) = torch.autograd.grad(dy.sum(), [wanted[needs]])
        close(grad, want[["x", "keys", "values"].index(needs)], torch.float64, needs)


def test_a_token_whose_responses_are_below_eps_gets_no_gradient_through_the_norm():
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64)
    bank = [keys[:1], keys[:1], keys[1:], keys[1:]]
    x = torch.tensor([[1e-3, 2e-3], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    options = {"k": 2, "tau": 0.5, "eps": 0.1}
    _, _, want = run(x, bank, options, "reference", torch.ones_like(x))
    for path in FAST:
        _, _, have = run(x, bank, options, path, torch.ones_like(x))
        assert have is not None and want is not None
        for a, b in zip(have, want, strict=True):
            close(a, b, torch.float64, path)
            assert torch.isfinite(a).all()


def test_frozen_items_that_ask_for_a_gradient_take_the_reference_path():
    case = {"old": 9, "new": 2, "d_in": 4, "d_out": 3, "leading": (6,), "seed": 3, "integers": False, "strided": False}
    case |= {"k": 2, "min_k": 1, "tau": 0.2, "delta": None, "renormalise": False, "scale": 1.0}
    x, bank, options = build(case, torch.float64)
    bank[0].requires_grad_()
    dy, _ = read_atoms(x, *bank, path="auto", **options)
    dy.sum().backward()
    assert bank[0].grad is not None and bank[0].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="path"):
        read_atoms(x, *bank, path="gather", **options)


@pytest.mark.parametrize("path", ["auto", "reference", *FAST])
def test_autocast_routes_in_float32(path):
    torch.manual_seed(0)
    x = torch.randn(4, 16, requires_grad=True)
    bank = [torch.randn(20, 16), torch.randn(20, 8), torch.randn(4, 16, requires_grad=True)]
    bank.append(torch.randn(4, 8, requires_grad=True))
    plain, routing = read_atoms(x, *bank, k=3, tau=0.1, path=path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dy, chosen = read_atoms(x, *bank, k=3, tau=0.1, path=path)
        assert dy.dtype == torch.bfloat16
        assert chosen.weights.dtype == torch.float32 and torch.equal(chosen.weights, routing.weights)
        assert torch.equal(dy, plain.to(torch.bfloat16))
    dy.float().sum().backward()
    grads = [x.grad, bank[2].grad, bank[3].grad]
    want = torch.autograd.grad(plain.sum(), [x, bank[2], bank[3]])
    for a, b in zip(grads, want, strict=True):
        assert a is not None and a.dtype == torch.float32
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_in_float32(dtype):
    torch.manual_seed(0)
    x, bank = torch.randn(4, 16).to(dtype), [torch.randn(n, 16).to(dtype) for n in (20, 20, 4, 4)]
    dy, routing = read_atoms(x, *bank, k=3, tau=0.1)
    want, chosen = read_atoms(x.float(), *[t.float() for t in bank], k=3, tau=0.1)
    assert dy.dtype == dtype and torch.equal(dy, want.to(dtype)) and torch.equal(routing.weights, chosen.weights)


def test_bad_shapes_and_settings_are_refused_by_name():
    x, good = torch.zeros(2, 3), [torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(1, 3), torch.zeros(1, 2)]
    for position, wrong, word in [(0, (4, 5), "features"), (1, (3, 2), "each key"), (3, (1, 7), "new_values")]:
        bank = list(good)
        bank[position] = torch.zeros(*wrong)
        with pytest.raises(ValueError, match=word):
            read_atoms(x, *bank, k=1, tau=0.1)
    for bad in ({"k": 0}, {"tau": 0.0}, {"eps": 0.0}, {"path": "quick"}):
        with pytest.raises(ValueError):
            read_atoms(x, *good, **{"k": 1, "tau": 0.1, **bad})


# ---- routing
@quick
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5),
    k=st.integers(1, 8),
)
def test_selection_is_by_falling_score_and_rising_index(rows, k):
    want = [sorted(range(6), key=lambda i: (-row[i], i))[: min(k, 6)] for row in rows]
    for dtype in (torch.float32, torch.float64):
        assert select(torch.tensor(rows, dtype=dtype), k).tolist() == want
    # What other devices use; -0 and 0 are equal.
    scores = torch.tensor(rows, dtype=torch.float32)
    scores = torch.where((scores == 0) & (torch.arange(6) % 2 == 0), -0.0, scores)
    assert _select_packed(scores, min(k, 6)).tolist() == want


@pytest.mark.parametrize("size", [1, 7, 64, 128, 200, 301, 403, 600, 1024])
@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_selection_at_sizes_of_every_branch(size, levels):
    generator = torch.Generator().manual_seed(size + levels)
    scores = torch.randint(-levels, levels, (33, size), generator=generator).float()
    for k in (1, 8, 40):
        want = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, : min(k, size)]
        assert torch.equal(select(scores, k), want)
        assert torch.equal(_select_packed(scores, min(k, size)), want)


@quick
@given(size=st.integers(1, 80), seed=st.integers(0, 10**6), delta=st.floats(0.15, 0.9))
def test_scores_have_unit_norm_so_few_atoms_pass_the_threshold(size, seed, delta):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    keys = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    scores, _ = self_activation(x, keys)
    assert torch.allclose(scores.square().sum(-1), torch.ones(7, dtype=torch.float64), atol=1e-12)
    chosen = scores.gather(-1, select(scores, size))
    weights = open_items(weight(chosen, 1.0), chosen, delta)
    assert int((weights > 0).sum(-1).max()) <= math.floor(1 / delta**2)


@quick
@given(seed=st.integers(0, 10**6), delta=st.one_of(st.none(), st.floats(0, 0.9)), tau=st.floats(0.05, 2))
def test_weights_sum_to_one_unless_the_threshold_took_some(seed, delta, tau):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(9, 4, generator=generator, dtype=torch.float64)
    weights = weight(chosen, tau)
    assert torch.allclose(weights.sum(-1), torch.ones(9, dtype=torch.float64))
    kept = open_items(weights, chosen, delta)
    assert torch.equal(kept, weights if not delta else weights * (chosen >= delta))
    total = open_items(weights, chosen, delta, renormalise=True).sum(-1)
    some = (kept > 0).any(-1)
    assert torch.allclose(total, some.double(), atol=1e-12)


def test_the_dispatcher_gathers_from_large_banks_only():
    assert choose_path(8, 8) == "dense" and choose_path(1024, 8) == "gather"


# ---- bank
def filled(bank: AtomBank, seed: int) -> AtomBank:
    with torch.no_grad():
        bank.new_values.normal_(generator=torch.Generator().manual_seed(seed))
    return bank


def read(bank: AtomBank, x: torch.Tensor, **options) -> torch.Tensor:
    return read_atoms(x, *bank.view()[:4], **{"k": 3, "tau": 0.1, **options})[0]


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
@given(sizes=st.lists(st.integers(1, 4), max_size=5), drops=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 99))
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
@given(sizes=st.lists(st.integers(1, 4), max_size=5), other=st.lists(st.integers(1, 4), max_size=5), frozen=st.booleans())
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
    held = bank.new_keys
    bank.grow(2, owner=1)
    assert bank.new_keys is not held and bank.frozen_size == 4 and torch.equal(bank.frozen_keys, held)
    for wrong in ({"r": 0, "owner": 0}, {"r": 1, "owner": -1}):
        with pytest.raises(ValueError):
            bank.grow(**wrong)
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


def test_frozen_rows_stay_byte_identical_while_new_ones_train():
    bank = make_bank([3, 4])
    keys, values, new = bank.frozen_keys.clone(), bank.frozen_values.clone(), bank.new_values.detach().clone()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        read(bank, x).square().sum().backward()
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
    bank.freeze()
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
    assert report.measured > 0
    with pytest.raises(ValueError, match="cosine"):
        bank.merge(0.0)
    assert AtomBank(6, 5).merge().removed == 0


# ---- protection
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
    bank = make_bank([4])
    with torch.no_grad():
        bank.new_keys.copy_(project(bank.new_keys, moments.basis(0.999999)))
    fresh = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    assert read(bank, old).abs().max() < 1e-8 < 1e-2 < read(bank, fresh).abs().max()


def test_bad_values_of_protection_are_refused():
    with pytest.raises(ValueError, match="energy"):
        leading_basis(torch.eye(3), 1.0)
    with pytest.raises(ValueError, match="reserve"):
        leading_basis(torch.eye(3), 0.5, reserve=4)
    with pytest.raises(ValueError, match="finite"):
        leading_basis(torch.full((3, 3), float("nan")), 0.5)
    with pytest.raises(ValueError, match="basis"):
        project(torch.ones(1, 4), torch.eye(3))
