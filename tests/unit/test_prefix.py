"""Keys and values in front of a block's own, against plain attention and against a KV cache filled by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts_tiny import HEADS, MODELS, VOCAB, WIDTH, build, inputs, result
from torch import nn

from perdure.errors import BadInput
from perdure.hosts import Host, Insertion, Prefix, PrefixAdapter

PLAIN = ["BertModel", "DistilBertModel", "ViTModel", "Dinov2Model", "CLIPTextModel", "CLIPVisionModel", "GPT2Model"]
CAUSAL = ["CLIPTextModel", "GPT2Model"]
DECODERS = [m for m in MODELS if m.endswith(("CausalLM", "LMHeadModel"))]
ATTENTION = ["sdpa", "eager"]
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])


class Rows(nn.Module):
    """The same trainable keys and values for every input."""

    def __init__(self, width: int = WIDTH, count: int = 3, seed: int = 5, seen: torch.Tensor | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.keys = nn.Parameter(torch.randn(count, width, generator=generator))
        self.values = nn.Parameter(torch.randn(count, width, generator=generator))
        self.seen = seen

    def forward(self, rows, tokens):
        assert self.seen is None or self.seen.shape == (rows, tokens)
        return Prefix(self.keys[None], self.values[None], self.seen)


def add(model, maker, layer=0, key="p", tower=None):
    return PrefixAdapter(Host(model).blocks(tower)[layer], maker, key)


def width_of(model):
    return Host(model).sites("key")[0].out_features


def split(x):
    """[B, T, D] -> [B, H, T, d]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients_against_plain_attention(name, attention):
    """The heads' outputs in block 1, from the projections that the host itself computed there."""
    dtype = torch.float64 if attention == "sdpa" else torch.float32  # eager takes its softmax in float32
    close = {"atol": 1e-9, "rtol": 1e-9} if attention == "sdpa" else {"atol": 1e-5, "rtol": 1e-4}
    model = build(name, attention).to(dtype)
    prefix = Rows().to(dtype)
    add(model, prefix, layer=1)
    caught = {}
    for site in Host(model).sites("attention", layers=[1]):
        if site.role == "attention_output":
            site.module.register_forward_pre_hook(lambda m, args: caught.update(out=args[0]))
        else:
            start, stop = site.out_slice or (0, site.out_features)
            hook = lambda m, a, out, role=site.role, s=slice(start, stop): caught.update({role: out[..., s].detach()})  # noqa: E731
            site.module.register_forward_hook(hook)
    fed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    real = torch.ones(2, caught_tokens := (7 if "input_ids" in fed else 5), dtype=torch.bool)
    if "input_ids" in fed:
        fed["attention_mask"], real = MASK, MASK.bool()
    model(**fed)
    q, k, v = (split(caught[role]) for role in ("query", "key", "value"))
    keys = torch.cat([split(prefix.keys[None]).expand(2, -1, -1, -1), k], 2)
    values = torch.cat([split(prefix.values[None]).expand(2, -1, -1, -1), v], 2)
    seen = real[:, None, :].expand(2, caught_tokens, -1)
    seen = seen.tril() if name in CAUSAL else seen
    seen = torch.cat([torch.ones(2, caught_tokens, 3, dtype=torch.bool), seen], -1)
    scores = (q @ keys.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).masked_fill(~seen[:, None], float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(caught["out"][real], expected[real], **close)
    wanted = [prefix.keys, prefix.values]
    weight = torch.randn(expected[real].shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for mine, plain in zip(
        torch.autograd.grad((caught["out"][real] * weight).sum(), wanted, retain_graph=True),
        torch.autograd.grad((expected[real] * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, **close)
        assert mine.abs().max() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_against_a_cache_that_holds_the_prefix(name):
    """As PEFT's prefix tuning: keys in the cache of every layer, not rotated; the first real token has position 0."""
    from transformers import DynamicCache

    model = build(name).double()
    if hasattr(model.config, "sliding_window"):
        model.config.sliding_window = 64  # a cache by hand would let the prefix fall out of the window
        for part in model.modules():
            if isinstance(getattr(part, "sliding_window", None), int):
                part.sliding_window = 64
    fed, width, made, cache = inputs(name), width_of(model), [], DynamicCache()
    heads = getattr(model.config, "num_key_value_heads", HEADS)
    for layer in range(2):
        made.append(Rows(width, seed=layer).double())
        two = (t[None].unflatten(-1, (heads, -1)).transpose(1, 2).expand(2, -1, -1, -1) for t in made[-1].parameters())
        cache.update(*two, layer)
    positions = torch.arange(7)[None].expand(2, -1)
    mask = torch.ones(2, 10, dtype=torch.int64)
    expected = result(model, **fed, past_key_values=cache, position_ids=positions, attention_mask=mask)
    plain = result(model, **fed)
    for layer in range(2):
        add(model, made[layer], layer)
    torch.testing.assert_close(result(model, **fed, use_cache=False), expected, atol=1e-9, rtol=1e-9)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", [d for d in DECODERS if d not in ("Qwen2ForCausalLM", "GemmaForCausalLM")])
def test_generation_is_the_same_with_and_without_a_cache(name):
    model = build(name)
    plain = result(model, **inputs(name))
    for layer in range(2):
        add(model, Rows(width_of(model), seed=layer), layer)
    assert not torch.allclose(result(model, **inputs(name)), plain, atol=1e-3)
    prompt = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = (prompt != 0).long()
    found = [model.generate(prompt, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)
    alone = model.generate(prompt[:1, 2:], attention_mask=mask[:1, 2:], use_cache=True, **options)
    assert torch.equal(alone[0, 3:], found[0][0, 5:])  # padding in front changes nothing


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["GPT2Model", "LlamaModel", "Gemma3TextModel"])
def test_what_does_not_see_it_is_as_before_and_no_token_sees_later_ones(name, attention):
    model, fed = build(name, attention), inputs(name)
    plain = result(model, **fed)
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[0, :4] = seen[1, :2] = False
    add(model, Rows(width_of(model), seen=seen), layer=1)
    changed = result(model, **fed)
    torch.testing.assert_close(changed[~seen], plain[~seen], atol=2e-6, rtol=0)
    assert bool(((changed - plain)[seen].abs().amax(-1) > 1e-4).all())
    later = {"input_ids": fed["input_ids"].clone()}
    later["input_ids"][:, 5:] = 6
    torch.testing.assert_close(result(model, **later)[:, :5], changed[:, :5], atol=1e-6, rtol=0)
    padded = result(model, **fed, attention_mask=torch.ones(2, 7, dtype=torch.int64))
    torch.testing.assert_close(padded, changed, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["BertModel", "CLIPModel", "ViTModel", "LlamaForCausalLM"])
def test_no_rows_are_bit_identical_and_removal_leaves_nothing(name):
    model, fed = build(name), inputs(name)
    plain, keys = result(model, **fed), list(model.state_dict())
    configs = [module.__dict__.get("config") for module in model.modules()]
    handles = [PrefixAdapter(block, Rows(count=0), "none") for block in Host(model).blocks()]
    assert torch.equal(result(model, **fed), plain)
    widths = {site.tower: site.out_features for site in Host(model).sites("key")}
    handles += [PrefixAdapter(b, Rows(widths[b.tower]), "p") for b in Host(model).blocks()]
    assert not torch.allclose(result(model, **fed), plain, atol=1e-3)
    with pytest.raises(BadInput, match="a prefix with key 'p' is there already"):
        add(model, Rows(), tower=min(widths))
    for handle in handles[:-1]:
        handle.remove()
        handle.remove()
    Host(model).strip()
    assert torch.equal(result(model, **fed), plain) and list(model.state_dict()) == keys
    assert all(a is m.__dict__.get("config") for a, m in zip(configs, model.modules(), strict=True))


def test_a_copy_has_its_own_prefix():
    model, fed = build("BertModel"), inputs("BertModel")
    plain = result(model, **fed)
    handle = add(model, Rows())
    changed, other = result(model, **fed), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(result(model, **fed), plain) and torch.equal(result(other, **fed), changed)
    Host(other).strip()
    assert torch.equal(result(other, **fed), plain)


def test_what_cannot_be_extended_is_refused():
    model = build("BertModel")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BadInput, match="attn_implementation: .*'sdpa' and 'eager', found 'flash_attention_2'"):
        add(model, Rows())
    model.config._attn_implementation = "sdpa"
    add(model, Rows())
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(BadInput, match="attn_implementation: is 'flex_attention'"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
    own = nn.Module()
    own.layers = layers
    with pytest.raises(BadInput, match="attention of transformers' models alone, found TransformerEncoderLayer"):
        add(own, Rows())
    with pytest.raises(BadInput, match="prefix: is 5 wide, the host's keys are 4 heads of 8"):
        model = build("BertModel")
        add(model, Rows(5))
        model(**inputs("BertModel"))


# ---- tokens that go from block to block, for inserted ones that only some tokens see
class Carried(nn.Module):
    def __init__(self, store, seen=None):
        super().__init__()
        self.store, self.seen = store, seen

    def forward(self, hidden, mask, positions, rest):
        tokens = self.store[-1]
        joined = torch.cat((tokens, hidden), 1)
        return Insertion(joined, tokens.shape[1], seen=self.seen, leaving=self.store.append)


@pytest.mark.parametrize("name", ["BertModel", "ViTModel", "DistilBertModel"])
def test_tokens_carried_through_all_blocks_are_tokens_of_the_input(name):
    """A host without padding and causality treats them as its own: the blocks in a row, by hand."""
    model, fed = build(name).double(), inputs(name)
    fed = {k: v.double() if v.is_floating_point() else v for k, v in fed.items()}
    tokens = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    caught, store = {}, [tokens]
    first, last = Host(model).blocks()
    first.module.register_forward_pre_hook(lambda m, args, kwargs: caught.update(x=args[0]), with_kwargs=True)
    last.module.register_forward_hook(lambda m, args, out: caught.update(out=out[0] if isinstance(out, tuple) else out))
    for block in (first, last):
        block.add("c", Carried(store))
    result(model, **fed)
    hidden = torch.cat((tokens, caught["x"]), 1)
    with torch.no_grad():
        for block in (first, last):
            hidden = type(block.module).forward(block.module, hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    torch.testing.assert_close(caught["out"], hidden[:, 3:], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(store[-1], hidden[:, :3], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mask", [None, MASK.flip(0) * 0 + 1, MASK])
@pytest.mark.parametrize("name", ["GPT2Model", "LlamaModel"])
def test_inserted_tokens_are_hidden_from_those_that_must_not_see_them(name, mask):
    model, fed = build(name), inputs(name)
    fed |= {} if mask is None else {"attention_mask": mask}
    plain = result(model, **fed)
    seen = torch.zeros(2, 7, dtype=torch.bool)
    seen[:, 4:] = True
    store = [torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(1))]
    for block in Host(model).blocks():
        block.add("c", Carried(store, seen))
    changed, real = result(model, **fed), torch.ones_like(seen) if mask is None else mask.bool()
    torch.testing.assert_close(changed[real & ~seen], plain[real & ~seen], atol=3e-6, rtol=0)
    assert bool(((changed - plain)[real & seen].abs().amax(-1) > 1e-4).all())
    later = {**fed, "input_ids": fed["input_ids"].clone()}
    later["input_ids"][:, 6:] = 6
    before = real.clone()
    before[:, 6:] = False
    torch.testing.assert_close(result_again(model, store, later)[before], changed[before], atol=3e-6, rtol=0)
    assert VOCAB > 6


def result_again(model, store, fed):
    del store[1:]
    return result(model, **fed)
