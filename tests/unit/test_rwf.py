"""RwF and its control in hosts: what is seen by whom, what is refused, and where nothing may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts_tiny import WIDTH, build, inputs, result
from torch import nn

from perdure.attachment import attach, build_methods, detach
from perdure.errors import BadInput
from perdure.hosts import Adding, Host, Inserting, Rest
from perdure.layers import PARTS, AttentionPooler, RetrievedPrompts, StaticPrompts
from perdure.learner import Learner
from perdure.processors import ByteTokenizer, ImageProcessor
from perdure.streams import Experience

HOSTS = ["BertModel", "DistilBertModel", "ViTModel", "Dinov2Model", "CLIPVisionModel", "GPT2Model", "LlamaModel"]
DECODERS = ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma3ForCausalLM"]
CLOSE = {"atol": 3e-5, "rtol": 1e-4}
STRONG = {"rwf": {"length": 3}}


def strong(model: nn.Module, scale: float = 30.0) -> nn.Module:
    """Larger weights than a new layer's, so that prompts depend on the input visibly."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (RetrievedPrompts, StaticPrompts)):
                for parameter in module.parameters():
                    parameter.mul_(scale)
    return model


def prompts(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (RetrievedPrompts, StaticPrompts))]


# ---- attaching
@pytest.mark.parametrize("method", ["rwf", "static_prompts", "attention_pooler"])
@pytest.mark.parametrize("name", HOSTS)
def test_one_line_attaches_and_detaches(name, method):
    model, fed = build(name), inputs(name)
    plain, state = result(model, **fed), {k: v.clone() for k, v in model.state_dict().items()}
    assert attach(model, method) is model
    # the first three of two blocks; three units in front of the last one
    assert len(prompts(model)) == (3 if method == "attention_pooler" else 2)
    changed = result(strong(model), **fed)
    assert changed.shape == plain.shape and not torch.allclose(changed, plain, atol=1e-3)
    detach(model)
    assert torch.equal(result(model, **fed), plain)
    assert list(model.state_dict()) == list(state) and all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize("setting", [{"length": 0}, {"layers": []}])
@pytest.mark.parametrize("method", ["rwf", "static_prompts"])
@pytest.mark.parametrize("name", HOSTS)
def test_no_prompts_or_no_block_is_the_frozen_host_bit_for_bit(name, method, setting):
    model, fed = build(name), inputs(name)
    if "input_ids" in fed:
        fed["attention_mask"] = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    plain = result(model, **fed)
    attach(model, {method: setting})
    assert torch.equal(result(model, **fed), plain) and not prompts(model)
    # and a layer of no prompts that does stand there
    detach(model)
    for block in Host(model).blocks():
        block.add("none", Inserting(RetrievedPrompts(WIDTH, 0)))
    assert torch.equal(result(model, **fed), plain)


def test_blocks_by_index_and_both_towers_with_their_own_width():
    model = attach(build("BertModel"), {"rwf": {"layers": [-1]}})
    assert [path for path, _ in Host(model).attached()] == ["encoder.layer.1"]
    assert [b.name for b in Host(model).blocks(layers=[1, -1])] == ["1"]
    with pytest.raises(BadInput, match="layers: 2 is out of range; the model has 2 blocks"):
        attach(build("BertModel"), {"rwf": {"layers": [0, 2]}})
    model = build("CLIPModel")
    plain = result(model, **inputs("CLIPModel"))
    strong(attach(model, "rwf"))
    assert sorted(m.P.shape[1] for m in prompts(model)) == [32, 32, 48, 48]
    changed = result(model, **inputs("CLIPModel"))
    assert not torch.allclose(changed[:, :16], plain[:, :16], atol=1e-3)
    assert not torch.allclose(changed[:, 16:], plain[:, 16:], atol=1e-3)


def test_only_what_trains_asks_for_gradients_and_the_host_gets_none():
    model = build("BertModel").requires_grad_(False)
    attach(model, {"rwf": {"train": ["P", "W_O"], "length": 2}})
    asking = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert asking == {"P", "W_O", "b_O"}
    strong(model)
    model(**inputs("BertModel")).last_hidden_state.square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all("perdure_rwf" in name and name.rsplit(".", 1)[-1] in asking for name in moved)
    assert len(moved) == 6


# ---- padding
@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel", "GPT2Model", "LlamaModel"])
def test_a_padded_token_is_never_retrieved(name):
    ids = inputs(name, batch=1, tokens=5)["input_ids"]
    model = build(name)
    plain = result(model, input_ids=ids)
    strong(attach(model, STRONG))
    alone = result(model, input_ids=ids)
    assert not torch.allclose(alone, plain, atol=1e-2)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    for junk in (7, 9):
        right = torch.cat((ids, ids.new_full((1, 3), junk)), 1)
        torch.testing.assert_close(result(model, input_ids=right, attention_mask=mask)[:, :5], alone, **CLOSE)
    assert not torch.allclose(result(model, input_ids=right)[:, :5], alone, atol=1e-3)  # unmasked it does matter
    if name == "DistilBertModel":
        return
    left = torch.cat((ids.new_full((1, 3), 7), ids), 1)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    out = result(model, input_ids=left, attention_mask=mask.flip(1), position_ids=positions)
    torch.testing.assert_close(out[:, 3:], alone, **CLOSE)


def test_images_and_texts_route_by_their_own_content():
    """The prompts of one row depend on that row alone."""
    for name in ("ViTModel", "BertModel"):
        model, fed = strong(attach(build(name), STRONG)), inputs(name)
        both = result(model, **fed)
        for row in range(2):
            one = {key: value[row : row + 1] for key, value in fed.items()}
            torch.testing.assert_close(result(model, **one)[0], both[row], **CLOSE)


# ---- causal hosts
@pytest.mark.parametrize("name", DECODERS)
def test_a_language_model_is_refused_and_the_control_is_not(name):
    model, fed = build(name), inputs(name)
    plain = result(model, **fed)
    with pytest.raises(BadInput, match="method.rwf: retrieval pools over the whole text.*block 0.*static_prompts"):
        attach(model, "rwf")
    assert torch.equal(result(model, **fed), plain) and not Host(model).attached()
    strong(attach(model, {"static_prompts": {"length": 3}}))
    changed = result(model, **fed)
    assert not torch.allclose(changed, plain, atol=1e-3)
    later = {"input_ids": fed["input_ids"].clone()}
    later["input_ids"][:, 4:] = 6
    torch.testing.assert_close(result(model, **later)[:, :4], changed[:, :4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_the_reason_holds_a_forced_layer_lets_earlier_tokens_see_later_ones(name):
    model, fed = build(name), inputs(name)
    Host(model).blocks()[0].add("rwf", Inserting(RetrievedPrompts(WIDTH, 3)))
    before = result(strong(model), **fed)
    later = {"input_ids": fed["input_ids"].clone()}
    later["input_ids"][:, -1] = (later["input_ids"][:, -1] + 1) % 40 + 3
    assert bool(((result(model, **later) - before)[:, 1:-1].abs().amax(-1) > 1e-4).all())


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_static_prompts_generate_alike_with_and_without_a_cache(name):
    model = strong(attach(build(name), {"static_prompts": {"length": 3}}))
    prompt = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = [model.generate(prompt, attention_mask=(prompt != 0).long(), use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*found)


# ---- learning
def texts(index: int) -> Experience:
    rows = [
        {"text": w * n + " " + w, "label": w}
        for w in ("abcd"[2 * index], "abcd"[2 * index + 1])
        for n in (2, 3, 5, 7, 9, 11)
    ]
    return Experience(index, f"e{index}", train=rows, test=rows)


def learner(model: nn.Module, method: Any, objective: Any = None, **more: Any) -> Learner:
    training = {"learning_rate": 1e-2, "head_learning_rate": 1e-2, "per_device_train_batch_size": 4, **more}
    objective = objective or {"classification": {"max_length": 32}}
    return Learner(
        model, ByteTokenizer(), method=method, objective=objective, training=training, protocol={"mask": "seen"}
    )


@pytest.mark.parametrize("name", ["GPT2Model", "GPT2LMHeadModel", "LlamaModel", "LlamaForCausalLM", "Qwen2Model"])
def test_a_decoder_classifies(name):
    """The whole text is given before anything is answered, so that pooling over it reads off nothing."""
    model = build(name, vocab_size=300)
    made = learner(model, {"rwf": {"length": 3}}, epochs=3)
    base = {k: v.clone() for k, v in made.frozen_base().items()}
    start = {n: p.detach().clone() for n, p in made.named_trainable() if n.startswith("method/")}
    for index in range(2):
        made.learn(texts(index))
    now = dict(made.named_trainable())
    assert len(start) == 2 * 5 and [n for n, p in start.items() if torch.equal(now[n], p)] == []
    assert all(torch.equal(v, base[k]) for k, v in made.frozen_base().items())
    strong(model, 4.0)
    rows = texts(0).test
    together = [made.forward(b).logits for b in made.batches(rows, unlabelled=True)][0]
    alone = torch.cat([made.forward(b).logits for row in rows for b in made.batches([row], unlabelled=True)])
    torch.testing.assert_close(together, alone, **CLOSE)  # padding of the batch takes no part
    made.detach()


@pytest.mark.parametrize("setting", [{"length": 0}, {"layers": []}])
def test_without_prompts_learning_is_that_of_the_head_alone(setting):
    """L = 0 and k = 0: features, and with them the head that is learnt, equal those of the frozen host."""
    logits = []
    for method in ({"rwf": setting}, {"rwf": {"length": 2}}, "linear_probe"):
        model = build("BertModel", vocab_size=300, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        made = learner(model, method)
        for index in range(2):
            made.learn(texts(index))
        logits.append(torch.cat([made.forward(b).logits for b in made.batches(texts(0).test, unlabelled=True)]))
    torch.testing.assert_close(logits[0], logits[2], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(logits[1], logits[2], atol=1e-4)


@pytest.mark.parametrize("field", [{"length": 0}, {"layers": []}])
def test_a_language_model_without_prompts_would_learn_nothing(field):
    with pytest.raises(BadInput, match=f"method.static_prompts.{next(iter(field))}: is .*nothing would be learnt"):
        learner(build("GPT2LMHeadModel", vocab_size=300), {"static_prompts": field}, {"causal_lm": {"block_size": 32}})


def test_runs_of_one_seed_start_alike():
    first, second = (learner(build("BertModel", vocab_size=300), "rwf").state_dict()[0] for _ in range(2))
    drawn = [name for name in first if name.endswith("W_Q")]
    assert len(drawn) == 2 and all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first[drawn[0]], first[drawn[1]])


def test_one_tower_of_two_learns_images():
    model = build("CLIPModel")
    processor = ImageProcessor(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    made = Learner(model, processor, method="rwf", objective={"classification": {"tower": "vision"}})
    assert [m.P.shape[1] for m in prompts(model)] == [48, 48]
    made.detach()


# ---- settings
def test_settings_that_cannot_be_honoured():
    for settings, message in (
        ({"train": []}, "train: .*at least 1"),
        ({"train": ["W_X"]}, "train"),
        ({"beta": 0.0, "train": ["P", "W_Q"]}, "beta 0 uses no query and no key, .* let the value or the output"),
        ({"beta": -1.0}, "beta"),
        ({"length": -1}, "length"),
    ):
        with pytest.raises(BadInput, match=message):
            build_methods({"rwf": settings})
    with pytest.raises(BadInput, match="method.rwf.heads: is 5, which does not divide the width 32"):
        attach(build("BertModel"), {"rwf": {"heads": 5}})


def test_mean_pooling_is_beta_0():
    model, fed = build("BertModel"), inputs("BertModel")
    strong(attach(model, {"rwf": {"length": 2, "beta": 0.0}}))
    caught: dict[str, torch.Tensor] = {}
    layer = prompts(model)[0]
    layer.register_forward_hook(lambda m, args, out: caught.update(x=args[0], z=out))
    result(model, **fed)
    mean = nn.functional.layer_norm(caught["x"], (WIDTH,)).mean(1, keepdim=True)
    torch.testing.assert_close(caught["z"], nn.functional.linear(mean, layer.W_O, layer.b_O).expand(-1, 2, -1), **CLOSE)


# ---- the control that reads at the end
def test_the_pooler_is_three_retrievals_added_to_every_real_token():
    torch.manual_seed(0)
    pooler = AttentionPooler(8, 4, 3, train=PARTS).double()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    read = sum(unit(tokens, mask).mean(1) for unit in pooler.units)
    assert read.abs().max() > 0
    added = Adding(pooler)(tokens, mask, None, Rest(0, False, 0, {}))
    assert torch.allclose(added - tokens, read[:, None].expand_as(tokens))
    cut = Adding(pooler)(tokens[1:, :3], None, None, Rest(0, False, 0, {}))
    assert torch.allclose(added[1:, :3], cut)  # a padded token is not read


def test_the_pooler_is_as_large_as_rwf():
    model = build("BertModel")
    sizes = {}
    for method in ({"rwf": {"length": 4, "layers": [0, 1]}}, {"attention_pooler": {"length": 4, "units": 2}}):
        attach(model, method)
        sizes[next(iter(method))] = sum(p.numel() for module in prompts(model) for p in module.parameters())
        detach(model)
    assert sizes["rwf"] == sizes["attention_pooler"] > 0


@pytest.mark.parametrize("name", DECODERS)
def test_the_pooler_does_not_look_ahead(name):
    with pytest.raises(BadInput, match="method.attention_pooler: retrieval pools over the whole text"):
        attach(build(name), "attention_pooler")


def test_the_pooler_wants_heads_that_divide():
    with pytest.raises(BadInput, match="method.attention_pooler.heads: is 5"):
        attach(build("BertModel"), {"attention_pooler": {"heads": 5}})
