"""Roles, sites and handles on every family."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts_tiny import DEPTH, MODELS, WIDTH, Bias, build, inputs, result
from torch import nn

from perdure.errors import BadInput
from perdure.hosts import Handle, Host, Site

PLAIN = {"query", "key", "value", "attention_output", "ffn_in", "ffn_out"}
GATED = PLAIN | {"ffn_gate"}
DECODERS = [m for m in MODELS if m.endswith(("CausalLM", "LMHeadModel"))]


def family_of(name: str) -> str:
    return MODELS[name].split("_")[0]


@pytest.mark.parametrize("name", [m for m in MODELS if m != "CLIPModel"])
def test_every_family_has_its_roles(name):
    host = Host(build(name))
    gated = family_of(name) in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
    assert (host.family, host.width, host.depth) == (family_of(name), WIDTH, DEPTH)
    sites = host.sites()
    roles = GATED if gated else PLAIN
    assert [(s.layer, s.role) for s in sites] == [
        (layer, role)
        for layer in range(DEPTH)
        for role in ("query", "key", "value", "attention_output", "ffn_in", "ffn_gate", "ffn_out")
        if role in roles
    ]
    assert len({s.name for s in sites}) == len(sites) and sites[0].name == "0.query"
    by_name = {s.name: s for s in sites}
    narrow = 16 if gated else WIDTH  # two key-value heads of width 8
    inner = 128 if family_of(name) in ("gpt2", "dinov2") else 64
    shapes = {"query": (32, 32), "key": (32, narrow), "value": (32, narrow), "attention_output": (32, 32)}
    shapes |= {"ffn_in": (32, inner), "ffn_gate": (32, inner), "ffn_out": (inner, 32)}
    for role in roles:
        site = by_name[f"1.{role}"]
        assert (site.in_features, site.out_features) == shapes[role]
        assert site.weight().shape == (site.out_features, site.in_features)
        assert site.transposed == (family_of(name) == "gpt2")
        assert host.model.get_submodule(site.path) is site.module
    assert [b.layer for b in host.blocks()] == list(range(DEPTH))
    assert all(host.model.get_submodule(b.path) is b.module for b in host.blocks())


def test_clip_has_two_towers():
    host = Host(build("CLIPModel"))
    assert host.family == "clip" and list(host.towers) == ["vision", "text"]
    assert (host.towers["vision"].width, host.towers["text"].width, host.depth) == (48, 32, 2)
    assert len(host.sites()) == 24 and host.sites()[0].name == "vision.0.query"
    assert {s.tower for s in host.sites(tower="text")} == {"text"}
    assert [b.name for b in host.blocks("text")] == ["text.0", "text.1"]
    assert [b.causal for b in host.blocks()] == [False, False, True, True]
    assert (host.pool_default("vision"), host.pool_default("text")) == ("cls", "last")
    with pytest.raises(BadInput, match="width.*vision: 48.*text: 32"):
        _ = host.width
    with pytest.raises(BadInput, match="name one"):
        host.pool_default()
    with pytest.raises(BadInput, match="audio.*vision"):
        host.sites(tower="audio")


@pytest.mark.parametrize(
    ("name", "pool"),
    [("BertForSequenceClassification", "mean"), ("ViTModel", "cls"), ("CLIPVisionModel", "cls"),
     ("CLIPTextModel", "last"), ("GPT2LMHeadModel", "last"), ("LlamaModel", "last"),
     ("Gemma3TextModel", "last"), ("Dinov2Model", "cls")],
)  # fmt: skip
def test_pooling(name, pool):
    assert Host(build(name)).pool_default() == pool


def test_selection_and_its_errors():
    host = Host(build("BertForSequenceClassification"))
    assert len(host.sites("attention")) == 8 and len(host.sites("ffn")) == 4
    assert [s.name for s in host.sites(["value", "query"], layers=[-1])] == ["1.query", "1.value"]
    assert [s.name for s in host.sites("re:.*attention.output.dense$")] == ["0.attention_output", "1.attention_output"]
    assert [s.path for s in host.sites("re:classifier")] == ["classifier"]
    with pytest.raises(BadInput, match=r"roles: 'querry' is unknown.*query \(2\)"):
        host.sites("querry")
    with pytest.raises(BadInput, match="'ffn_gate' fits nothing.*found roles"):
        host.sites("ffn_gate")
    with pytest.raises(BadInput, match="fits nothing.*re:.*q_proj"):
        host.sites("re:.*q_proj$")
    with pytest.raises(BadInput, match="not a regular expression"):
        host.sites("re:(")
    with pytest.raises(BadInput, match="layers: 5 is out of range.*2 blocks"):
        host.sites(layers=[5])


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.mixer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mixer(self.q_proj(x))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
        self.trunk = nn.ModuleList([ToyBlock() for _ in range(3)])

    def forward(self, x):
        for block in self.trunk:
            x = block(x)
        return x


def test_unknown_models_fall_back_to_patterns():
    host = Host(Toy())
    assert (host.family, host.depth, host.width, host.pool_default()) == ("toy", 3, 8, "mean")
    assert [s.name for s in host.sites()] == ["0.query", "1.query", "2.query"]
    assert [s.name for s in host.sites("other", layers=[1])] == ["1.mixer"]
    assert [s.path for s in host.sites("re:trunk.2")] == ["trunk.2.q_proj", "trunk.2.mixer"]
    with pytest.raises(BadInput, match=r"'value' fits nothing.*query \(3\); other linear maps:.*mixer"):
        host.sites("value")
    flat = Host(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert [s.path for s in flat.sites("re:.*")] == ["0", "2"]
    with pytest.raises(BadInput, match="no list of blocks"):
        flat.blocks()


def test_refused_models():
    with pytest.raises(BadInput, match="torch.nn.Module"):
        Host("bert-base-uncased")  # type: ignore[arg-type]

    class DistributedDataParallel(nn.Module):
        pass

    with pytest.raises(BadInput, match="model.module"):
        Host(DistributedDataParallel())


@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel", "Qwen2ForCausalLM", "CLIPModel", "ViTModel"])
def test_adding_a_matrix_equals_adding_it_to_the_weight(name):
    host, reference = Host(build(name)), Host(build(name))
    for number, (site, other) in enumerate(zip(host.sites(), reference.sites(), strict=True)):
        adapter = Bias(site.in_features, site.out_features, seed=number)
        site.add("test", adapter)
        delta = adapter.weight.detach()
        weight = other.module.weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            rows = weight.t() if other.transposed else weight
            rows[slice(*other.out_slice) if other.out_slice else slice(None)] += delta
        assert torch.equal(other.weight(), site.weight() + delta)
    before = result(build(name), **inputs(name))
    added, written = result(host.model, **inputs(name)), result(reference.model, **inputs(name))
    assert (before - written).abs().max() > 1e-2
    torch.testing.assert_close(added, written, atol=2e-5, rtol=1e-4)


def test_fused_projection_slices():
    host = Host(build("GPT2Model"))
    slices = {s.role: s.out_slice for s in host.sites("attention", layers=[0])}
    assert slices == {"query": (0, 32), "key": (32, 64), "value": (64, 96), "attention_output": None}
    site = host.sites("key", layers=[0])[0]
    x = torch.randn(2, 3, WIDTH)
    before = site.module(x)
    adapter = Bias(WIDTH, WIDTH)
    site.add("k", adapter)
    after = site.module(x)
    assert torch.equal(after[..., :32], before[..., :32]) and torch.equal(after[..., 64:], before[..., 64:])
    assert torch.equal(after[..., 32:64], before[..., 32:64] + adapter(x))


@pytest.mark.parametrize("between", [False, True], ids=["alone", "a hook between"])
@pytest.mark.parametrize(
    "roles", [["query", "key", "value"], ["value", "query"], ["key", "key", "query"]], ids=["all", "gap", "twice"]
)
def test_slices_of_one_map_add_up(roles, between):
    host = Host(build("GPT2Model"))
    sites = {site.role: site for site in host.sites("attention", layers=[0])}
    module = sites["key"].module
    x = torch.randn(2, 3, WIDTH)
    expected, seen = module(x).clone(), []
    for number, role in enumerate(roles):
        adapter = Bias(WIDTH, WIDTH, seed=number)
        sites[role].add(f"a{number}", adapter)
        expected[..., slice(*sites[role].out_slice)] += adapter(x)
        if between and not seen:
            seen.append(None)
            module.register_forward_hook(lambda module, args, output: seen.append(output.clone()) or output * 2)
            expected *= 2
    torch.testing.assert_close(module(x), expected)
    assert len(seen) == 2 * between


def snapshot(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (id(t), t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors}


@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel", "LlamaForCausalLM", "CLIPModel"])
def test_removing_restores_everything(name):
    model = build(name)
    host = Host(model)
    before, keys = snapshot(model), list(model.state_dict())
    hooks = [len(m._forward_hooks) for m in model.modules()]
    output = result(model, **inputs(name))
    handles = [site.add("a", Bias(site.in_features, site.out_features)) for site in host.sites()]
    assert not torch.equal(output, result(model, **inputs(name)))
    assert len(host.attached()) == len(handles)
    for handle in handles:
        handle.remove()
        handle.remove()
    assert snapshot(model) == before and list(model.state_dict()) == keys and host.attached() == []
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(output, result(model, **inputs(name)))
    with pytest.raises(BadInput, match="was removed"):
        _ = handles[0].adapter


def test_stacking_keys_and_errors():
    host = Host(build("BertModel"))
    site = host.sites("query")[0]
    order = []

    class Note(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            order.append(self.label)
            return torch.ones(*x.shape[:-1], WIDTH)

    x = torch.randn(1, 2, WIDTH)
    before = site.module(x)
    first = site.add("one", Note("one"))
    site.add("two", Note("two"))
    torch.testing.assert_close(site.module(x), before + 2)
    assert order == ["one", "two"] and isinstance(first, Handle) and isinstance(site, Site)
    with pytest.raises(BadInput, match="'0.query'.*'one' is there already"):
        site.add("one", Note("again"))
    with pytest.raises(BadInput, match="'a.b' cannot name"):
        site.add("a.b", Note("x"))
    first.remove()
    torch.testing.assert_close(site.module(x), before + 1)


def test_a_deep_copy_is_independent():
    model = build("GPT2LMHeadModel")
    handles = [s.add("a", Bias(s.in_features, s.out_features)) for s in Host(model).sites("attention")]
    model.handles = handles  # type: ignore[assignment]
    twin = copy.deepcopy(model)
    fed = inputs("GPT2LMHeadModel")
    before = result(model, **fed)
    assert torch.equal(result(twin, **fed), before)
    for handle in twin.handles:  # type: ignore[union-attr]
        with torch.no_grad():
            handle.adapter.weight.zero_()
    assert torch.equal(result(model, **fed), before)
    assert torch.equal(result(twin, **fed), result(build("GPT2LMHeadModel"), **fed))
    for handle in twin.handles:  # type: ignore[union-attr]
        handle.remove()
    assert Host(twin).attached() == [] and len(Host(model).attached()) == len(handles)


def test_gradient_reaches_only_the_adapters():
    model = build("LlamaForCausalLM").requires_grad_(False)
    handles = [s.add("a", Bias(s.in_features, s.out_features)) for s in Host(model).sites()]
    model(**inputs("LlamaForCausalLM")).logits.square().mean().backward()
    mine = {id(h.adapter.weight) for h in handles}
    for parameter in model.parameters():
        if id(parameter) in mine:
            assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        else:
            assert parameter.grad is None


def generate(model: nn.Module, **settings) -> list[list[int]]:
    prompt = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(prompt, attention_mask=(prompt != 0).long(), **settings).tolist()  # type: ignore[operator]


@pytest.mark.parametrize("name", DECODERS)
def test_generate_with_and_without_a_cache(name):
    plain = generate(build(name))
    model = build(name)
    host = Host(model)
    handles = [s.add("a", Bias(s.in_features, s.out_features, scale=0.0)) for s in host.sites()]
    assert generate(model) == plain == generate(model, use_cache=False)
    for handle in handles:
        handle.remove()
    for number, site in enumerate(host.sites()):
        site.add("a", Bias(site.in_features, site.out_features, seed=number))
    changed = generate(model)
    assert changed != plain and changed == generate(model, use_cache=False)


def test_low_precision_host_keeps_its_type():
    model = build("BertModel").to(torch.bfloat16)
    site = Host(model).sites("query")[0]
    site.add("a", nn.Sequential(Cast(), Bias(WIDTH, WIDTH)))
    assert site.module(torch.randn(1, 2, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert result(model, **inputs("BertModel")).dtype == torch.bfloat16


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


def test_tied_and_quantised_weights_are_named():
    model = build("GPT2LMHeadModel")
    head = Host(model).sites("re:lm_head")[0]
    assert head.tied == ("transformer.wte",)
    with pytest.raises(BadInput, match="lm_head.*merging.*also change transformer.wte"):
        head.parameter("merging")
    free = Host(model).sites("ffn_in")[0]
    assert free.parameter("merging") is free.module.weight
    before = head.module(torch.ones(1, WIDTH))
    head.add("a", nn.Linear(WIDTH, head.out_features))
    assert head.module(torch.ones(1, WIDTH)).shape == before.shape
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    site = Host(nn.Sequential(quantised)).sites("re:.*")[0]
    with pytest.raises(BadInput, match="merging needs a floating-point weight.*int8"):
        site.parameter("merging")
    with pytest.raises(BadInput, match="needs the weight in memory.*meta"):
        Host(nn.Sequential(nn.Linear(2, 2, device="meta"))).sites("re:.*")[0].weight("merging")


def test_peft_layers_are_sites_and_their_parts_are_not():
    from peft import LoraConfig, inject_adapter_in_model

    model = build("LlamaForCausalLM")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    host = Host(model)
    assert [s.name for s in host.sites("query")] == ["0.query", "1.query"] and len(host.sites()) == 14
    site = host.sites("query")[0]
    assert (site.in_features, site.out_features, site.weight().shape) == (32, 32, (32, 32))
    fed = inputs("LlamaForCausalLM")
    before = result(model, **fed)
    handle = site.add("a", Bias(WIDTH, WIDTH))
    assert not torch.equal(result(model, **fed), before)
    handle.remove()
    assert torch.equal(result(model, **fed), before)


def test_adapters_are_not_taken_for_parts_of_the_host():
    model = build("BertModel")
    sites = Host(model).sites()
    sites[0].add("a", nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)))
    assert [s.path for s in Host(model).sites("re:.*")] == [s.path for s in Host(build("BertModel")).sites("re:.*")]
