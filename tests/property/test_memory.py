"""Fast paths equal the reference, and the invariants of routing, over random cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.memory import (
    choose_path,
    dispatch,
    open_items,
    read_atoms,
    select,
    self_activation,
    weight,
)
from perdure.memory.routing import _select_packed, select_with_reserve

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
        "leading": draw(st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4), (2, 11), (0,), (2, 0)])),
        "k": draw(st.integers(1, 10)),
        "min_k": draw(st.sampled_from([1, 2])),
        "reserve": draw(st.sampled_from([0, 0, 1, 3])),
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
    names = ("k", "min_k", "reserve", "tau", "delta", "renormalise", "scale")
    return x, bank, {name: case[name] for name in names if name in case}


def run(x, bank, options, path, grad_y=None):
    x = x.detach().requires_grad_()
    new = [t.detach().requires_grad_() for t in bank[2:]]
    dy, routing = read_atoms(x, bank[0], bank[1], *new, path=path, **options)
    if grad_y is None or not dy.requires_grad:
        return dy.detach(), routing, None
    grads = torch.autograd.grad(dy, [x, *new], grad_y, allow_unused=True, materialize_grads=True)
    return dy.detach(), routing, grads


def close(have, want, dtype, name):
    have, want = have.detach(), want.detach()
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
    case |= {"integers": False, "strided": False, "k": 3, "min_k": 1, "reserve": 0, "tau": 0.1, "delta": None}
    x, bank, options = build(case | {"renormalise": False, "scale": 1.0}, torch.float64)
    grad_y = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    _, _, want = run(x, bank, options, "reference", grad_y)
    before = dispatch.TABLE["cpu"]
    dispatch.TABLE["cpu"] = before._replace(make_gram=threshold)
    try:
        _, _, have = run(x, bank, options, "gather", grad_y)
    finally:
        dispatch.TABLE["cpu"] = before
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


def test_deterministic_algorithms_are_honoured_and_a_repeat_is_bit_identical():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    bank = [torch.randn(90, 16), torch.randn(90, 8), torch.randn(6, 16), torch.randn(6, 8)]
    options = {"k": 3, "tau": 0.1}
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (run(x, bank, options, "auto", torch.ones(64, 8)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(was)
    assert torch.equal(one[0], two[0]) and one[2] is not None and two[2] is not None
    assert all(torch.equal(a, b) for a, b in zip(one[2], two[2], strict=True))


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


@quick
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    k=st.integers(1, 7),
    reserve=st.integers(0, 4),
    start=st.integers(0, 6),
)
def test_reserved_places_go_to_the_best_new_items(rows, k, reserve, start):
    scores = torch.tensor(rows, dtype=torch.float64)
    have = select_with_reserve(scores, k, 1, reserve, start).tolist()
    for row, chosen in zip(rows, have, strict=True):
        ranked = sorted(range(6), key=lambda i: (-row[i], i))
        count = min(k, 6)
        kept = min(reserve, 6 - start, count) if start else 0
        want = [i for i in ranked if i >= start][:kept]
        want += [i for i in ranked if i not in want][: count - kept]
        assert chosen == sorted(want, key=lambda i: (-row[i], i))
        assert sum(i >= start for i in chosen) >= kept


def test_starved_new_atoms_learn_only_with_reserved_places():
    keys, values = torch.eye(4)[:3] * 5, torch.ones(3, 2)  # old atoms that win every place
    x = torch.tensor([[1.0, 1.0, 1.0, 0.1]])
    for reserve, learns in ((0, False), (1, True)):
        new_keys = torch.tensor([[0.0, 0.0, 0.0, 0.1]], requires_grad=True)
        new_values = torch.zeros(1, 2, requires_grad=True)
        dy, routing = read_atoms(x, keys, values, new_keys, new_values, k=2, tau=1.0, reserve=reserve)
        (grad,) = torch.autograd.grad(dy.sum(), [new_values])
        assert (3 in routing.indices) is learns and bool(grad.abs().sum() > 0) is learns
