"""APN on hosts: what moves and what does not, what trains, pretraining, state, the routing log."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from loop_methods import build, copied, differences

from perdure.attachment import attach, detach
from perdure.errors import BadInput, ProtocolRefused
from perdure.learner import Learner
from perdure.streams import Experience
from tests.conformance import cases

SMALL: dict[str, Any] = {"patches": 40, "top_k": 2, "rank": 3}


def apn(**settings: Any) -> dict[str, Any]:
    return {"apn": {**SMALL, **settings}}


def rows(text: str, count: int) -> list[dict[str, str]]:
    return [{"text": text + "abcdefgh"[n % 8]} for n in range(count)]


def domain(index: int, text: str, count: int = 4, last: bool = False) -> Experience:
    return Experience(index, text, train=rows(text, count), test=rows(text, 2), last=last)


def patch_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    layers = learner.methods[0].modules.items()
    return {f"{site}.{n}": p.detach().clone() for site, layer in layers for n, p in layer.named_parameters()}


# ---- a patch that no token visited does not move by one bit
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_unvisited_patches_stay_under_momentum_and_decay(optimizer: str) -> None:
    """The second domain is another than the first, so patches that have momentum from the first step fall silent."""
    learner = build(
        apn(place="replace", train="patches+prototypes"), "gpt2", optimizer=optimizer, weight_decay=0.5,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=1.0, epochs=2,
    )  # fmt: skip
    moments: list[dict[str, torch.Tensor]] = []
    visited: list[dict[str, torch.Tensor]] = []
    learner._optimize_anew()
    layers = learner.methods[0].modules

    def hold() -> dict[str, torch.Tensor]:
        state = learner.optimization.kinds[optimizer].state  # type: ignore[union-attr]
        return {
            f"{site}.{n}/{key}": value.clone()
            for site, layer in layers.items()
            for n, p in layer.named_parameters()
            for key, value in {"value": p.detach(), **state.get(p, {})}.items()
        }

    def see(site: str) -> Any:
        def hook(layer: Any, args: Any, output: Any) -> None:
            from perdure.memory import cosine, select

            found = select(cosine(args[0].reshape(-1, args[0].shape[-1]), layer.prototypes), layer.k)
            visited[-1][site] = visited[-1][site] | (torch.bincount(found.flatten(), minlength=40) > 0)

        return hook

    hooks = [layer.register_forward_hook(see(site)) for site, layer in layers.items()]
    none = {site: torch.zeros(40, dtype=torch.bool) for site in layers}
    visited.append(dict(none))
    moments.append(hold())

    def on_step(*_: Any) -> None:
        moments.append(hold())
        visited.append(dict(none))

    learner.learn(domain(0, "aaaa", 8), on_step=on_step)
    learner.learn(domain(1, "zyxw", 8), on_step=on_step)
    for hook in hooks:
        hook.remove()
    waited = moved = had_momentum = 0
    for step, seen in enumerate(visited[:-1]):
        for name, before in moments[step].items():
            (layer, tensor), key = name.split("/")[0].rsplit(".", 1), name.split("/")[1]
            if tensor == "code":
                continue
            after = moments[step + 1][name]
            still = ~seen[layer]
            if key != "value" and step == 4:  # the optimizer is fresh at a boundary
                continue
            assert torch.equal(after[still], before[still]), (name, step)
            if key == "value":
                waited += int(still.sum())
                moved += int((after[seen[layer]] != before[seen[layer]]).flatten(1).any(1).sum())
            if key == "exp_avg":
                had_momentum += int((before[still] != 0).flatten(1).any(1).sum())
    assert waited > 100 and moved > 100
    assert had_momentum > 0 or optimizer == "sgd"


def test_as_released_adamw_moves_patches_that_nobody_visited() -> None:
    for row_wise in (True, False):
        learner = build(apn(place="replace", row_wise=row_wise), "gpt2", weight_decay=0.5, epochs=1)
        before = patch_tensors(learner)
        learner.learn(domain(0, "aaaa"))
        after = patch_tensors(learner)
        still = [(after[n] == before[n]).flatten(1).all(1) for n in before if n.endswith("decoders")]
        assert all(bool(rows.any()) == row_wise for rows in still) and not all(bool(rows.all()) for rows in still)


def test_a_token_whose_path_meets_no_changed_patch_keeps_its_output() -> None:
    """Locality through the network: no token of the old text visits a patch that learning the new text has moved."""
    model, processor = cases.build_host("gpt2")
    learner = Learner(
        model, processor, method=apn(place="replace", layers=[1]), objective={"causal_lm": {"block_size": 32}},
        training={"learning_rate": 0.1, "weight_decay": 0.1, "per_device_train_batch_size": 1, "epochs": 3},
    )  # fmt: skip
    old, new = torch.tensor([[*range(40, 60), *b"zyzyzyzyzyzy"]]), [{"text": "zyzyzyzyzyzyzyzy"}]
    layer: Any = learner.methods[0].modules["1.ffn"]
    with torch.no_grad():
        expected = model(old).logits
    before = layer.decoders.detach().clone()
    learner.learn(Experience(0, "new", train=new))
    moved = (layer.decoders != before).flatten(1).any(1)
    seen: list[Any] = []
    from perdure.memory import observing

    with torch.no_grad(), observing(seen.append):
        after = model(old).logits
    visits = moved[next(o for o in seen if hasattr(o, "routing")).routing.indices].any(-1)[0]
    assert moved.any() and not moved.all()
    assert (~visits).any() and visits.any(), "choose texts of which some tokens share patches and some do not"
    # The layer is in the last block, whose attention comes before it: each token answers for itself.
    assert torch.equal(after[0, ~visits], expected[0, ~visits])
    assert not torch.equal(after[0, visits], expected[0, visits])


# ---- beside a pretrained model
@pytest.mark.parametrize("host", cases.HOSTS)
def test_a_bank_beside_says_nothing_until_it_has_learnt(host: str) -> None:
    model, _ = cases.build_host(host)
    pixels, text = {"pixel_values": torch.randn(2, 3, 8, 8)}, {"input_ids": torch.tensor([[5, 6, 7]])}
    given: Any = {"vit": pixels, "clip": {**pixels, "input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]])}}.get(host, text)
    with torch.no_grad():
        before = model(**given)[0]
        attach(model, apn())
        assert torch.equal(model(**given)[0], before)
        for name, parameter in model.named_parameters():
            if name.endswith("decoders"):
                parameter.normal_()
        assert not torch.equal(model(**given)[0], before)
        assert torch.equal(detach(model)(**given)[0], before)
        attach(model, apn(place="replace"))
        assert not torch.equal(model(**given)[0], before)
        assert torch.equal(detach(model)(**given)[0], before)


def test_the_layer_in_place_is_the_released_block() -> None:
    """h + APN(LN(h)) and nothing else: no dense feed-forward is left."""
    model: Any = cases.build_host("gpt2")[0]
    attach(model, apn(place="replace", gamma=2.0))
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "c_fc" in name or "mlp.c_proj" in name]
    block, hidden = model.transformer.h[1], torch.randn(1, 5, 16)
    with torch.no_grad():
        middle = hidden + block.attn(block.ln_1(hidden))[0]
        expected = middle + block.mlp(block.ln_2(middle))
        found = block(hidden)
    assert torch.allclose(found[0] if isinstance(found, tuple) else found, expected, atol=1e-6)
    assert float(block.mlp.decoders.detach().std()) == pytest.approx(0.02 / 2, rel=0.1)  # two blocks


def test_it_goes_with_other_adapters() -> None:
    made = cases.experiences("gpt2", 2)
    for place, lora_targets in (("beside", "all"), ("replace", "attention")):
        learner = cases.build_learner("gpt2", [apn(place=place), {"lora": {"rank": 2, "targets": lora_targets}}])
        before = {name: p.detach().clone() for name, p in learner.named_trainable()}
        for experience in made:
            learner.learn(experience)
        assert all(not torch.equal(p, before[name]) for name, p in learner.named_trainable())
        learner.detach()
    with pytest.raises(BadInput, match="ffn_in"):
        cases.build_learner("gpt2", [apn(place="replace"), {"moram": {"targets": "ffn_in"}}])
    learner = cases.build_learner("gpt2", [apn(place="replace"), {"moram": {"rank": 2, "top_k": 2}}])
    assert {name.split(".")[1] for name in learner.methods[1].modules} == {"query", "key", "value", "attention_output"}


# ---- what trains
@pytest.mark.parametrize(
    ("settings", "trained"),
    [({}, {"decoders", "gate_scale", "gate_bias"}),
     ({"train": "patches+prototypes"}, {"decoders", "gate_scale", "gate_bias", "prototypes"}),
     ({"train_code": True}, {"decoders", "gate_scale", "gate_bias", "code"})],
)  # fmt: skip
@pytest.mark.parametrize("place", ["beside", "replace"])
def test_the_switches_say_what_trains(place: str, settings: Any, trained: set[str]) -> None:
    learner = build(apn(place=place, **settings), "gpt2", epochs=2)
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    learner.learn(domain(0, "abcd"))
    moved = {name.split(".")[-1] for name, t in learner.model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == trained


def test_all_trains_layer_and_host() -> None:
    for place in ("beside", "replace"):
        learner = build(apn(place=place, train="all"), "gpt2", epochs=3)
        before = {name: t.clone() for name, t in learner.model.state_dict().items()}
        learner.learn(domain(0, "abcd"))
        still = {name for name, t in learner.model.state_dict().items() if torch.equal(t, before[name])}
        assert still == set()
        assert not learner.frozen_base() or all("perdure" not in name for name in learner.frozen_base())


# ---- pretraining
def test_the_first_experience_pretrains_and_the_second_adapts() -> None:
    pretrain = {"learning_rate": 0.02, "weight_decay": 0.3}
    for place in ("replace", "beside"):
        learner = build(apn(place=place, pretrain=pretrain), "gpt2", learning_rate=1e-3, epochs=2)
        start = {name: t.clone() for name, t in learner.model.state_dict().items()}
        assert learner.methods[0].pretrains
        groups = learner._groups()
        assert {group["lr"] for group in groups} == {0.02}
        decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
        assert decays["method/0/transformer.h.0.attn.c_attn.weight"] == 0.3
        assert decays["method/0/transformer.ln_f.weight"] == 0.0
        assert decays.get("method/0/0.ffn.decoders") == (0.3 if place == "replace" else None)
        learner.learn(domain(0, "abcd"))
        now = {name: t.clone() for name, t in learner.model.state_dict().items()}
        still = {name for name in start if torch.equal(now[name], start[name])}
        assert all(name in still for name in start if "perdure_apn" in name)  # the bank waits
        assert len(still) == sum("perdure_apn" in name for name in start)
        learner.learn(domain(1, "zyxw"))
        assert not learner.methods[0].pretrains and {group["lr"] for group in learner._groups()} == {1e-3}
        moved = {name for name, t in learner.model.state_dict().items() if not torch.equal(t, now[name])}
        assert {name.rsplit(".", 1)[-1] for name in moved} == {"decoders", "gate_scale", "gate_bias"}


def test_a_pretrained_layer_in_place_is_saved_and_loaded(tmp_path: Any) -> None:
    made = [domain(0, "abcd"), domain(1, "zyxw")]
    learner = build(apn(place="replace", pretrain={"learning_rate": 0.02}), "gpt2", epochs=2)
    learner.learn(made[0])
    middle = copied(learner.state_dict())
    learner.learn(made[1])
    learner.save_pretrained(tmp_path / "kept")
    again = Learner.from_pretrained(tmp_path / "kept", *cases.build_host("gpt2"))
    assert torch.equal(cases.outputs(again, made), cases.outputs(learner, made))
    again.learn(domain(2, "mnop"))  # goes on adapting, it does not pretrain again
    assert not again.methods[0].pretrains
    torch.manual_seed(5)
    fresh = build(apn(place="replace", pretrain={"learning_rate": 0.02}), "gpt2", epochs=2)
    fresh.load_state_dict(*middle)
    fresh.learn(made[1])
    assert differences(copied(fresh.state_dict()), copied(learner.state_dict())) == []
    model = cases.build_host("gpt2")[0]
    original = {name: t.clone() for name, t in model.state_dict().items()}
    restored = learner.detach().state_dict()
    assert all(torch.equal(restored[name], original[name]) for name in original)


def another_host() -> Any:
    """Other weights than the host that was pretrained: what is right after loading came from the folder."""
    model, tokenizer = cases.build_host("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model, tokenizer


def test_a_stream_may_begin_with_layers_that_were_saved(tmp_path: Any) -> None:
    """`weights`: layers and host of the folder are the start; the copy in a later folder takes the place of it."""
    made = [domain(0, "abcd"), domain(1, "zyxw")]
    first = build(apn(place="replace", pretrain={"learning_rate": 0.02}), "gpt2", epochs=2)
    first.learn(made[0])
    kept = first.save_pretrained(tmp_path / "kept")
    model, tokenizer = another_host()
    original = {name: t.clone() for name, t in model.state_dict().items()}
    learner = Learner(
        model, tokenizer, method=apn(place="replace", weights=str(kept)), objective={"causal_lm": {"block_size": 32}}
    )
    assert torch.equal(cases.outputs(learner, made), cases.outputs(first, made))
    learner.learn(made[1])
    assert not torch.equal(cases.outputs(learner, made), cases.outputs(first, made))
    learner.save_pretrained(tmp_path / "later")
    shutil.rmtree(kept)
    again = Learner.from_pretrained(tmp_path / "later", *another_host())
    assert torch.equal(cases.outputs(again, made), cases.outputs(learner, made))
    restored = learner.detach().state_dict()
    assert all(torch.equal(restored[name], original[name]) for name in original)


def test_layers_that_do_not_fit_are_refused_and_leave_the_model_alone(tmp_path: Any) -> None:
    first = build(apn(place="replace", pretrain={"learning_rate": 0.02}), "gpt2")
    kept = str(first.save_pretrained(tmp_path / "kept"))
    other = str(build({"lora": {"rank": 2}}, "gpt2").save_pretrained(tmp_path / "other"))
    model: Any = cases.build_host("gpt2")[0]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for settings, word in (
        ({"weights": kept, "place": "replace", "rank": 4}, "does not fit"),
        ({"weights": kept, "place": "replace", "layers": [0]}, "does not fit"),
        ({"weights": other}, "no apn"),
        ({"weights": str(tmp_path / "nowhere")}, "perdure.json"),
        ({"weights": kept, "pretrain": {}}, "one of them"),
    ):
        with pytest.raises(BadInput, match=word):
            attach(model, apn(**settings))
        now = model.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("method", "second"),
    [({"finetune": {"parameters": "mlp", "pretrain": {"learning_rate": 0.02}}}, "mlp"),
     ({"lora": {"rank": 2, "pretrain": {"learning_rate": 0.02}}}, "lora_"),
     ({"lora": {"rank": 2, "grow": True, "pretrain": {"learning_rate": 0.02}}}, "lora_")],
)  # fmt: skip
def test_rivals_pretrain_in_the_same_way(method: Any, second: str) -> None:
    learner = build(method, "gpt2", epochs=2)
    adapters = [n for n, _ in learner.model.named_parameters() if "lora_" in n]
    start = {name: t.clone() for name, t in learner.model.state_dict().items()}
    learner.learn(domain(0, "abcd"))
    now = {name: t.clone() for name, t in learner.model.state_dict().items()}
    assert {name for name in start if torch.equal(now[name], start[name])} == set(adapters)
    learner.learn(domain(1, "zyxw"))
    moved = [name for name, t in learner.model.state_dict().items() if name in now and not torch.equal(t, now[name])]
    assert moved and all(second in name for name in moved)
    assert set(learner.model.state_dict()) == set(now), "no second adapter for the first experience that it learns"


def test_plain_finetuning_in_the_first_experience_equals_pretraining_at_that_rate() -> None:
    one = build({"finetune": {"pretrain": {"learning_rate": 0.01}}}, "gpt2", learning_rate=1.0)
    two = build("finetune", "gpt2", learning_rate=0.01)
    for learner in (one, two):
        learner.learn(domain(0, "abcd"))
    assert torch.equal(cases.outputs(one, [domain(0, "abcd")]), cases.outputs(two, [domain(0, "abcd")]))


def test_pretraining_is_refused_where_it_cannot_be() -> None:
    for method in (apn(pretrain={}), {"lora": {"pretrain": {}}}, {"finetune": {"pretrain": {}}}):
        with pytest.raises(ProtocolRefused, match=r"boundaries: is none, but method.\w+.pretrain"):
            build(method, "gpt2", protocol={"boundaries": "none"})
    with pytest.raises(BadInput, match="apn and lora both pretrain"):
        build([apn(pretrain={}), {"lora": {"pretrain": {}}}], "gpt2")
    with pytest.raises(BadInput, match="first_only"):
        build({"lora": {"pretrain": {}, "first_only": True}}, "gpt2")
    with pytest.raises(BadInput, match=r"top_k 9 is more than the 4 patches"):
        build(apn(patches=4, top_k=9), "gpt2")


# ---- the log
def test_overlap_of_domains_is_logged() -> None:
    learner = build(apn(place="replace"), "gpt2", epochs=1)
    assert learner.methods[0].plasticity() == {}
    learner.learn(domain(0, "aaaaaaaa"))
    first = learner.methods[0].plasticity()
    assert set(first) == {"visited_patches"} and 0 < first["visited_patches"] < 1
    same = build(apn(place="replace", layers=[0]), "gpt2", learning_rate=1e-9, epochs=1)
    for index in range(2):
        same.learn(domain(index, "aaaaaaaa"))
    assert same.methods[0].plasticity()["routing_overlap"] == pytest.approx(1.0)
    same.learn(domain(2, "zywvzywv"))
    assert same.methods[0].plasticity()["routing_overlap"] < 0.9
    table = same.methods[0].tensors["usage/0.ffn"]
    assert table.shape == (3, 40) and table.sum(1).tolist() == [2.0 * 4 * 10] * 3  # k patches a token, 4 rows of 10
