"""The query is what the frozen host makes of the input, whatever is in it and whatever mode it is in."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hosts_tiny import VOCAB, build, inputs
from torch import nn

from perdure.errors import BadInput
from perdure.hosts import Host, QueryPass


class Taker(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.is_away, self.taken = 0.0, False, []

    @contextmanager
    def away(self):
        self.is_away = True
        yield
        self.is_away = False

    def take(self, query, seen):
        self.taken.append((query, seen))


def watch(model, limit=None, tower=""):
    taker = Taker()
    host = Host(model)
    for block in host.blocks():  # something that must be off in the query pass
        block.add("noise", lambda hidden, mask, positions, rest: hidden if taker.is_away else hidden + 1)
    return taker, QueryPass(host, tower, taker, "q", limit)


POOLED = {"BertModel": "mean", "ViTModel": "cls", "GPT2LMHeadModel": "last", "LlamaForCausalLM": "last"}


@pytest.mark.parametrize("name", POOLED)
def test_the_query_is_the_feature_of_the_host_in_evaluation(name):
    more = {"hidden_dropout_prob": 0.5} if name in ("BertModel", "ViTModel") else {}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "GPT2LMHeadModel" else {}
    model, fed = build(name, **more, **none), inputs(name)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    if "input_ids" in fed:
        fed["attention_mask"] = mask
    with torch.no_grad():
        states = (model.base_model if "LM" in name else model)(**fed).last_hidden_state
    expected = {
        "cls": states[:, 0],
        "mean": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if "input_ids" in fed else None,
        "last": states[torch.arange(2), mask.sum(1) - 1] if "input_ids" in fed else None,
    }[POOLED[name]]
    taker, handle = watch(model)
    model.train()
    part = next(model.modules())
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    model(**fed) if name == "GPT2LMHeadModel" else model(*fed.values()) if name == "BertModel" else model(**fed)
    (query, seen), *rest = taker.taken
    assert not rest and seen is None and not query.requires_grad and part.training
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(query, expected, atol=1e-5, rtol=1e-5)
    if not more:  # no dropout in the forward pass either: the generator has not moved at all
        assert torch.equal(torch.get_rng_state(), before)
    handle.remove()
    model(**fed)
    assert len(taker.taken) == 1
    assert not any("perdure_q" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_with_a_limit_nothing_behind_it_is_looked_at(name):
    model = build(name)
    taker, _ = watch(model, limit=3)
    ids = torch.randint(5, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    query, seen = taker.taken[-1]
    expected = [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert seen.int().tolist() == expected
    for row, start, tokens in ((0, 0, 3), (1, 2, 3), (2, 0, 2)):
        alone = ids[row : row + 1, start : start + tokens]
        model(input_ids=alone, use_cache=False)
        torch.testing.assert_close(taker.taken[-1][0][0], query[row], atol=1e-5, rtol=1e-5)
    other = ids.clone()
    other[0, 3:], other[1, 5:] = 6, 6
    model(input_ids=other, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(taker.taken[-1][0], query, atol=1e-6, rtol=0)
    other[0, 2] = 6
    model(input_ids=other, attention_mask=mask, position_ids=positions, use_cache=False)
    assert not torch.allclose(taker.taken[-1][0][0], query[0], atol=1e-4)


def test_with_a_filled_cache_no_query_is_taken():
    model = build("LlamaForCausalLM")
    taker, _ = watch(model, limit=3)
    first = model(input_ids=torch.tensor([[7, 8, 9, 10]]), use_cache=True)
    assert len(taker.taken) == 1
    model(input_ids=torch.tensor([[11]]), past_key_values=first.past_key_values)
    assert len(taker.taken) == 1


def test_each_tower_has_its_own():
    model = build("CLIPModel")
    vision, _ = watch(model, tower="vision")
    text = Taker()
    QueryPass(Host(model), "text", text, "q")
    model(**inputs("CLIPModel"))
    assert vision.taken[0][0].shape == (2, 48) and text.taken[0][0].shape == (2, 32)
    model.vision_model(pixel_values=inputs("CLIPModel")["pixel_values"])
    assert len(vision.taken) == 2 and len(text.taken) == 1
    with pytest.raises(BadInput, match="has one already"):
        QueryPass(Host(model), "text", text, "q")
    own = nn.Module()
    own.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
    with pytest.raises(BadInput, match="no module that takes input_ids or pixel_values"):
        QueryPass(Host(own), "", Taker(), "q")
