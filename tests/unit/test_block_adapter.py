"""Masks, positions and caches around one block, on small hosts of each kind of attention."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts_tiny import HEADS, MODELS, VOCAB, WIDTH, build, inputs, result
from torch import nn

from perdure.errors import BadInput
from perdure.hosts import BlockAdapter, Host, Insertion, Rest, masks

TEXT = ["BertModel", "DistilBertModel", "CLIPTextModel", "GPT2Model", "LlamaModel", "Qwen2Model", "Gemma3TextModel"]
CAUSAL = [m for m in TEXT if m not in ("BertModel", "DistilBertModel")]
DECODERS = [m for m in MODELS if m.endswith(("CausalLM", "LMHeadModel"))]
ATTENTION = ["sdpa", "eager"]
CLOSE = {"atol": 3e-5, "rtol": 1e-4}


class Prompt(nn.Module):
    """Inserts the same trainable tokens into every row."""

    def __init__(self, count: int = 3, where: str = "front", width: int = WIDTH, seed: int = 9):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tokens = nn.Parameter(torch.randn(count, width, generator=generator))
        self.where = where
        self.seen: list[tuple] = []

    def forward(self, hidden, mask, positions, rest):
        assert isinstance(rest, Rest)
        self.seen.append((hidden.shape, mask, positions, rest))
        at = 0 if self.where == "front" else 1
        new = self.tokens.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        return Insertion(torch.cat((hidden[:, :at], new, hidden[:, at:]), 1), len(self.tokens), self.where)  # type: ignore[arg-type]


class Summary(nn.Module):
    """Inserts the mean of each row's real tokens: tokens that depend on the input."""

    def forward(self, hidden, mask, positions, rest):
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
        mean = (hidden * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
        return Insertion(torch.cat((mean + 1, hidden), 1), 1)


def add(model, fn, layer=0, key="p", tower=None) -> BlockAdapter:
    return Host(model).blocks(tower)[layer].add(key, fn)


def block_by_hand(model, layer, prompt, hidden, real, causal, positions):
    """What the frozen block gives on a row without padding, tokens concatenated and the mask built from scratch."""
    block = Host(model).blocks()[layer].module
    rows = []
    for row in range(hidden.shape[0]):
        own = hidden[row, real[row]]
        at = 0 if prompt.where == "front" else 1
        n, count = len(own), len(prompt.tokens)
        x = torch.cat((own[:at], prompt.tokens, own[at:]))[None]
        mask = torch.zeros(1, 1, n + count, n + count)
        if causal:
            mask = mask.masked_fill(~torch.ones(n + count, n + count).tril().bool(), torch.finfo(torch.float).min)
        where = positions[row, real[row]]
        where = torch.cat((where[:at], where[:1].expand(count), where[at:]))[None]
        extra = {}
        if hasattr(model, "rotary_emb"):
            kinds = getattr(model.config, "layer_types", None)
            kind = (kinds[layer],) if kinds and "Gemma3" in type(model).__name__ else ()
            extra = {"position_embeddings": model.rotary_emb(x, where, *kind)}
        out = block(x, attention_mask=mask, **extra)
        out = out[0] if isinstance(out, tuple) else out
        rows.append(torch.cat((out[0, :at], out[0, at + count :])))
    return rows


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("where", ["front", "after_first"])
@pytest.mark.parametrize("name", TEXT)
def test_against_a_block_run_by_hand(name, where, attention):
    model = build(name, attention)
    if hasattr(model.config, "sliding_window"):
        model.config.sliding_window = 64  # the reference mask has no window
    fed = inputs(name)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    fed |= {"attention_mask": mask}
    fed |= {} if name == "DistilBertModel" else {"position_ids": positions}
    caught = {}
    block = Host(model).blocks()[1]
    # Forward hooks of others must see neither inserted tokens nor other shapes.
    block.module.register_forward_hook(lambda m, args, out: caught.update(out=out), with_kwargs=False)
    block.module.register_forward_pre_hook(lambda m, args: caught.update(inside=args[0]))
    prompt = Prompt(where=where)
    adapter = block.add("p", prompt)
    result(model, **fed)
    out = caught["out"][0] if isinstance(caught["out"], tuple) else caught["out"]
    assert out.shape == caught["inside"].shape
    shape, seen, _, rest = prompt.seen[-1]
    assert shape == (2, 7, WIDTH) and torch.equal(seen, mask.bool())
    assert rest.causal == (name in CAUSAL) and rest.layer == 1 and rest.past == 0
    adapter.remove()
    reference = build(name, "eager")
    with torch.no_grad():
        expected = block_by_hand(reference, 1, prompt, caught["inside"], mask.bool(), name in CAUSAL, positions)
    for row in range(2):
        torch.testing.assert_close(out[row, mask[row].bool()], expected[row], **CLOSE)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", TEXT)
def test_padding_on_either_side_changes_nothing(name, attention):
    ids = inputs(name, batch=1, tokens=5)["input_ids"]
    for fn in (Prompt(), Prompt(where="after_first"), Summary()):
        model = build(name, attention)
        plain = result(model, input_ids=ids)
        add(model, fn, layer=1)
        alone = result(model, input_ids=ids)
        assert (alone - plain).abs().max() > 1e-3
        torch.testing.assert_close(
            result(model, input_ids=ids, attention_mask=torch.ones_like(ids)), alone, atol=1e-6, rtol=0
        )
        right = torch.cat((ids, ids.new_full((1, 3), 7)), 1)
        mask = torch.tensor([[1] * 5 + [0] * 3])
        torch.testing.assert_close(result(model, input_ids=right, attention_mask=mask)[:, :5], alone, **CLOSE)
        if name == "DistilBertModel":  # takes no position ids, so left padding moves its tokens
            continue
        left = {"input_ids": right.flip(1)[:, :3].new_full((1, 3), 7)}
        left["input_ids"] = torch.cat((left["input_ids"], ids), 1)
        positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
        out = result(model, **left, attention_mask=mask.flip(1), position_ids=positions)
        torch.testing.assert_close(out[:, 3:], alone, **CLOSE)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "LlamaModel", "Gemma3TextModel"])
def test_padding_neither_sees_nor_is_seen(name, attention):
    fed = inputs(name)
    fed["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    real = fed["attention_mask"].bool()
    model = build(name, attention)
    plain = result(model, **fed)
    # Attention of the last block is the last thing that mixes rows, so padding rows show whether they saw anything.
    add(model, Prompt(), layer=1)
    changed = result(model, **fed)
    torch.testing.assert_close(changed[~real], plain[~real], atol=2e-6, rtol=0)
    assert bool(((changed - plain)[real].abs().amax(-1) > 1e-4).all())
    other = {**fed, "input_ids": torch.where(real, fed["input_ids"], 6)}
    torch.testing.assert_close(result(model, **other)[real], changed[real], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_hosts_stay_causal(name, attention):
    model = build(name, attention)
    fed = inputs(name)
    plain = result(model, **fed)
    adapter = add(model, Prompt(where="after_first"), layer=1)
    changed = result(model, **fed)
    assert torch.allclose(changed[:, 0], plain[:, 0], atol=1e-6)
    assert bool(((changed - plain)[:, 1:].abs().amax(-1) > 1e-4).all())
    adapter.remove()
    add(model, Prompt(), layer=0)
    changed = result(model, **fed)
    assert bool(((changed - plain).abs().amax(-1) > 1e-4).all())
    later = {"input_ids": fed["input_ids"].clone()}
    later["input_ids"][:, 4:] = 6
    torch.testing.assert_close(result(model, **later)[:, :4], changed[:, :4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [*TEXT, "ViTModel", "CLIPVisionModel", "Dinov2Model", "CLIPModel"])
def test_no_inserted_token_is_bit_identical(name):
    model = build(name)
    fed = inputs(name)
    padded = {**fed, "attention_mask": torch.tensor([[1] * 5 + [0] * 2, [1] * 7])} if "input_ids" in fed else fed
    plain, plain_padded = result(model, **fed), result(model, **padded)
    for block in Host(model).blocks():
        block.add("none", lambda hidden, mask, positions, rest: Insertion(hidden, 0))
        block.add("same", lambda hidden, mask, positions, rest: hidden)
    assert torch.equal(result(model, **fed), plain) and torch.equal(result(model, **padded), plain_padded)


@pytest.mark.parametrize(
    "name", ["ViTModel", "ViTForImageClassification", "CLIPVisionModel", "DeiTModel", "Dinov2Model"]
)
def test_images(name):
    model = build(name)
    fed = inputs(name)
    plain = result(model, **fed)
    prompt = Prompt(where="after_first")
    add(model, prompt)
    assert result(model, **fed).shape == plain.shape and not torch.allclose(result(model, **fed), plain, atol=1e-4)
    tokens = 6 if name == "DeiTModel" else 5  # a distillation token
    assert prompt.seen[0][0] == (2, tokens, WIDTH) and prompt.seen[0][1] is None and not prompt.seen[0][3].causal


def test_one_tower_of_two():
    model, fed = build("CLIPModel"), inputs("CLIPModel")
    plain = result(model, **fed)
    add(model, Prompt(where="after_first"), tower="text")
    changed = result(model, **fed)
    assert torch.equal(changed[:, :16], plain[:, :16]) and not torch.allclose(changed[:, 16:], plain[:, 16:], atol=1e-4)


@pytest.mark.parametrize("name", ["BertModel", "LlamaModel", "GPT2Model", "ViTModel"])
def test_hidden_states_that_the_host_returns_have_no_inserted_tokens(name):
    model, fed = build(name), inputs(name)
    plain = model(**fed, output_hidden_states=True).hidden_states
    add(model, Prompt(), layer=0)
    states = model(**fed, output_hidden_states=True).hidden_states
    assert [s.shape for s in states] == [s.shape for s in plain]
    assert torch.equal(states[0], plain[0]) and not torch.allclose(states[1], plain[1])


def test_adapters_nest_and_removal_restores():
    model, fed = build("LlamaModel"), inputs("LlamaModel")
    fed["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    plain, keys = result(model, **fed), list(model.state_dict())
    block = Host(model).blocks()[0]
    inner = Prompt(2, seed=5)
    first, second = block.add("first", Prompt()), block.add("second", inner)
    both = result(model, **fed)
    shape, mask, positions, _ = inner.seen[-1]
    assert shape == (2, 10, WIDTH) and mask[:, :3].all() and positions.shape == (2, 10)
    with pytest.raises(BadInput, match="block '0'.*'first' is there already"):
        block.add("first", Prompt())
    first.remove()
    assert not torch.allclose(result(model, **fed), both, atol=1e-5)
    second.remove()
    second.remove()
    assert torch.equal(result(model, **fed), plain) and list(model.state_dict()) == keys
    assert "forward" not in block.module.__dict__ and Host(model).attached() == []


def test_one_adapter_of_five_tokens_equals_two_of_two_and_three():
    fed = inputs("BertModel")
    fed["attention_mask"] = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    one, two = build("BertModel"), build("BertModel")
    a, b = Prompt(2, seed=1), Prompt(3, seed=2)
    both = Prompt(5)
    both.tokens.data = torch.cat((b.tokens, a.tokens)).detach()
    add(one, both)
    add(two, a, key="a")
    add(two, b, key="b")
    torch.testing.assert_close(result(one, **fed), result(two, **fed), **CLOSE)


def test_a_deep_copy_is_independent():
    model, fed = build("BertModel"), inputs("BertModel")
    plain = result(model, **fed)
    model.handle = add(model, Prompt())  # type: ignore[assignment]
    changed = result(model, **fed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.handle.adapter.tokens.mul_(-2)  # type: ignore[union-attr,operator]
    assert torch.equal(result(model, **fed), changed) and not torch.equal(result(twin, **fed), changed)
    twin.handle.remove()  # type: ignore[union-attr,operator]
    assert torch.equal(result(twin, **fed), plain) and torch.equal(result(model, **fed), changed)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "LlamaModel"])
def test_gradient_reaches_the_prompt_alone(name, checkpointing):
    grads = []
    for recompute in (False, checkpointing):
        model = build(name).requires_grad_(False)
        if recompute:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                for attribute in ("dropout_prob", "attention_dropout"):
                    if hasattr(module, attribute):
                        setattr(module, attribute, 0.0)
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()  # type: ignore[operator]
        prompt = Prompt()
        add(model, prompt)
        model(**inputs(name), use_cache=False).last_hidden_state.square().mean().backward()
        assert prompt.tokens.grad is not None and bool((prompt.tokens.grad.abs().amax(-1) > 0).all())
        assert all(p.grad is None for p in model.parameters() if p is not prompt.tokens)
        grads.append(prompt.tokens.grad)
    torch.testing.assert_close(*grads)


# ---- caches
def generate(model, **settings):
    prompt = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(prompt, attention_mask=(prompt != 0).long(), **settings).tolist()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", DECODERS)
def test_generate_is_the_same_with_and_without_a_cache(name, attention):
    plain = generate(build(name, attention))
    for where in ("front", "after_first"):
        model = build(name, attention)
        for layer in (0, 1):
            add(model, Prompt(where=where, seed=layer), layer=layer)
        changed = generate(model)
        assert changed != plain and changed == generate(model, use_cache=False)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_static_caches(name, settings):
    model = build(name)
    add(model, Prompt(), layer=0, key="a")
    add(model, Prompt(2, seed=4), layer=0, key="b")
    add(model, Summary() if "num_beams" in settings else Prompt(seed=3), layer=1)
    beams = {"num_beams": settings.get("num_beams", 1)}
    if "num_beams" in settings:  # what Summary inserts is fixed at the prompt, so only the cached runs agree
        grown = generate(model, **settings)
        assert len(grown) == 2 and grown == generate(model, **settings)
        return
    assert generate(model, **settings, disable_compile=True) == generate(model, **beams)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_logits_step_by_step_equal_logits_at_once(name):
    model = build(name)
    add(model, Prompt(), layer=0)
    add(model, Prompt(2, where="after_first", seed=4), layer=1)
    ids = inputs(name, tokens=9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = result(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    cache, parts = None, []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        with torch.no_grad():
            out = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        cache = out.past_key_values
        assert cache.get_seq_length() == stop  # the host's cache holds the host's tokens only
        parts.append(out.logits)
    joined = torch.cat(parts, 1)
    torch.testing.assert_close(joined[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)
    twin = copy.deepcopy(cache)
    step = {"input_ids": ids[:, :1], "attention_mask": torch.cat((mask, mask[:, -1:]), 1)}
    assert torch.equal(result(model, **step, past_key_values=twin), result(model, **step, past_key_values=cache))


def test_changes_without_insertion_apply_to_every_cached_call():
    model = build("LlamaForCausalLM")
    plain = generate(model)
    add(model, lambda hidden, mask, positions, rest: hidden + torch.linspace(-1, 1, WIDTH))
    changed = generate(model)
    assert changed != plain and changed == generate(model, use_cache=False)


def test_a_cache_from_before_the_adapter_is_refused():
    model = build("LlamaForCausalLM")
    ids = inputs("LlamaForCausalLM")["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    add(model, Prompt(), key="mine")
    with pytest.raises(BadInput, match="layer 0 was filled without the block adapter 'mine'.*use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    with pytest.raises(BadInput, match="batch has 4 rows.*made for 2"):
        model(input_ids=ids[:, :1].repeat_interleave(2, 0), past_key_values=cache)


# ---- refusals
def test_refusals_name_what_was_found():
    fed = inputs("BertModel")
    hidden = "hidden states of shape"
    cases = [
        (lambda h, m, p, r: h[:, :-1], hidden),
        (lambda h, m, p, r: Insertion(h, 2), "2 inserted tokens"),
        (lambda h, m, p, r: Insertion(h, 0, "back"), "where is 'back'; allowed: front, after_first"),
        (lambda h, m, p, r: None, "found|NoneType|returned"),
    ]
    for fn, message in cases:
        model = build("BertModel")
        add(model, fn)
        with pytest.raises(BadInput, match=message):
            model(**fed)
    model = build("BertModel")
    add(model, Prompt())
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(BadInput, match="'sdpa' and 'eager', found 'flex_attention'"):
        Host(model).blocks()[0].module(torch.zeros(1, 2, WIDTH))


def test_a_forward_wrapped_by_others():
    model, fed = build("BertModel"), inputs("BertModel")
    plain = result(model, **fed)
    block = Host(model).blocks()[0]
    own = block.module.forward
    block.module.forward = wrapped = lambda *args, **kwargs: own(*args, **kwargs) * 1.0
    adapter = block.add("p", Prompt())
    assert not torch.allclose(result(model, **fed), plain, atol=1e-4)
    adapter.remove()
    assert block.module.forward is wrapped and torch.equal(result(model, **fed), plain)
    adapter = block.add("p", Prompt())
    ours = block.module.forward
    block.module.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(BadInput, match="wrapped by function after it was added"):
        adapter.remove()


# ---- masks alone
def test_token_masks_from_every_form():
    real = torch.tensor([[True, True, False], [False, True, True]])
    four = (real[:, None, None, :] & torch.ones(3, 3).bool()).expand(2, 1, 3, 3)
    causal = four & torch.ones(3, 3).tril().bool()
    low = torch.finfo(torch.float16).min
    for mask in (
        real.long(), four, causal, four[:, :, :1],
        torch.where(causal, 0.0, low).half(), torch.where(four, 0.0, -10000.0),
    ):  # fmt: skip
        found = masks.token_mask(mask, 2, 3)
        assert found is not None and torch.equal(found, real)
    assert masks.token_mask(None, 2, 3) is None
    later = torch.ones(2, 1, 2, 9).bool()
    later[1, :, 1, 5] = False
    found = masks.token_mask(later, 2, 2, offset=4)
    assert found is not None and found.tolist() == [[True, True], [True, False]]
    for wrong in (torch.ones(2, 3), torch.ones(2, 3, 3).bool(), torch.ones(2, 1, 3, 3).long()):
        with pytest.raises(BadInput, match="attention_mask: a block got"):
            masks.token_mask(wrong, 2, 3)


def test_inserted_mask_entry_by_entry():
    real = torch.tensor([[False, True, True]])
    mask = (real[:, None, None] & torch.ones(3, 3).tril().bool()).expand(1, HEADS, 3, 3)
    t, f = True, False
    expected = {
        0: [[t, f, f, f, f], [t, t, f, f, f], [f, f, f, f, f], [t, t, f, t, f], [t, t, f, t, t]],
        1: [[f, f, f, f, f], [f, t, f, t, f], [f, t, t, t, f], [f, f, f, t, f], [f, t, t, t, t]],
    }
    for at, rows in expected.items():
        made = masks.insert(mask, real, 2, at, causal=True)
        assert made is not None and made.shape == (1, HEADS, 5, 5) and made[0, 0].tolist() == rows
        additive = torch.where(mask, 0.0, torch.finfo(torch.float).min)
        also = masks.insert(additive, real, 2, at, causal=True)
        assert also is not None and torch.equal(also == 0, made)
        assert not also.isneginf().all(-1).any()  # no row without a finite entry: softmax would give NaN
    both = masks.insert(real[:, None, None].expand(1, 1, 3, 3), real, 2, 0, causal=False)
    assert both is not None
    assert both[0, 0].tolist() == [[t, t, f, t, t], [t, t, f, t, t], [f, f, f, t, t], [t, t, f, t, t], [t, t, f, t, t]]
    two = masks.insert(torch.tensor([[0, 1, 1]]), real, 2, 0, causal=True)
    assert two is not None and two.tolist() == [[1, 1, 0, 1, 1]]
    assert masks.insert(None, None, 2, 0, causal=True) is None


def test_vocabulary_of_the_tiny_hosts_is_not_degenerate():
    tokens = {token for row in generate(build("LlamaForCausalLM")) for token in row}
    assert len(tokens) > 8 and max(tokens) < VOCAB
