"""Streams without boundaries, the services of the loop, and what the state must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_methods import Distilled, Peeking, build, copied, differences

from perdure.errors import BadInput
from perdure.learner import Learner
from perdure.memory import SHARED
from perdure.memory.observe import RouterLog
from tests.conformance import cases

FREE = {"boundaries": "none", "mask": "seen", "rehearsal": 8}
GROWING = {"moram": {"rank": 2, "top_k": 2, "grow_every": 3, "dropout": 0.1}}


# ---- no boundaries
def test_growth_without_boundaries_keeps_what_survives() -> None:
    learner, seen = build(GROWING, protocol=FREE), []

    def on_step(loop: Any, _: Any) -> None:
        names = dict(loop.optimization.named)
        state = loop.optimization.kinds["adamw"].state
        fresh = [name for name, p in names.items() if not state.get(p)]
        seen.append((bool(fresh), all("method" in name for name in fresh), int(state[names["head/scale"]]["step"])))

    for experience in cases.experiences("bert", 2, rows=16):
        learner.learn(experience, on_step=on_step)
    # grown after steps 3 and 6: new atoms start fresh, the head goes on, also over the experience's end
    assert seen == [(step in (3, 6), True, step) for step in range(1, 9)]
    assert learner.methods[0].memories["0.query"].bank.size == 6


def test_new_classes_without_boundaries_train_the_grown_head() -> None:
    learner = build("linear_probe", protocol=FREE)
    made = cases.experiences("bert", 2, rows=8)
    learner.partial_fit(made[0].train)
    assert learner.head is not None
    old = learner.head.module.weight.detach().clone()
    learner.partial_fit(made[1].train)
    live = dict(learner.named_trainable())["head/weight"]
    assert learner.optimization is not None and dict(learner.optimization.named)["head/weight"] is live
    assert int(learner.optimization.kinds["adamw"].state[live]["step"]) == 4
    assert learner.optimization.kinds["adamw"].state[live]["exp_avg"].shape == (4, 16)
    assert not torch.equal(live[:2], old) and [past.name for past in learner.history] == ["arrival-0", "arrival-1"]


def test_growth_inside_a_run_resumes_bit_for_bit() -> None:
    made, states = cases.experiences("bert", 2, rows=16), []

    def on_step(loop: Any, _: Any) -> None:
        if loop.counters.steps in (3, 7):
            states.append(copied(loop.state_dict()))

    spec = [GROWING, {"er": {"budget": 8, "per_step": 2}}]
    whole = build(spec, protocol=FREE, dropout=0.2)
    for experience in made:
        whole.learn(experience, on_step=on_step)
    for state in states:
        fresh = build(spec, protocol=FREE, dropout=0.2)
        fresh.load_state_dict(*state)
        for experience in made[fresh.position.experience :]:
            fresh.learn(experience)
        assert differences(copied(fresh.state_dict()), copied(whole.state_dict())) == []


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_forgetting_while_the_optimizer_lives(host: str) -> None:
    learner, made = build(GROWING, host, protocol=FREE), cases.experiences(host, 3, rows=12)
    for experience in made[:2]:
        learner.learn(experience)
    bank = learner.methods[0].memories["0.query"].bank
    assert set(bank.owners.tolist()) == {0, 1} and learner.forget(1)[0] > 0
    assert int((bank.owners == 1).sum()) == 0 and bank.new_size == 2, "nothing would train until the next growth"
    frozen = bank.frozen_size
    learner.learn(made[2])
    assert set(bank.owners.tolist()) == {0, 2} and bank.frozen_size > frozen


def test_atoms_that_two_writes_trained_belong_to_none_and_neither_write_is_forgotten() -> None:
    learner, made = build(GROWING, protocol=FREE), cases.experiences("bert", 4, rows=8)
    for experience in made[:3]:  # two steps each, growth after steps 3 and 6
        learner.partial_fit(list(experience.train))
    bank = learner.methods[0].memories["0.query"].bank
    assert set(bank.owners[: bank.frozen_size].tolist()) == {SHARED} and bank.size > bank.new_size
    for write in (0, 1, 2):
        with pytest.raises(BadInput, match=f"write {write} trained atoms that other writes trained too"):
            learner.forget(write)
        assert "forgotten" not in learner.writes[write]
    size = bank.frozen_size
    learner.partial_fit(list(made[3].train))  # the atoms grown last were trained by this write alone
    assert bank.owners[size:].tolist() == [3, 3] and learner.forget(3)[0] > 0 and bank.frozen_size == size


def test_ownership_is_resumed() -> None:
    made, learner = cases.experiences("bert", 2, rows=4), build(GROWING, protocol=FREE)
    learner.partial_fit(list(made[0].train))
    fresh = build(GROWING, protocol=FREE)
    fresh.load_state_dict(*copied(learner.state_dict()))
    fresh.partial_fit(list(made[1].train))
    assert fresh.methods[0].memories["0.query"].bank.owners.tolist() == [SHARED] * 2
    with pytest.raises(BadInput, match="write 0 trained"):
        fresh.forget(0)


def test_atoms_that_never_trained_do_not_pile_up() -> None:
    """Growth at the last step of an experience, and experiences in which nothing is trained."""
    made = cases.experiences("bert", 3, rows=12)
    for spec in ({"moram": {"rank": 2, "top_k": 2, "grow_every": 3}}, [{"moram": {"rank": 2, "top_k": 2}}, "joint"]):
        learner = build(spec)
        for experience in made:
            learner.learn(experience)
        sizes = set()
        for memory in learner.methods[0].memories.values():
            bank = memory.bank
            assert bool((bank.frozen_values != 0).any(-1).all()), "an atom that says nothing competes for ever"
            assert bank.new_size == 0 and bank.size == bank.owners.numel() == bank.usage.numel()
            sizes.add(bank.size)
        assert max(sizes) == (2 if "joint" in spec else 6)


@pytest.mark.parametrize("free", [False, True], ids=["boundaries", "no boundaries"])
def test_a_limited_bank_stops_growing(free: bool) -> None:
    spec: dict[str, Any] = {"rank": 2, "top_k": 2, "max_atoms": 4} | ({"grow_every": 3} if free else {})
    learner, sizes = build({"moram": spec}, **({"protocol": FREE} if free else {})), []

    def on_step(loop: Any, _: Any) -> None:
        sizes.append(max(memory.bank.size for memory in learner.methods[0].memories.values()))

    for experience in cases.experiences("bert", 4, rows=16):
        learner.learn(experience, on_step=on_step)
    banks = [memory.bank for memory in learner.methods[0].memories.values()]
    assert max(sizes) == 6 and all(bank.frozen_size == 4 for bank in banks)
    assert all(bank.owners.unique().tolist()[-1] == 3 for bank in banks), "what was just learnt has gone"
    if not free:
        log = learner.services.router_log
        counted = [log.usage(site) for site in log.sites]
        assert counted and all(counts.numel() == 4 for counts in counted), "its numbers are not those of the bank"


def test_usage_is_that_of_all_logged_steps_without_boundaries() -> None:
    counted = []
    for reset in (False, True):  # a run starts the router's sums anew after each portion, for its report
        learner = build({"moram": {"rank": 2, "top_k": 2, "grow_every": 100}}, protocol=FREE)
        for experience in cases.experiences("bert", 3, rows=8):
            learner.learn(experience)
            if reset:
                learner.services.router_log.reset()
        counted.append(learner.methods[0].memories["0.query"].bank.usage)
    assert torch.equal(*counted) and counted[0].sum() > 0


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_a_loaded_learner_without_boundaries_goes_on_learning(host: str, tmp_path) -> None:
    learner, made = build(GROWING, host, protocol=FREE), cases.experiences(host, 2, rows=8)
    for experience in made:  # the last one is marked so
        learner.learn(experience)
    assert made[-1].last and learner.trainable_parameters() > 0
    again = build(GROWING, host, protocol=FREE)
    again.load_state_dict(*copied(learner.state_dict()))
    assert differences(copied(again.state_dict()), copied(learner.state_dict())) == []
    learner.save_pretrained(tmp_path / "kept")
    kept = Learner.from_pretrained(tmp_path / "kept", *cases.build_host(host))
    before = cases.outputs(kept, made)
    assert torch.equal(before, cases.outputs(learner, made))
    kept.partial_fit(list(made[0].train))
    assert kept.counters.steps > 0 and not torch.equal(cases.outputs(kept, made), before)


def test_a_state_whose_atoms_are_all_frozen_grows_new_ones_when_learning_begins() -> None:
    learner, made = build({"moram": {"rank": 2}}), cases.experiences("bert", 2, rows=8)
    learner.learn(made[0])
    free = build({"moram": {"rank": 2, "grow_every": 100}}, protocol=FREE)
    free.load_state_dict(*copied(learner.state_dict()))
    bank = free.methods[0].memories["0.query"].bank
    assert bank.new_size == 0
    free.partial_fit(list(made[1].train))
    assert bank.new_size == 2 and bool((bank.new_values != 0).any())


def test_a_loaded_learner_draws_anew(tmp_path) -> None:
    made = cases.experiences("bert", 2, rows=4)
    learner = build({"moram": {"rank": 2}}, optimizer="sgd", learning_rate=1e-9)
    learner.learn(made[0])
    learner.save_pretrained(tmp_path / "kept")
    again = Learner.from_pretrained(tmp_path / "kept", *cases.build_host("bert"))
    assert not again.model.training and not any(m.training for m in again.model.modules())
    again.learn(made[1])
    keys = again.methods[0].memories["0.query"].bank.frozen_keys
    assert (keys[:2] - keys[2:]).abs().max() > 1e-3


# ---- services
@pytest.fixture(scope="module")
def peeking() -> tuple[Any, Any, Any]:
    method, made = Peeking(None), cases.experiences("bert", 2, rows=6)
    learner = build(["linear_probe", method], per_device_eval_batch_size=4)
    for experience in made:
        learner.learn(experience)
    return learner, method.loop, made


def test_capture_equals_a_hand_computation(peeking: Any) -> None:
    learner, services, made = peeking
    before = learner.counters.extra_passes
    found = services.capture(learner.host.sites(["query", "value", "ffn_out"], layers=[0]), made[0].train)
    assert found["0.query"] is found["0.value"] and learner.counters.extra_passes == before + 1
    total, count, seen = torch.zeros(32, 32, dtype=torch.float64), 0, []
    site = learner.host.sites(["ffn_out"], layers=[0])[0]
    handle = site.module.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().double()))
    for batch in learner.batches(made[0].train):
        with torch.no_grad():
            learner.model(**batch.inputs)
        for row, mask in zip(seen.pop(), batch.inputs["attention_mask"], strict=True):
            for token, real in zip(row, mask, strict=True):
                if real:
                    total, count = total + torch.outer(token, token), count + 1
    handle.remove()
    assert count == int(found["0.ffn_out"].count)
    assert torch.allclose(found["0.ffn_out"].moment, total, atol=1e-4)


def test_gradients_per_batch_and_per_sample(peeking: Any) -> None:
    learner, services, made = peeking
    rows = made[1].train
    (whole,) = services.gradients(rows[:4])
    single = list(services.gradients(rows[:4], per_sample=True))
    assert len(single) == 4 and set(whole) == {"head/weight", "head/scale"}
    for name, gradient in whole.items():
        assert torch.allclose(torch.stack([one[name] for one in single]).mean(0), gradient, atol=1e-5)
    batch = next(iter(learner.batches(rows[:4])))
    loss = torch.nn.functional.cross_entropy(learner.system(batch).logits, batch.labels)
    assert torch.allclose(torch.autograd.grad(loss, learner.head.module.weight)[0], whole["head/weight"], atol=1e-6)
    (own,) = services.gradients(rows[:4], loss=lambda batch, output: 2 * loss_of(batch, output))
    assert torch.allclose(own["head/weight"], 2 * whole["head/weight"], atol=1e-5)
    state = torch.get_rng_state()
    next(iter(services.gradients(rows)))  # left in its middle: nothing stays open
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state) and not learner.model.training


def loss_of(batch: Any, output: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.logits, batch.labels)


def test_class_statistics(peeking: Any) -> None:
    learner, services, made = peeking
    found = services.class_statistics(made[0].train)
    mine = learner.features([row for row in made[0].train if row["label"] == "class0"])
    assert set(found) == {"class0", "class1"} and found["class0"].count == len(mine)
    assert torch.allclose(found["class0"].mean, mine.mean(0), atol=1e-6)
    assert torch.allclose(found["class0"].covariance, torch.cov(mine.T, correction=0), atol=1e-6)


def test_replay_router_log_and_generator() -> None:
    spec = [{"moram": {"rank": 2}}, {"er": {"budget": 6, "per_step": 2}}]
    learner = build(spec, protocol={"rehearsal": 6})
    for experience in cases.experiences("bert", 2, rows=8):
        learner.learn(experience)
    services = learner.services
    assert len(services.replay) == 6 and services.replay.seen == 16 and services.generator is learner.generator
    assert isinstance(services.router_log, RouterLog)
    assert services.router_log.summary()["0.query"]["items"] == 4


def test_old_model_is_that_of_the_last_boundary_and_is_resumed() -> None:
    made, states, outputs = cases.experiences("bert", 3, rows=8), [], []
    probe = made[0].test

    def on_step(loop: Any, _: Any) -> None:
        if loop.position.experience == 2 and loop.position.step == 1:
            states.append(copied(loop.state_dict()))
            batch = next(iter(loop.batches(probe)))
            with torch.no_grad():
                outputs.append(loop.services.previous_model(batch).logits)

    spec = [{"moram": {"rank": 2}}, Distilled(None)]
    whole = build(spec, dropout=0.2)
    for experience in made[:2]:
        whole.learn(experience)
    batch = next(iter(whole.batches(probe)))
    with torch.no_grad():
        expected = whole.forward(batch).logits
    whole.learn(made[2], on_step=on_step)
    assert whole.methods[1].values["width"] == 4, "the old head has the old classes only"
    assert expected is not None and torch.equal(outputs[0], expected)
    fresh = build([{"moram": {"rank": 2}}, Distilled(None)], dropout=0.2)
    fresh.load_state_dict(*states[0])
    fresh.learn(made[2])
    assert differences(copied(fresh.state_dict()), copied(whole.state_dict())) == []


# ---- every field of the state counts
SPEC = [{"moram": {"rank": 2, "top_k": 2, "dropout": 0.1}}, {"er": {"budget": 8, "per_step": 2}}]
UNUSED = {
    ("value", "names"): "checked, not restored: a fresh learner has the same",
    ("value", "declared"): "an argument of the learner: a fresh one has the same",
    ("tensor", "replay"): "arrays of images; these rows are text",
}
FIELDS = (
    "methods", "names", "head", "auxiliary", "labels", "declared", "writes", "history", "optimizer", "rng", "replay",
    "previous", "router", "position", "counters",
)  # fmt: skip
PREFIXES = ("method", "head", "auxiliary", "optimizer", "rng", "generator", "replay", "previous", "router")


def _make() -> Learner:
    distilled = Distilled(None)
    return build([*SPEC, distilled], head={"ridge": {"features": 8}}, dropout=0.2, protocol={"rehearsal": 8})


@pytest.fixture(scope="module")
def told() -> tuple[Any, Any, Any]:
    made, states = cases.experiences("bert", 3, rows=12), []

    def on_step(loop: Any, _: Any) -> None:
        if (loop.position.experience, loop.position.step) == (2, 2):  # the router's sums are of one experience
            states.append(copied(loop.state_dict()))

    learner = _make()
    for experience in made:
        learner.learn(experience, on_step=on_step)
    return made, states[0], copied(learner.state_dict())


def test_the_lists_of_fields_are_complete(told: Any) -> None:
    _, (tensors, values), _ = told
    assert set(values) == set(FIELDS) and {name.split("/")[0] for name in tensors} == set(PREFIXES)


@pytest.mark.parametrize(
    ("kind", "name"), [("value", name) for name in FIELDS] + [("tensor", name) for name in PREFIXES]
)
def test_leaving_out_a_field_shows(told: Any, kind: str, name: str) -> None:
    made, (tensors, values), expected = told
    fresh = _make()
    empty, blank = copied(fresh.state_dict())
    changed, known = dict(tensors), dict(values)
    if kind == "value":
        if name in blank:
            known[name] = blank[name]
        else:
            del known[name]
    else:
        changed = {n: t for n, t in tensors.items() if n.split("/")[0] != name}
        changed |= {n: t for n, t in empty.items() if n.split("/")[0] == name}
    try:
        fresh.load_state_dict(changed, known)
        for experience in made[fresh.position.experience :]:
            fresh.learn(experience)
        differs = differences(copied(fresh.state_dict()), expected) != []
    except Exception:
        differs = True
    assert differs != ((kind, name) in UNUSED)
