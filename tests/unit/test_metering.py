"""Counted work and memory: by hand on small operations, and on a host whose formula is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from perdure.data import Batch
from perdure.memory import SparseBank, Support, sparse_delta
from perdure.metering import Meter, inference, tokens_of


def test_a_linear_map_forward_and_backward():
    layer, x = nn.Linear(16, 32), torch.randn(8, 16)
    with Meter() as meter:
        y = layer(x)
        assert meter.flops == 2 * 8 * 16 * 32
        y.sum().backward()
    assert meter.flops == 2 * (2 * 8 * 16 * 32)  # the input needs no gradient
    x.requires_grad_()
    with Meter() as meter:
        layer(x).sum().backward()
    assert meter.flops == 3 * (2 * 8 * 16 * 32)


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operations_that_are_made_of_others(outside):
    w, x, q = torch.randn(32, 16), torch.randn(8, 16), torch.randn(2, 4, 10, 8)
    with outside(), Meter() as meter:
        functional.linear(x, w)
        torch.einsum("bd,od->bo", x, w)
        torch.matmul(q, q.transpose(-1, -2))
    assert meter.flops == 2 * (2 * 8 * 16 * 32) + 2 * 8 * 100 * 8


def test_attention_counts_on_the_cpu():
    q = torch.randn(2, 4, 10, 8, requires_grad=True)
    forward = 2 * (2 * 4) * 10 * 10 * 8  # each of q·k and weights·v
    with Meter() as meter:
        out = functional.scaled_dot_product_attention(q, q, q)
    assert meter.flops == 2 * forward
    with Meter() as meter:
        out.sum().backward()
    assert meter.flops == 5 * forward  # scores again, and gradients of weights, values, queries and keys


def test_sparse_products_count_their_entries():
    bank = SparseBank(48, 32)
    places = torch.randperm(48 * 32)[:100].int()
    expert = torch.arange(100, dtype=torch.int32) % 2
    bank.set(Support(places, expert, torch.randn(100), torch.ones(100)), [1])
    x, gates = torch.randn(8, 48, requires_grad=True), torch.rand(8, 2, requires_grad=True)
    with Meter() as meter:
        y = sparse_delta(x, gates, bank.frozen_values, bank.new_values, *bank.entries(), 32)
        assert meter.flops == 2 * 8 * 100
        y.sum().backward()
    assert meter.flops == 2 * 8 * (100 + 100 + 50)  # back through all, and the values of the one that trains


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_sums_of_chosen_rows_count_where_they_are_weighted(outside):
    table, chosen, weights = torch.randn(20, 6), torch.randint(20, (5, 3)), torch.rand(5, 3, requires_grad=True)
    with outside(), Meter() as meter:
        functional.embedding_bag(chosen, table, mode="sum")
        assert meter.flops == 0
        y = functional.embedding_bag(chosen, table, mode="sum", per_sample_weights=weights)
        assert meter.flops == 2 * 5 * 3 * 6
        if y.requires_grad:
            y.sum().backward()
            assert meter.flops == 2 * (2 * 5 * 3 * 6)


def test_nothing_is_changed_by_counting():
    def step() -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        layer(torch.randn(3, 5, 16)).square().mean().backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    plain = step()
    with Meter():
        counted = step()
    assert len(plain) > 10 and all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


def test_peak_is_that_of_living_tensors():
    a = torch.zeros(1000, requires_grad=True)  # 4000 bytes
    with Meter([a, a[10:]]) as meter:  # a view is no memory of its own
        assert meter.now == 4000
        b = a.exp()  # kept for the backward pass
        c = b + 1  # not kept
        d = c * 2
        assert meter.now == meter.peak_bytes == 4000 * 4
        del c
        assert meter.now == 4000 * 3 and meter.peak_bytes == 4000 * 4
        del b
        assert meter.now == 4000 * 3
        d.sum().backward()
    assert meter.peak_bytes > 4000 * 4
    with Meter() as meter, torch.no_grad():
        for _ in range(10):
            t = torch.ones(1000)
    assert meter.peak_bytes == 8000 and len(t) == 1000


def test_tokens_are_counted_without_padding():
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert tokens_of([Batch({"input_ids": ids, "attention_mask": mask}), Batch({"input_ids": ids})]) == 4 + 8
    assert tokens_of([Batch({"pixel_values": torch.zeros(1), "input_ids": ids})]) is None
    assert tokens_of([Batch({}, features=ids.float())]) is None


def test_the_work_of_a_prediction_by_hand():
    from perdure.learner import Learner
    from perdure.models import load_model
    from perdure.registry import OBJECTIVES
    from perdure.streams import Experience
    from tests.e2e.tiny import MODEL

    rows = [{"text": "ash birch cedar", "label": "a"}, {"text": "elm fir", "label": "b"}]
    short = {"classification": {"max_length": 32}}
    ((objective, _),) = OBJECTIVES.parse("classification", "objective")
    model, processor, _ = load_model(MODEL, objective, seed=0)
    learner: Any = Learner(model, processor, method="linear_probe", head="cosine", objective=short)
    experience = Experience(index=0, name="one", train=rows, test=rows, classes=("a", "b"))
    learner.learn(experience)
    before = torch.get_rng_state()
    found = inference(learner, experience)
    assert torch.equal(torch.get_rng_state(), before) and not learner.model.training
    (batch,) = learner.batches(rows)
    B, T, D, F, C = *batch.inputs["input_ids"].shape, 16, 32, 2
    per_row = T * (4 * 2 * D * D + 2 * 2 * D * F) + 2 * 2 * T * T * D + 2 * D * C
    pooler = 2 * D * D if getattr(model, "pooler", None) is not None else 0
    assert found["inference_flops_per_row"] == per_row + pooler
    tokens = int(batch.inputs["attention_mask"].sum())
    assert tokens < B * T
    assert found["inference_flops_per_token"] == B * (per_row + pooler) / tokens
