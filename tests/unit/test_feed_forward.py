"""The feed-forward of every family: found, added to, replaced, given back."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hosts_tiny import DEPTH, MODELS, WIDTH, Bias, build, inputs, result
from torch import nn

from perdure.errors import BadInput
from perdure.hosts import Host
from perdure.hosts.sites import Hook

ONE_TOWER = [m for m in MODELS if m != "CLIPModel"]
PAIRS = ("bert", "roberta")
"""Families whose feed-forward is no module of its own."""


class Spy(nn.Module):
    """Remembers its input and answers with a constant."""

    def __init__(self, width: int, value: float = 0.0):
        super().__init__()
        self.value = nn.Parameter(torch.full((width,), value))
        self.seen: torch.Tensor | None = None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.seen = z.detach().clone()
        return self.value.expand(z.shape)


def our_hooks(model: nn.Module) -> list[Any]:
    every = [
        hook for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks.values()
    ]
    return [hook for hook in every if isinstance(hook, Hook)]


def entry_inputs(host: Host) -> tuple[list[torch.Tensor], list[Any]]:
    """What each ffn_in map gets, in the next forward pass."""
    seen: list[torch.Tensor] = []
    hooks = [s.module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for s in host.sites("ffn_in")]
    return seen, hooks


@pytest.mark.parametrize("name", ONE_TOWER)
def test_beside_adds_to_the_output_and_sees_the_input(name: str) -> None:
    model, given = build(name), inputs(name)
    host, before, state = Host(model), result(model, **given), list(model.state_dict())
    places = host.feed_forwards()
    assert [(p.name, p.layer, p.in_features, p.out_features) for p in places] == [
        (f"{layer}.ffn", layer, WIDTH, WIDTH) for layer in range(DEPTH)
    ]
    assert all((p.entry != p.exit) == (MODELS[name] in PAIRS) for p in places)
    spies = [Spy(WIDTH) for _ in places]
    handles = [place.add("spy", spy) for place, spy in zip(places, spies, strict=True)]
    seen, hooks = entry_inputs(host)
    assert torch.equal(result(model, **given), before)  # adds zero
    for spy, z in zip(spies, seen, strict=True):
        assert spy.seen is not None and torch.equal(spy.seen, z)
    for hook in hooks:
        hook.remove()
    assert len(our_hooks(model)) == DEPTH * (1 + (MODELS[name] in PAIRS))
    with torch.no_grad():
        spies[1].value.copy_(torch.linspace(-1, 1, WIDTH))
    assert not torch.equal(result(model, **given), before)
    for handle in handles:
        handle.remove()
        handle.remove()
    assert torch.equal(result(model, **given), before) and list(model.state_dict()) == state
    assert host.attached() == [] and not our_hooks(model)


@pytest.mark.parametrize("name", ONE_TOWER)
def test_a_replacement_stands_where_the_feed_forward_stood(name: str) -> None:
    """Replaced by a layer that does what the original does, nothing changes; and the original comes back."""
    model, given = build(name), inputs(name)
    host, before = Host(model), result(model, **given)
    original, sites = {**model.state_dict()}, [s.name for s in host.sites()]
    places = host.feed_forwards()

    class Same(nn.Module):
        """The original feed-forward from the input to the output of its last map or of its module."""

        def __init__(self, place: Any):
            super().__init__()
            self.parts = (model.get_submodule(place.entry), model.get_submodule(place.exit))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            first, last = self.parts
            return first(z) if first is last else last(first(z))

    replacements = [place.replace(Same(place)) for place in places]
    assert torch.allclose(result(model, **given), before, atol=1e-6)
    assert {s.role for s in host.sites()} == {"query", "key", "value", "attention_output"}
    with pytest.raises(BadInput, match="ffn_in"):
        host.sites("ffn_in")
    assert not [n for n, _ in model.named_parameters() if any(n.startswith(f"{p.exit}.") for p in places)]
    for replacement in reversed(replacements):
        replacement.remove()
    assert torch.equal(result(model, **given), before) and [s.name for s in host.sites()] == sites
    after = model.state_dict()
    assert list(after) == list(original) and all(torch.equal(after[n], original[n]) for n in original)

    other = host.feed_forwards()[0].replace(Bias(WIDTH, WIDTH))
    assert not torch.allclose(result(model, **given), before, atol=1e-3)
    other.remove()
    assert torch.equal(result(model, **given), before)


def test_two_towers() -> None:
    host = Host(build("CLIPModel"))
    assert [p.name for p in host.feed_forwards()] == ["vision.0.ffn", "vision.1.ffn", "text.0.ffn", "text.1.ffn"]
    assert [(p.name, p.in_features) for p in host.feed_forwards([-1], "vision")] == [("vision.1.ffn", 48)]
    with pytest.raises(BadInput, match="layers: 7 is out of range"):
        host.feed_forwards([7])


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_copies_checkpointing_and_stripping(name: str) -> None:
    model, given = build(name), inputs(name)
    host, before = Host(model), result(model, **given)
    for place in host.feed_forwards():
        place.add("one", Bias(WIDTH, WIDTH, seed=1))
        place.add("two", Bias(WIDTH, WIDTH, seed=2))
        with pytest.raises(BadInput, match=r"'\d.ffn': an adapter with key 'one' is there already"):
            place.add("one", Spy(WIDTH))
    changed = result(model, **given)
    assert not torch.equal(changed, before)
    twin = copy.deepcopy(model)
    assert torch.equal(result(twin, **given), changed)
    with torch.no_grad():
        for parameter_name, parameter in twin.named_parameters():
            if "perdure_one" in parameter_name:
                parameter.zero_()
    assert not torch.equal(result(twin, **given), changed) and torch.equal(result(model, **given), changed)

    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(0)
        model(**given)[0].square().sum().backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters() if "perdure" in n and p.grad is not None])
    assert len(grads[0]) == 2 * DEPTH
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))
    model.eval()
    host.strip()
    assert torch.equal(result(model, **given), before) and host.attached() == []
    assert not our_hooks(model)


def test_threads_do_not_mix() -> None:
    model, many = build("BertModel"), [inputs("BertModel", seed=seed) for seed in range(6)]
    for place in Host(model).feed_forwards():
        place.add("one", Bias(WIDTH, WIDTH, seed=1))
    expected = [result(model, **given) for given in many]
    found: dict[int, list[torch.Tensor]] = {n: [] for n in range(6)}

    def work(number: int) -> None:
        found[number] = [result(model, **many[number]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found[n]) == 5 and all(torch.equal(x, expected[n]) for x in found[n]) for n in range(6))


class LooseBlock(nn.Module):
    """Both maps stand in the block itself, the activation between them."""

    def __init__(self, experts: int = 1):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        if experts == 1:
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        else:
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)}) for _ in range(experts)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.q_proj(x)
        return x + self.fc2(torch.relu(self.fc1(x)))


def test_what_cannot_be_replaced_is_refused_and_can_be_added_to() -> None:
    model = nn.Sequential(*[LooseBlock() for _ in range(2)])
    host, x = Host(model), torch.randn(3, 8)
    place = host.feed_forwards()[1]
    assert (place.entry, place.exit) == ("1.fc1", "1.fc2")
    with pytest.raises(BadInput, match=r"'1.ffn': cannot be replaced.*add beside it"):
        place.replace(nn.Identity())
    before = model(x)
    adapter = Bias(8, 8)
    handle = place.add("one", adapter)
    z = model[0](x)
    z = z + model[1].q_proj(z)
    assert torch.allclose(model(x), before + adapter(z), atol=1e-6)
    handle.remove()
    assert torch.equal(model(x), before)
    with pytest.raises(BadInput, match=r"2 maps into a feed-forward and 2 out"):
        Host(nn.Sequential(*[LooseBlock(experts=2) for _ in range(2)])).feed_forwards()
