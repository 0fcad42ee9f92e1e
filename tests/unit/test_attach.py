"""attach and detach on the user's own object, and the memory layer inside a host."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from hosts_tiny import WIDTH, Bias, build, inputs, result
from torch import nn

from perdure.attachment import attach, attachment, build_methods, detach
from perdure.errors import BadInput
from perdure.hosts import Host, Insertion
from perdure.layers import LinearMemory
from perdure.memory import RouterLog, observing
from perdure.methods import Method, MethodConfig
from perdure.registry import METHODS


class Adding(Method):
    """Adds a fixed matrix to every query."""

    class Config(MethodConfig):
        scale: float = 0.3

    adapts: ClassVar[bool] = True
    log: ClassVar[list[str]] = []

    def attach(self, host: Host) -> None:
        self.log.append(f"attach {self.name}")
        self.handles = [
            site.add(self.name, Bias(site.in_features, site.out_features, scale=self.config.scale))
            for site in host.sites("query")
        ]
        self.modules = {site.name: h.adapter for site, h in zip(host.sites("query"), self.handles, strict=True)}

    def detach(self, host: Host) -> None:
        self.log.append(f"detach {self.name}")
        for handle in self.handles:
            handle.remove()
        self.handles, self.modules = [], {}


class Prompting(Adding):
    """Inserts two tokens into the first block."""

    def attach(self, host: Host) -> None:
        self.log.append(f"attach {self.name}")

        def insert(hidden: torch.Tensor, mask: Any, positions: Any, rest: Any) -> Insertion:
            return Insertion(torch.cat((hidden.new_ones(len(hidden), 2, WIDTH), hidden), 1), 2)

        self.handles = [host.blocks()[0].add(self.name, insert)]


class Failing(Adding):
    """Puts something in and then fails."""

    def attach(self, host: Host) -> None:
        super().attach(host)
        raise BadInput("sites: nothing fits")


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    METHODS.names()
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    for name, cls in (("adding_test", Adding), ("prompting_test", Prompting), ("failing_test", Failing)):
        METHODS.register(name)(cls)
    Adding.log.clear()


def test_attach_returns_the_same_object_and_detach_restores_it():
    model, fed = build("BertForSequenceClassification"), inputs("BertModel")
    plain, state = result(model, **fed), {k: v.clone() for k, v in model.state_dict().items()}
    same = [id(p) for p in model.parameters()]
    assert attach(model, ["prompting_test", {"adding_test": {"scale": 0.5}}]) is model
    there = attachment(model)
    assert there is not None and [m.name for m in there.methods] == ["prompting_test", "adding_test"]
    assert there.methods[1].config.scale == 0.5 and not any("_perdure" in key for key in model.state_dict())
    assert not torch.allclose(result(model, **fed), plain, atol=1e-4)
    assert detach(model) is model and attachment(model) is None and not hasattr(model, "_perdure")
    assert Adding.log == ["attach prompting_test", "attach adding_test", "detach adding_test", "detach prompting_test"]
    assert torch.equal(result(model, **fed), plain) and [id(p) for p in model.parameters()] == same
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    attach(model, "adding_test")  # repeatable
    detach(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["moram", "apn", "lora", "moe_adapters", "rwf"])
def test_what_is_attached_is_in_the_mode_of_the_model(method, training):
    model = build("BertModel").train(training)
    there = set(model.modules())
    attach(model, method)
    brought = {module for module in model.modules() if module not in there}
    brought |= {
        module for each in attachment(model).methods for top in each.modules.values() for module in top.modules()
    }
    assert brought and {module.training for module in brought} == {training}


def test_forms_of_a_method():
    mine = Adding(Adding.Config(scale=0.1))
    built = build_methods([mine, "adding_test", {"adding_test": {"scale": 0.2}}])
    assert built[0] is mine and [m.config.scale for m in built] == [0.1, 0.3, 0.2]
    for wrong, message in (
        ("adding_tset", "did you mean adding_test"),
        ({"adding_test": {"scle": 1}}, r"method.adding_test.scle: unknown key"),
        ([], "is empty"),
        (Adding, "the class Adding"),
        ([mine, mine], "twice"),
        (3, "expected a name"),
    ):
        with pytest.raises(BadInput, match=message):
            build_methods(wrong)


def test_misuse_leaves_the_model_as_it_was():
    model, fed = build("BertModel"), inputs("BertModel")
    with pytest.raises(BadInput, match="nothing is attached"):
        detach(model)
    attach(model, "adding_test")
    once = result(model, **fed)
    with pytest.raises(BadInput, match="adding_test is attached already; call `detach` first"):
        attach(model, "prompting_test")
    assert torch.equal(result(model, **fed), once)
    detach(model)
    own = Host(model).sites("value")[0].add("users", Bias(WIDTH, WIDTH))
    plain = result(model, **fed)
    with pytest.raises(BadInput, match="sites: nothing fits"):
        attach(model, ["prompting_test", "adding_test", "failing_test"])
    assert attachment(model) is None and len(Host(model).attached()) == 1  # the user's own adapter stays
    assert torch.equal(result(model, **fed), plain)
    own.remove()
    with pytest.raises(BadInput, match="expected a torch.nn.Module"):
        attach("bert", "adding_test")  # type: ignore[type-var]


def test_a_deep_copy_is_attached_for_itself():
    class Loop:
        def __deepcopy__(self, memo):
            raise AssertionError("the loop must not be copied")

    model, fed = build("GPT2LMHeadModel"), inputs("GPT2LMHeadModel")
    plain = result(model, **fed)
    method: Any = Adding(Adding.Config())
    method.loop = Loop()
    attach(model, [method, "prompting_test"])
    changed = result(model, **fed)
    twin = copy.deepcopy(model)
    there = attachment(twin)
    assert there is not None and there.host.model is twin and there.methods[0] is not method
    assert there.methods[0].loop is method.loop
    detach(twin)
    assert torch.equal(result(twin, **fed), plain) and torch.equal(result(model, **fed), changed)
    detach(model)
    assert torch.equal(result(model, **fed), plain)


def test_generate_works_while_attached():
    model = attach(build("LlamaForCausalLM"), ["adding_test", "prompting_test"])
    prompt: dict[str, Any] = {"input_ids": torch.tensor([[7, 8, 9, 10]]), "attention_mask": torch.ones(1, 4).long()}
    prompt |= {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out: Any = model.generate(**prompt)  # type: ignore[operator]
    assert out.shape == (1, 10) and torch.equal(out, model.generate(**prompt, use_cache=False))  # type: ignore[operator]
    assert not torch.equal(out, detach(model).generate(**prompt))  # type: ignore[operator]


def test_importing_attach_loads_no_torch():
    code = "import sys, perdure.attachment; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_importing_hosts_and_layers_loads_no_transformers():
    code = "import sys, perdure.hosts, perdure.layers; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# ---- the memory layer
def memory(**settings) -> LinearMemory:
    layer = LinearMemory(3, 2, **{"k": 2, "tau": 0.1, "delta": 0.2, **settings})
    layer.bank.load_state_dict(
        {
            "frozen_keys": torch.tensor([[1.0, 0, 0], [0, 1, 0]]), "frozen_values": torch.tensor([[1.0, 0], [0, 1]]),
            "new_keys": torch.tensor([[0.6, 0.8, 0], [-1, 0, 0]]), "new_values": torch.tensor([[1.0, 1], [2, 0]]),
            "owners": torch.tensor([0, 0, 1, 1]), "usage": torch.zeros(4, dtype=torch.float64),
        }
    )  # fmt: skip
    return layer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, (3.930764, 4.786153)), ({"delta": 0.6}, (3.930764, 3.930764)), ({"k": 4, "delta": 0}, (3.879377, 4.522946))],
)
def test_golden_vectors_through_the_layer(settings, expected):
    x = torch.tensor([[3.0, 4.0, 0.0]])
    layer = memory(**settings).eval()
    torch.testing.assert_close(layer(x), torch.tensor([expected]), atol=1e-5, rtol=0)
    # delta belongs to evaluation: in training the same layer gives what it gives without a threshold.
    open_ = memory(**{**settings, "delta": None}).eval()(x)
    torch.testing.assert_close(layer.train()(x), open_)


def test_the_threshold_falls_with_the_number_of_atoms_it_competes_among():
    x = torch.tensor([[3.0, 4.0, 0.0]])
    strict = memory(delta=0.8).eval()  # scores .63 and .5: silent
    assert torch.equal(strict(x), torch.zeros(1, 2))
    for atoms, delta in ((4, 0.8), (9, 0.8), (1, 0.4)):  # 4 atoms compete: 0.8 sqrt(atoms / 4), at most 0.8
        layer = memory(delta=0.8, delta_atoms=atoms).eval()
        assert layer.threshold(4) == pytest.approx(delta)
        assert torch.equal(layer(x), memory(delta=delta).eval()(x))
    layer = memory(delta=0.8, delta_atoms=1).eval()
    before = layer(x)
    layer.grow(96, owner=2)  # never trained: they do not compete, and do not count
    assert torch.equal(layer(x), before) and bool((before != 0).all())
    assert memory(delta=None, delta_atoms=1).threshold(4) is None and memory(delta=0.8).threshold(10**6) == 0.8


def test_empty_atoms_take_no_part_in_evaluation_but_do_in_training():
    x = torch.tensor([[3.0, 4.0, 0.0]])
    layer = memory(k=8).eval()
    before = layer(x)
    layer.grow(5, owner=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), before) and layer.bank.frozen_size == 4
    assert not torch.allclose(layer.train()(x), before)
    layer.eval()
    log = RouterLog()
    with torch.no_grad(), observing(log):
        layer(x)
        assert torch.equal(layer(x), before)  # the view is found once
    assert log.summary()[""]["items"] == 9 and float(log.usage("")[4:].sum()) == 0
    with torch.no_grad():
        layer.bank.new_values[2] = 1.0  # in place, as an optimizer does
        layer.bank.new_keys[2] = torch.tensor([3.0, 4.0, 0.0])
        log.reset()
        with observing(log):
            assert not torch.allclose(layer(x), before)
    assert int(log.usage("").argmax()) == 6  # numbered as in the bank, not as in the view
    fresh = LinearMemory(3, 2).eval()
    fresh.grow(4, owner=0)
    assert torch.equal(fresh(x), torch.zeros(1, 2)) and torch.equal(LinearMemory(3, 2)(x), torch.zeros(1, 2))


def test_scale_is_folded_when_atoms_freeze():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    layer = memory(scale=2.0).eval()
    before = layer(x)
    assert not torch.allclose(before, memory().eval()(x))
    layer.freeze()
    torch.testing.assert_close(layer(x), before)
    assert layer.bank.new_size == 0 and layer.bank.frozen_size == 4


def test_dropout_only_in_training_and_report_under_the_site_name():
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    layer = memory(dropout=0.5, site="3.query")
    torch.manual_seed(0)
    assert not torch.allclose(layer(x), memory()(x))
    plain = memory().eval()(x)
    log = RouterLog(mask=torch.ones(4, 6, dtype=torch.bool))
    with observing(log):
        torch.testing.assert_close(layer.eval()(x), plain)
    assert log.sites == ["3.query"] and log.summary()["3.query"]["tokens"] == 24


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"tau": 0.0}, {"dropout": 1.0}, {"eps": 0.0}, {"min_k": 0}, {"delta_atoms": 0}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(BadInput, match=f"{next(iter(wrong))}: found"):
        LinearMemory(3, 2, **wrong)


@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel", "LlamaForCausalLM", "ViTModel"])
def test_memory_in_a_host(name):
    model, fed = build(name).requires_grad_(False), inputs(name)
    plain = result(model, **fed)
    sites = Host(model).sites()
    layers = [LinearMemory(s.in_features, s.out_features, site=s.name, k=4, delta=0.0) for s in sites]
    for number, (site, layer) in enumerate(zip(sites, layers, strict=True)):
        layer.grow(4, owner=0, generator=torch.Generator().manual_seed(number))
        site.add("memory", layer)
    assert torch.equal(result(model, **fed), plain)
    log = RouterLog()
    with observing(log):
        result(model.train(), **fed)
    assert sorted(log.sites) == sorted(s.name for s in sites)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=1.0)
    for _ in range(2):
        output: Any = model(**fed)
        states = output.logits if "logits" in output else output.last_hidden_state
        # Not a norm of the states: the last LayerNorm makes that constant.
        (states * torch.linspace(-1, 1, states.shape[-1])).mean().backward()
        optimizer.step()
    assert all(p.grad is None for n, p in model.named_parameters() if "perdure_" not in n)
    moved = [float(layer.bank.new_values.detach().abs().max()) for layer in layers]
    assert all(m > 0 for m in moved)
    assert not torch.allclose(result(model.eval(), **fed), plain, atol=1e-6)
    twin = copy.deepcopy(model)
    changed = result(model, **fed)
    for module in twin.modules():
        if isinstance(module, LinearMemory):
            module.bank.new_values.data.zero_()
    assert torch.equal(result(twin, **fed), plain) and torch.equal(result(model, **fed), changed)


def test_memory_under_autocast_keeps_float32_parameters():
    model, fed = build("BertModel").requires_grad_(False), inputs("BertModel")
    site = Host(model).sites("query")[0]
    layer = LinearMemory(WIDTH, WIDTH, k=4)
    layer.grow(4, owner=0)
    site.add("memory", layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(**fed).last_hidden_state.float().square().mean().backward()
    assert layer.bank.new_values.grad is not None and layer.bank.new_values.grad.dtype == torch.float32
    assert isinstance(model, nn.Module) and bool(layer.bank.new_values.grad.abs().max() > 0)
