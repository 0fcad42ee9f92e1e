"""The Triton kernels of atoms and patches in Triton's interpreter: values, ties, gradients, where they are not taken.

Needs the package triton, which no extra of ours brings (it is large): `pip install triton`, then these tests run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perdure.errors import BadInput
from perdure.layers import LinearMemory
from perdure.memory import read_atoms, read_patches
from perdure.memory.kernels import search
from perdure.memory.routing import select


@pytest.fixture
def kernel() -> Any:
    pytest.importorskip("triton", reason="triton is not installed: its kernel is NOT tested here")
    return search.fused()


def keys_of(old: int, new: int, width: int, seed: int, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    every = torch.randn(old + new, width, generator=generator)
    if tied and old + new > 2:
        every[1::2] = every[0]  # half of all scores are equal
    return every[:old], every[old:]


@given(
    tokens=st.integers(1, 40), width=st.integers(1, 40), old=st.integers(0, 140), new=st.integers(0, 9),
    k=st.integers(1, 9), seed=st.integers(0, 99), tied=st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_k_largest_and_the_joint_norm(kernel, tokens, width, old, new, k, seed, tied):
    if old + new == 0:
        return
    old_keys, new_keys = keys_of(old, new, width, seed, tied)
    # Small whole numbers: responses are exact in any order of summation, and ties are ties.
    x = torch.randint(-3, 4, (tokens, width), generator=torch.Generator().manual_seed(seed)).float()
    old_keys, new_keys = (torch.round(2 * keys) for keys in (old_keys, new_keys))
    k = min(k, old + new)
    p = x @ torch.cat([old_keys, new_keys]).t()
    expected = select(p, k)
    best, numbers, square = kernel.select(x, old_keys, new_keys, k)
    assert torch.equal(numbers, expected) and torch.equal(best, p.gather(1, expected))
    assert torch.equal(square, p.square().sum(1))


@pytest.mark.parametrize(("old", "new"), [(70, 8), (0, 8), (70, 0)])
@pytest.mark.parametrize("delta", [None, 0.2])
def test_a_read_and_its_gradients(kernel, old, new, delta):
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 24), (old, 24), (old, 10), (new, 24), (new, 10)]
    x, *bank = (torch.randn(shape, generator=generator) for shape in shapes)
    upstream = torch.randn(37, 10, generator=generator)
    wanted = [each.requires_grad_() for each in ([x, bank[2], bank[3]] if new else [x])]
    found = {}
    for way in ("exact", "fused"):
        y, routing = read_atoms(x, *bank, k=4, tau=0.3, delta=delta, path="gather", search=way)
        found[way] = [y, routing.weights, routing.scores, *torch.autograd.grad(y, wanted, upstream)]
        assert torch.equal(routing.indices, found.setdefault("numbers", routing.indices))
    for a, b in zip(found["fused"], found["exact"], strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() < 1e-4


def test_what_the_kernel_does_not_do_is_searched_exactly(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "select", lambda *_: pytest.fail("the kernel was called"))
    bank = [torch.randn(shape) for shape in ((20, 6), (20, 5), (4, 6), (4, 5))]
    read_atoms(torch.randn(3, 6, dtype=torch.float64), *bank, k=2, tau=0.1, search="fused")
    read_atoms(torch.randn(3, 6), *bank, k=2, tau=0.1, reserve=1, search="fused")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # a CPU
    read_atoms(torch.randn(3, 6), *bank, k=2, tau=0.1, search="fused")


def test_a_layer_takes_it(kernel, monkeypatch):
    calls = []
    monkeypatch.setattr(kernel, "select", lambda *given, plain=kernel.select: calls.append(1) or plain(*given))
    layer = LinearMemory(12, 6, k=4, search="fused")
    generator = torch.Generator().manual_seed(0)
    layer.grow(30, 0, generator)
    layer.bank.new_values.data.normal_(generator=generator)
    layer.grow(8, 1, generator)
    layer.bank.new_values.data.normal_(generator=generator)
    x = torch.randn(5, 12)
    have = layer(x)
    layer.search = "exact"
    assert len(calls) == 1 and (have - layer(x)).abs().max() < 1e-5


def test_without_triton_it_is_refused_before_work_starts(monkeypatch):
    from perdure.methods import _refusals
    from tests.conformance import cases

    monkeypatch.setattr(_refusals, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"method\.moram\.search: fused needs triton.*set exact"):
        cases.build_learner("bert", {"moram": {"search": "fused"}})
    with pytest.raises(BadInput, match=r"method\.apn\.path: fused needs triton.*set auto"):
        cases.build_learner("bert", {"apn": {"path": "fused"}})


# ---- patches
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=9), inner=st.integers(1, 40), outer=st.integers(1, 80),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_product_for_each_group_of_rows(kernel, counts, inner, outer, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randint(-3, 4, shape, generator=generator).float() for shape in
             ((sum(counts), inner), (len(counts), outer, inner), (sum(counts), outer))]  # fmt: skip
    left, weights, upstream = whole[0].requires_grad_(), whole[1].requires_grad_(), whole[2]
    ends = torch.tensor(counts).cumsum(0)
    # Whole numbers: exact in any order of summation.
    found = search.grouped().GroupedProduct.apply(left, weights.transpose(1, 2), ends)
    parts = zip(left.split(counts), weights, strict=True)
    expected = torch.cat([part @ each.t() for part, each in parts])
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (left, weights), upstream), torch.autograd.grad(expected, (left, weights), upstream),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [0, 1, 45])
def test_patches_and_their_gradients(kernel, tokens, monkeypatch):
    product, calls = search.grouped().GroupedProduct, []
    monkeypatch.setattr(product, "apply", lambda *given, plain=product.apply: calls.append(1) or plain(*given))
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, 24), (12, 24), (5, 24), (12, 5), (12, 5), (12, 18, 5)]
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    upstream = torch.randn(tokens, 18, generator=generator)
    found = {}
    for way in ("grouped", "fused"):
        y, routing = read_patches(*given, k=3, tau=0.2, gamma=0.7, path=way)
        grads = torch.autograd.grad(y, given, upstream, allow_unused=True)
        found[way] = [y, routing.weights, *(g for g in grads if g is not None)]
    assert len(calls) == (tokens > 0) and len(found["fused"]) == len(found["grouped"])
    for a, b in zip(found["fused"], found["grouped"], strict=True):
        assert a.shape == b.shape and (not a.numel() or (a - b).abs().max() < 1e-4)
    if tokens == 1:  # nine of twelve patches were selected by no token
        quiet = (found["fused"][-1].flatten(1) == 0).all(1)
        assert int(quiet.sum()) == 9


def test_patches_in_float64_or_on_a_processor_are_grouped(kernel, monkeypatch):
    monkeypatch.setattr(search.grouped().GroupedProduct, "apply", lambda *_: pytest.fail("the kernel was called"))
    given = [torch.randn(shape) for shape in ((3, 6), (4, 6), (2, 6), (4, 2), (4, 2), (4, 5, 2))]
    read_patches(*[each.double() for each in given], k=2, tau=0.1, path="fused")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    read_patches(*given, k=2, tau=0.1, path="fused")
