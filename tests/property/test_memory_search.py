"""The index of frozen keys: exact where it says so, and a coarse search that misses next to nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.layers import LinearMemory, linear
from perdure.memory import dispatch, index_keys, read_atoms
from perdure.memory.kernels.search import _gathered, nearest, responses_of
from perdure.memory.routing import select

CASE = st.fixed_dictionaries(
    {
        "old": st.integers(1, 24), "new": st.integers(0, 4), "d": st.integers(1, 6), "tokens": st.integers(1, 9),
        "k": st.integers(1, 9), "reserve": st.integers(0, 2), "eps": st.sampled_from([1e-8, 0.5]),
        "seed": st.integers(0, 10**6),
    }
)  # fmt: skip


def bank_of(case, dtype=torch.float64):
    generator = torch.Generator().manual_seed(case["seed"])
    d = case["d"]
    shapes = [(case["tokens"], d), (case["old"], d), (case["old"], 3), (case["new"], d), (case["new"], 3)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(x, bank, **options):
    x = x.clone().requires_grad_()
    new = [t.clone().requires_grad_() for t in bank[2:]]
    dy, routing = read_atoms(x, *bank[:2], *new, tau=0.3, **options)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(dy.shape, generator=generator, dtype=torch.float64).to(dy.dtype)
    grads = torch.autograd.grad(dy, [x, *new], upstream, allow_unused=True, materialize_grads=True)
    return [dy.detach(), *grads], routing


@settings(max_examples=80, deadline=None)
@given(case=CASE, search=st.sampled_from(["exact", "coarse"]))
def test_an_index_changes_no_value_and_no_gradient(case, search):
    if search == "coarse":
        case["k"] = max(case["k"], case["old"])  # so that all frozen keys are candidates
    x, *bank = bank_of(case)
    options = {"k": case["k"], "reserve": min(case["reserve"], case["k"]), "eps": case["eps"]}
    want, chosen = results(x, bank, path="reference", **options)
    index = index_keys(bank[0], torch.float64, coarse=search == "coarse")
    have, routing = results(x, bank, path="gather", index=index, search=search, **options)
    assert torch.equal(routing.indices, chosen.indices)
    assert routing.scores is not None and chosen.scores is not None
    torch.testing.assert_close(routing.scores, chosen.scores, rtol=1e-9, atol=1e-9)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("size", [200, 1024, 1030, 4096])
def test_the_coarse_search_finds_the_best_atoms(size):
    generator = torch.Generator().manual_seed(size)
    keys = torch.randn(size, 64, generator=generator) * (0.1 + torch.rand(size, 1, generator=generator))
    x = torch.randn(300, 64, generator=generator) * torch.logspace(-3, 3, 300)[:, None]
    best = select(x @ keys.t(), 8)
    index = index_keys(keys, torch.float32, coarse=True)
    for each in (index, index._replace(codes=keys.to(torch.bfloat16), steps=None)):  # a CPU's, another device's
        found = nearest(x, each, 16)
        assert bool((found[:, 1:] > found[:, :-1]).all())
        recall = (best.unsqueeze(2) == found.unsqueeze(1)).any(-1).float().mean()
        assert recall >= 0.99


def test_chosen_responses_are_those_of_the_full_product():
    generator = torch.Generator().manual_seed(0)
    keys, x = torch.randn(50, 12, generator=generator), torch.randn(20, 12, generator=generator)
    chosen = torch.randint(0, 50, (20, 4), generator=generator).sort(1).values
    chosen += torch.arange(4)  # distinct and rising
    chosen.clamp_max_(49)
    for have in (responses_of(x, keys, chosen), _gathered(x, keys, chosen)):  # a CPU's, another device's
        torch.testing.assert_close(have, (x @ keys.t()).gather(1, chosen))


def test_rows_of_zeros_and_of_one_token_are_answered():
    index = index_keys(torch.zeros(40, 5), torch.float32, coarse=True)
    assert index.gram.abs().sum() == 0
    keys = torch.cat([torch.zeros(20, 5), torch.eye(5).repeat(4, 1)])
    bank = [keys, torch.ones(40, 2), torch.zeros(0, 5), torch.zeros(0, 2)]
    index = index_keys(keys, torch.float32, coarse=True)
    for x in (torch.zeros(1, 5), torch.eye(5)[:1]):
        have, routing = read_atoms(x, *bank, k=2, tau=0.1, index=index, search="coarse")
        want, chosen = read_atoms(x, *bank, k=2, tau=0.1)
        torch.testing.assert_close(have, want)
        assert bool(torch.isfinite(routing.weights).all())
        assert x.any() == 0 or torch.equal(routing.weights, chosen.weights)


def test_a_coarse_search_without_codes_and_an_index_of_another_dtype():
    case = {"old": 30, "new": 2, "d": 4, "tokens": 6, "k": 3, "reserve": 0, "eps": 1e-8, "seed": 1}
    x, *bank = bank_of(case)
    for index in (None, index_keys(bank[0], torch.float64, coarse=False)):
        with pytest.raises(ValueError, match="codes"):
            read_atoms(x, *bank, k=3, tau=0.1, index=index, search="coarse")
    other = index_keys(bank[0], torch.float32, coarse=True)
    want, _ = read_atoms(x, *bank, k=3, tau=0.1)
    have, _ = read_atoms(x, *bank, k=3, tau=0.1, index=other, search="coarse")  # float64 routing: scores all keys
    assert torch.equal(have, want)


# ---- the layer
def layer_of(old: int, search: str) -> LinearMemory:
    torch.manual_seed(0)
    layer = LinearMemory(12, 6, k=4, tau=0.3, delta=0.1, search=search)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for owner, size in enumerate((old, 3)):
        layer.grow(size, owner, generator)
        layer.bank.new_values.data.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("old", [8, 40, 600])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_indexes_its_old_keys_once_per_growth(old, training, monkeypatch):
    made: list[int] = []

    def counted(keys, dtype, coarse):
        made.append(len(keys))
        return index_keys(keys, dtype, coarse)

    monkeypatch.setattr(linear, "index_keys", counted)
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(2))
    layer, plain = layer_of(old, "exact").train(training), layer_of(old, "exact").train(training)
    plain.path = "reference"
    for _ in range(3):
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        have, want = layer(one), plain(other)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(y.square().sum(), [z, m.bank.new_keys, m.bank.new_values], allow_unused=True)
                 for y, z, m in ((have, one, layer), (want, other, plain))]  # fmt: skip
        for a, b in zip(*grads, strict=True):
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert made == [old] * (old >= 12)
    made.clear()
    layer.freeze()
    layer(x)
    assert made == ([old + 3] if old + 3 >= 12 else [])
    layer.bank.frozen_keys.mul_(2)  # as a state that is loaded into the bank
    layer(x)
    assert made == ([old + 3] * 2 if old + 3 >= 12 else [])
    assert copy.deepcopy(layer)._indexed is None and "_indexed" not in "".join(layer.state_dict())


def test_a_layer_that_searches_coarsely_answers_nearly_as_one_that_does_not(monkeypatch):
    monkeypatch.setattr(dispatch, "quick_codes", lambda device: True)
    monkeypatch.setitem(dispatch.TABLE, "cpu", dispatch.TABLE["cpu"]._replace(coarse=12 * 512))
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(2))
    exact, coarse = (layer_of(800, search).eval() for search in ("exact", "coarse"))
    assert coarse(x).shape == (200, 6) and coarse._indexed is not None and coarse._indexed[1].codes is not None
    near = torch.isclose(coarse(x), exact(x), rtol=1e-3, atol=1e-4).all(-1).float().mean()
    assert near >= 0.95
    small = layer_of(100, "coarse").eval()
    assert torch.equal(small(x), layer_of(100, "exact").eval()(x))  # too few to be worth it


def test_without_quick_codes_a_layer_searches_exactly(monkeypatch):
    monkeypatch.setitem(dispatch.TABLE, "cpu", dispatch.TABLE["cpu"]._replace(coarse=12 * 512))
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(2))
    exact, coarse = (layer_of(800, search).eval() for search in ("exact", "coarse"))
    monkeypatch.setattr(dispatch, "quick_codes", lambda device: False)
    assert torch.equal(coarse(x), exact(x)) and coarse._indexed is not None and coarse._indexed[1].codes is None
    assert dispatch.choose_search(800, 12, 4, "coarse") == ("exact", True)


def test_codes_are_quick_where_the_processor_says_so(monkeypatch):
    dispatch.quick_codes.cache_clear()
    try:
        for has in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has=has: has)
            dispatch.quick_codes.cache_clear()
            assert dispatch.quick_codes("cpu") is has and dispatch.quick_codes("cuda") is True
        monkeypatch.delattr(torch.cpu, "_is_vnni_supported")  # another torch
        dispatch.quick_codes.cache_clear()
        assert dispatch.quick_codes("cpu") is False
    finally:
        monkeypatch.undo()
        dispatch.quick_codes.cache_clear()
