"""The Triton kernel of the atoms' search in Triton's interpreter: values, ties, gradients, and where it is not taken.

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
from perdure.memory import read_atoms
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
    from perdure.methods import moram
    from tests.conformance import cases

    monkeypatch.setattr(moram, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"method\.moram\.search: fused needs triton"):
        cases.build_learner("bert", {"moram": {"search": "fused"}})
