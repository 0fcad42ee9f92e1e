"""SinglePrompt: the same trained prefix for every input, in the blocks that were named."""

from __future__ import annotations

import pytest
import torch
from hosts_tiny import build, inputs, result
from prompt_methods import clones, learner, texts

from perdure.attachment import attach, detach
from perdure.errors import BadInput
from perdure.hosts import Host, PrefixAdapter
from perdure.layers import StaticPrefix


@pytest.mark.parametrize("name", ["BertModel", "ViTModel", "CLIPModel", "LlamaForCausalLM"])
def test_it_is_the_bare_host_with_these_rows_in_front(name):
    model, fed = build(name), inputs(name)
    plain = result(model, **fed)
    attach(model, {"single_prompt": {"length": 3}})
    method = model._perdure.methods[0]
    assert len(method.modules) == len(Host(model).blocks())  # five of two blocks: both
    found, bare = result(model, **fed), build(name)
    assert not torch.allclose(found, plain, atol=1e-3)
    for block in Host(bare).blocks():
        rows = method.modules[f"{block.name}.prefix"].P
        assert rows.shape[:2] == (2, 3) and rows.abs().max() < 1 and rows.min() < -0.5 and rows.max() > 0.5
        PrefixAdapter(block, StaticPrefix(rows.detach().clone()))
    assert torch.equal(result(bare, **fed), found)
    detach(model)
    assert torch.equal(result(model, **fed), plain) and not Host(model).attached()


def test_it_learns_without_boundaries_and_moves_nothing_else():
    made = learner(
        build("BertModel", vocab_size=300), {"single_prompt": {"length": 3, "layers": [-1], "start": 0.1}},
        protocol={"boundaries": "none", "mask": "current"},
    )  # fmt: skip
    method = made.methods[0]
    assert list(method.modules) == ["1.prefix"]
    before, base = method.modules["1.prefix"].P.detach().clone(), clones(made.frozen_base())
    assert before.abs().max() <= 0.1
    made.learn(texts(0)).learn(texts(1))
    moved = (method.modules["1.prefix"].P.detach() - before).abs()
    assert bool((moved.amax(-1) > 1e-4).all())  # every row, of keys and of values
    assert all(torch.equal(base[name], tensor) for name, tensor in made.frozen_base().items())
    assert made.counters.extra_rows == 0  # no second pass


def test_bad_input():
    with pytest.raises(BadInput, match="layers: 2 is out of range; the model has 2 blocks"):
        attach(build("BertModel"), {"single_prompt": {"layers": [2]}})
    for setting in ({"length": 0}, {"layers": []}, {"start": 0}):
        with pytest.raises(BadInput, match=f"single_prompt.{next(iter(setting))}"):
            attach(build("BertModel"), {"single_prompt": setting})
