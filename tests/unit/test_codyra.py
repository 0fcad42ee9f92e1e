"""CoDyRA and its control: the step that is taken, what is merged, and W0 back bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from loop_methods import Distilled, build, copied, differences
from merged_weights import changed, watch_merging, weights
from torch.utils.flop_counter import FlopCounterMode

from perdure import optim
from perdure.attachment import attach, detach
from perdure.errors import BadInput, ProtocolRefused
from perdure.layers.gated import GatedComponents
from perdure.learner import Learner
from perdure.memory.proximal import double_threshold, ramp, soft_threshold
from tests.conformance import cases

SPECS: dict[str, Any] = {
    "codyra": {"codyra": {"rank": 3, "threshold": 0.3}},
    "random_prune": {"random_prune": {"rank": 3, "kept_rank": 1.5}},
}


def learnt(host: str, spec: Any, count: int = 2, **options: Any) -> tuple[Learner, dict[str, torch.Tensor]]:
    learner = cases.build_learner(host, spec, **options)
    before = weights(learner.model)
    for experience in cases.experiences(host, count):
        learner.learn(experience)
    return learner, before


# ---- merging
@pytest.mark.parametrize("host", cases.HOSTS)
@pytest.mark.parametrize("name", SPECS)
def test_merged_equals_unmerged(name: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, made = cases.build_learner(host, SPECS[name], learning_rate=0.05), cases.experiences(host)
    method: Any = learner.methods[0]
    found = watch_merging(learner, made, monkeypatch)
    for experience in made:
        learner.learn(experience)
    assert len(found) == 3
    for difference, size in found:
        assert size > 1e-3, "the components must say something, or their merging shows nothing"
        assert difference < 1e-5
    assert 0 < method.plasticity()["kept_rank"] < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("host", cases.HOSTS)
@pytest.mark.parametrize("name", SPECS)
def test_w0_comes_back_bit_for_bit(name: str, host: str, dtype: torch.dtype) -> None:
    learner, before = learnt(host, SPECS[name], dtype=dtype)
    sites, parts = learner.host.sites("all"), learner.methods[0].components  # type: ignore[attr-defined]
    adapted = {f"{site.path}.weight" for site in sites if parts[site.name].bank.size}  # chance may leave a map nothing
    assert len(adapted) > len(sites) / 3  # sites of a fused map share one weight
    assert changed(learner.model, before) == adapted
    base = learner.frozen_base()
    assert all(torch.equal(base[each], before[each]) for each in adapted), "W0 is part of the base that is hashed"
    for write in (0, 1):
        assert learner.forget(write)[0] > 0
    assert changed(learner.model, before) == set(), "without components the weights are W0"
    learner, before = learnt(host, SPECS[name], dtype=dtype)
    learner.detach()
    assert changed(learner.model, before) == set()


def test_slices_of_a_fused_transposed_map_are_merged_alone() -> None:
    spec = {"codyra": {"rank": 3, "targets": ["query", "value", "ffn_out"], "layers": [1]}}
    learner, before = learnt("gpt2", spec)
    paths = ["transformer.h.1.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"]
    assert changed(learner.model, before) == set(paths)
    now = learner.model.state_dict()[paths[0]]  # [d_in, 3 d_out]
    same = [torch.equal(now[:, i : i + 16], before[paths[0]][:, i : i + 16]) for i in (0, 16, 32)]
    assert same == [False, True, False]
    learner.detach()
    assert changed(learner.model, before) == set()


def test_the_weight_is_w0_plus_the_components_of_every_write_and_forgetting_subtracts_one() -> None:
    learner, before = learnt("bert", SPECS["codyra"], 3)
    method: Any = learner.methods[0]

    def by_hand(name: str, path: str) -> torch.Tensor:
        bank = method.components[name].bank
        total = before[path].double()
        for key, value in zip(bank.frozen_keys, bank.frozen_values, strict=True):
            total = total + torch.outer(value.double(), key.double())
        return total

    def matches() -> None:
        for site in learner.host.sites("all"):
            now = learner.model.state_dict()[f"{site.path}.weight"]
            assert (now.double() - by_hand(site.name, f"{site.path}.weight")).abs().max() < 1e-7

    matches()
    owners = torch.cat([each.bank.owners for each in method.components.values()])
    assert owners.unique().tolist() == [0, 1, 2]
    assert learner.forget(1) == [int((owners == 1).sum())]
    matches()
    learner.learn(cases.experiences("bert", 4)[3])
    matches()


def test_between_experiences_the_model_has_its_own_architecture_and_cost(tmp_path: Any) -> None:
    import transformers

    learner, before = learnt("gpt2", SPECS["codyra"])
    plain, _ = cases.build_host("gpt2")
    assert all(not module._forward_hooks for module in learner.model.modules())
    tokens = torch.tensor([[5, 6, 7, 8]])
    counts = []
    for model in (learner.model, plain):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    learner.model.save_pretrained(tmp_path)  # transformers' own: a model that needs no perdure
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, learner.model(tokens).logits)
        assert not torch.equal(again(tokens).logits, plain(tokens).logits)


def test_a_narrow_weight_is_rounded_once_from_w0() -> None:
    learner, before = learnt("bert", SPECS["codyra"], 3, dtype=torch.bfloat16)
    method: Any = learner.methods[0]
    assert changed(learner.model, before)
    for site in learner.host.sites("all"):
        bank, path = method.components[site.name].bank, f"{site.path}.weight"
        exact = before[path].double() + bank.frozen_values.double().t() @ bank.frozen_keys.double()
        assert torch.equal(learner.model.state_dict()[path], exact.to(torch.bfloat16))
    learner.detach()
    assert changed(learner.model, before) == set()


# ---- the step
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("operator", ["soft", "released"])
@pytest.mark.parametrize("how", ["ramp", "l1"])
def test_the_threshold_acts_on_the_step_that_was_taken(
    how: str, operator: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: dict[str, Any] = {"rank": 4, "operator": operator, "gate_learning_rate": 0.02, "dense": 0.25}
    config |= {"l1": 10.0} if how == "l1" else {"threshold": 0.3}
    learner = cases.build_learner("bert", {"codyra": config}, lr_scheduler=schedule, weight_decay=0.1, epochs=3)
    method: Any = learner.methods[0]
    stepped: list[torch.Tensor] = []
    step = optim.Optimization.step

    def watched(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        stepped.append(torch.cat([each.gates.detach().clone() for each in method.components.values()]))

    monkeypatch.setattr(optim.Optimization, "step", watched)
    kappas: list[float] = []

    def on_step(loop: Any, _: Any) -> None:
        number = loop.position.step - 1
        factor = optim.rate_factor(loop.training, number, 9)
        kappa = 10.0 * 0.02 * factor if number > 2 else 0.0
        if how == "ramp":
            kappa = ramp(number, 9, 0.25, 0.3)
        kappas.append(kappa)
        wanted = (soft_threshold if operator == "soft" else double_threshold)(stepped[-1], kappa)
        found = torch.cat([each.gates.detach() for each in method.components.values()])
        assert torch.allclose(found, wanted, atol=1e-7) and torch.equal(found == 0, wanted == 0)
        assert torch.equal(found, stepped[-1]) == (kappa == 0)

    learner.learn(cases.experiences("bert")[0], on_step=on_step)
    assert kappas[:3] == [0.0] * 3 and all(kappa > 0 for kappa in kappas[3:]) and len(kappas) == 9
    if how == "l1" and schedule != "constant":
        assert kappas[8] < 0.5 * kappas[3], "the rate falls, and the threshold with it"


def test_gates_have_their_own_rate_and_start() -> None:
    learner = cases.build_learner("bert", {"codyra": {"rank": 64, "gate_learning_rate": 0.3, "gate_init": "ones"}})
    seen: dict[str, Any] = {}

    def on_step(loop: Any, _: Any) -> None:
        if not seen:
            each = loop.methods[0].components["0.query"]
            seen["rates"] = [loop.services.rate(p) for p in (each.bank.new_keys, each.gates)]
            seen["gates"] = each.gates.detach().clone()

    learner.learn(cases.experiences("bert")[0], on_step=on_step)
    assert seen["rates"] == [0.01, 0.3]
    assert torch.equal(seen["gates"], torch.ones(64)), "with B at zero the first step moves no gate"
    with pytest.raises(ValueError, match="does not train"):
        learner.services.rate(next(learner.model.parameters()))  # type: ignore[arg-type]


def test_a_component_starts_as_it_is_said_to() -> None:
    draws = []
    for seed in (0, 0, 1):
        each = GatedComponents(9, 4)
        each.grow(500, 3, torch.Generator().manual_seed(seed), normal=True)
        draws.append((each.bank.new_keys.detach(), each.gates.detach()))
        assert not each.bank.new_values.detach().any() and each.bank.owners.unique().tolist() == [3]
    (keys, gates), again, other = draws
    assert 0.33 < float(keys.abs().max()) <= 1 / 3 and abs(float(keys.mean())) < 0.02
    assert abs(float(gates.mean())) < 0.15 and 0.9 < float(gates.std()) < 1.1
    assert torch.equal(gates, again[1]) and torch.equal(keys, again[0]) and not torch.equal(gates, other[1])


def test_random_prune_keeps_the_rank_that_was_asked_for_and_what_goes_stays_away() -> None:
    spec = {"random_prune": {"rank": 4, "kept_rank": 2.25, "dense": 0.5}}
    learner, made = cases.build_learner("bert", spec, weight_decay=0.1, epochs=4), cases.experiences("bert")
    method: Any = learner.methods[0]
    seen: list[tuple[int, set[tuple[str, int]]]] = []

    def on_step(loop: Any, _: Any) -> None:
        zero = {(n, i) for n, each in method.components.items() for i in (each.gates == 0).nonzero().flatten().tolist()}
        seen.append((loop.position.step - 1, zero))

    drawn = []
    for experience in made[:2]:
        seen.clear()
        learner.learn(experience, on_step=on_step)
        dropped = {(name, number) for name, numbers in method.values["dropped"].items() for number in numbers}
        assert len(dropped) == 12 * 4 - 27
        assert [step for step, zero in seen if zero == set()] == list(range(7))
        assert [step for step, zero in seen if zero == dropped] == list(range(7, 12))
        drawn.append(dropped)
    assert drawn[0] != drawn[1]
    assert method.values["kept"] == [2.25, 2.25] and method.plasticity() == {"kept_rank": 2.25}


def test_random_prune_prunes_where_no_step_comes_after_the_dense_phase() -> None:
    learner, _ = learnt("bert", {"random_prune": {"rank": 2, "kept_rank": 1.0, "dense": 1.0}}, 1)
    assert learner.methods[0].plasticity() == {"kept_rank": 1.0}


def test_the_same_rank_as_a_run_of_codyra() -> None:
    kept = learnt("bert", SPECS["codyra"])[0].methods[0].plasticity()["kept_rank"]
    assert 0 < kept < 3
    control = learnt("bert", {"random_prune": {"rank": 3, "kept_rank": kept}})[0]
    assert control.methods[0].plasticity()["kept_rank"] == pytest.approx(kept, abs=0.5 / 12)


# ---- state
@pytest.mark.parametrize("name", SPECS)
def test_the_old_model_is_not_merged_with_the_new_and_is_resumed(name: str) -> None:
    made, states, outputs = cases.experiences("bert", 3, rows=8), [], []

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.experience == 2 and loop.position.step == 1:
            states.append(copied(loop.state_dict()))

    whole = build([SPECS[name], Distilled(None)], dropout=0.2)
    for experience in made[:2]:
        whole.learn(experience)
    batch = next(iter(whole.batches(made[0].test)))
    with torch.no_grad():
        expected = whole.forward(batch).logits
    whole.learn(made[2], on_step=on_step)
    with torch.no_grad():
        outputs.append(whole.services.previous_model(batch).logits)
        assert not torch.equal(whole.forward(batch).logits[:, :4], expected)  # type: ignore[index]
    assert torch.equal(outputs[0], expected), "merging has changed the model of the last boundary"
    fresh = build([SPECS[name], Distilled(None)], dropout=0.2)
    fresh.load_state_dict(*states[0])
    fresh.learn(made[2])
    assert differences(copied(fresh.state_dict()), copied(whole.state_dict())) == []
    with torch.no_grad():
        assert torch.equal(fresh.services.previous_model(batch).logits, expected)


def test_another_w0_is_refused(tmp_path: Any) -> None:
    learner, _ = learnt("bert", SPECS["codyra"])
    learner.save_pretrained(tmp_path / "kept")
    other, processor = cases.build_host("bert")
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight[0, 0] += 1e-3  # type: ignore[union-attr]
    before = weights(other)
    with pytest.raises(BadInput, match="load that model"):
        Learner.from_pretrained(tmp_path / "kept", other, processor)
    assert changed(other, before) == set()


def test_an_older_state_takes_back_what_was_merged() -> None:
    made = cases.experiences("bert")
    learner = cases.build_learner("bert", SPECS["codyra"])
    before, start = weights(learner.model), copied(learner.state_dict())
    learner.learn(made[0])
    first, one = copied(learner.state_dict()), weights(learner.model)
    learner.learn(made[1])
    assert changed(learner.model, one)
    learner.load_state_dict(*first)
    assert changed(learner.model, one) == set()
    learner.load_state_dict(*start)
    assert changed(learner.model, before) == set()


def test_a_copy_of_an_attached_model_has_its_own_weights() -> None:
    model = cases.build_host("bert")[0]
    before = weights(attach(model, SPECS["codyra"]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert changed(model, before) == set()
    detach(other)
    adapted = next(name for name in before if name.endswith("query.weight"))
    assert torch.equal(other.state_dict()[adapted], before[adapted])


def test_what_an_abandoned_experience_has_learnt_stays_and_can_be_forgotten() -> None:
    made, learner = cases.experiences("bert"), cases.build_learner("bert", SPECS["codyra"])

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.step == 4:
            raise RuntimeError("the lights go out")

    with pytest.raises(RuntimeError, match="lights"):
        learner.learn(made[0], on_step=on_step)
    learner.abandon()
    learner.learn(made[1])
    method: Any = learner.methods[0]
    owners = torch.cat([each.bank.owners for each in method.components.values()])
    assert owners.unique().tolist() == [0, 1]
    assert learner.forget(0)[0] > 0 and len(method.values["kept"]) == 1


def test_forgetting_what_trains_takes_it_out_of_the_host() -> None:
    made, learner = cases.experiences("bert"), cases.build_learner("bert", SPECS["codyra"])
    before = weights(learner.model)

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.step == 4:
            raise RuntimeError("the lights go out")

    with pytest.raises(RuntimeError, match="lights"):
        learner.learn(made[0], on_step=on_step)
    assert learner.forget(0) == [12 * 3]
    assert changed(learner.model, before) == set()
    learner.abandon()
    learner.learn(made[1])
    assert changed(learner.model, before)


def test_joint_training_merges_once() -> None:
    learner, _ = learnt("bert", [SPECS["codyra"], "joint"], 3)
    method: Any = learner.methods[0]
    owners = torch.cat([each.bank.owners for each in method.components.values()])
    assert owners.unique().tolist() == [2] and len(method.values["kept"]) == 1


# ---- refusals
def test_a_tied_weight_is_refused_by_name_and_the_model_left_alone() -> None:
    model = cases.build_host("gpt2")[0]
    before = weights(model)
    with pytest.raises(BadInput, match=r"merging an update would also change transformer\.wte"):
        attach(model, {"codyra": {"targets": ["query", "re:lm_head$"]}})
    assert changed(model, before) == set()


def test_a_quantised_weight_is_refused_by_name() -> None:
    model: Any = cases.build_host("bert")[0]
    query = model.encoder.layer[1].attention.self.query
    query.weight = torch.nn.Parameter(query.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match=r"1\.query.*merging an update needs a floating-point weight.*int8"):
        attach(model, "codyra")


@pytest.mark.parametrize(
    "spec", [[SPECS["codyra"], "finetune"], ["finetune", SPECS["codyra"]], [SPECS["codyra"], SPECS["random_prune"]]]
)
def test_two_that_overwrite_one_weight_are_refused(spec: Any) -> None:
    model, processor = cases.build_host("bert")
    before, settings = weights(model), {"objective": {"classification": {"max_length": 32}}}
    with pytest.raises(BadInput, match=r"both overwrite encoder\.layer\.0\.\S+\.weight; keep one"):
        Learner(model, processor, method=spec, **settings)
    assert changed(model, before) == set() and not hasattr(model, "_perdure")
    embeddings = [SPECS["codyra"], {"finetune": {"parameters": "embeddings"}}]
    assert Learner(model, processor, method=embeddings, **settings).detach() is model


def test_without_boundaries_it_is_refused() -> None:
    with pytest.raises(ProtocolRefused, match=r"protocol\.boundaries: is none, but codyra needs them"):
        Learner(*cases.build_host("bert"), method=SPECS["codyra"], protocol={"boundaries": "none"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kept_rank": 17.0}, r"kept_rank is 17\.0, but a map has 16 components"),
        ({"kept_rank": 0}, r"random_prune\.kept_rank"),
        ({"gate_init": "zeros"}, r"random_prune\.gate_init"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Learner(*cases.build_host("bert"), method={"random_prune": settings})
