"""SETA-style experts in a learner: what the specification calls invariants, on four hosts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from perdure.errors import BadInput, ProtocolRefused
from perdure.learner import Learner
from perdure.streams import Experience

from . import cases

SMALL = {"density": 0.1, "gate_layer": 1, "prompt_tokens": 4, "draws": 8, "smallest": 2}
every_host = pytest.mark.parametrize("host", [host for host in cases.HOSTS if cases.runs("seta", host)])


def learner_on(host: str, *, protocol: dict[str, Any] | None = None, training: Any = None, **settings: Any) -> Learner:
    model, processor = cases.build_host(host, torch.float64)
    limit = {"bert": {"max_length": 32}, "vit": {}}.get(host, {"block_size": 32})
    return Learner(
        model, processor, method={"seta": {**SMALL, **settings}}, objective={cases.OBJECTIVE[host]: limit},
        training={"learning_rate": 3e-2, "per_device_train_batch_size": 4, "epochs": 2, "logging_steps": 1,
                  "weight_decay": 0.1, **(training or {})},
        protocol={"rehearsal": 12, "mask": "seen", **(protocol or {})}, seed=3,
    )  # fmt: skip


def with_tasks(made: list[Experience]) -> list[Experience]:
    return [Experience(e.index, e.name, e.train, e.test, task=10 + e.index, last=e.last) for e in made]


def outputs(learner: Learner, made: list[Experience]) -> torch.Tensor:
    """What the host itself gives, without the head, which new classes change."""
    found = []
    for experience in made:
        for batch in learner.batches(experience.train, unlabelled=True):
            with torch.no_grad():
                found.append(learner.model(**batch.inputs)[0].flatten())
    return torch.cat(found)


def owned(method: Any) -> dict[tuple[str, int], tuple[int, bytes]]:
    """(site, position) -> (expert, bytes of the value)."""
    found: dict[tuple[str, int], tuple[int, bytes]] = {}
    for name, bank in method.banks.items():
        index, expert, values, _ = bank.support()
        for i, e, v in zip(index.tolist(), expert.tolist(), values, strict=True):
            assert (name, i) not in found, "supports overlap"
            found[name, i] = (e, v.numpy().tobytes())
    return found


@functools.cache
def told(host: str) -> dict[str, Any]:
    """Three experiences learnt, with notes from around each boundary."""
    learner, made = learner_on(host), cases.experiences(host)
    method: Any = learner.methods[0]
    notes: dict[str, Any] = {"learner": learner, "method": method, "made": made, "losses": [], "end": []}
    notes |= {"before": [], "after": [], "start": [], "experts": []}
    begin = type(method).before_experience

    def watched(experience: Experience) -> None:
        notes["before"].append(outputs(learner, made))
        begin(method, experience)
        notes["after"].append(outputs(learner, made))
        notes["start"].append(owned(method))
        notes["experts"].append(method.values["experts"])

    method.before_experience = watched
    for experience in made:
        steps: list[dict[str, float]] = []
        learner.learn(experience, on_step=lambda _, losses, steps=steps: steps.append(losses))
        notes["losses"].append(steps)
        notes["end"].append(owned(method))
    return notes


# ---- sensitivity through the loop's service
@every_host
@pytest.mark.parametrize("per_sample", [False, True])
def test_sensitivity_is_the_squared_gradient_of_the_weights(host, per_sample):
    learner, made = learner_on(host), cases.experiences(host)
    method: Any = learner.methods[0]
    learner.learn(made[0], on_step=None)
    expected: dict[str, torch.Tensor] = {}
    rows = [[row] for row in made[0].train] if per_sample else [made[0].train]
    weights = {site.name: site.parameter("test") for site in method._sites}
    for part in rows:
        for batch in learner.batches(part):
            [w.requires_grad_(True) for w in weights.values()]
            output = learner.objective.forward(learner.model, learner.head, batch, learner.pooling)
            summed, count = learner.objective.loss(batch, output)
            grads = torch.autograd.grad(summed / count, list(weights.values()))
            [w.requires_grad_(False) for w in weights.values()]
            for site, grad in zip(method._sites, grads, strict=True):
                grad = (grad.t() if site.transposed else grad)[slice(*(site.out_slice or (None, None)))]
                expected[site.name] = expected.get(site.name, 0) + grad.square() / len(rows)
    passes = learner.counters.extra_passes
    found = method._sensitivity.measure(made[0].train, most=99, per_sample=per_sample, after=lambda: None)
    assert learner.counters.extra_passes == passes + 1
    assert set(found) == set(expected) == set(method.banks)
    for name, bank in method.banks.items():
        assert found[name].shape == (bank.out_features, bank.in_features)
        assert expected[name].max() > 0
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-4, atol=1e-12)
    assert not any(w.requires_grad for w in weights.values())


def test_masks_take_the_most_sensitive_weights_or_random_ones():
    generator = torch.Generator().manual_seed(0)
    learner = learner_on("bert")
    method: Any = learner.methods[0]
    scores = {name: torch.rand(b.out_features, b.in_features, generator=generator) for name, b in method.banks.items()}
    masks = method._sensitivity.masks(scores, 0.1, 1.0, generator)
    for name, mask in masks.items():
        assert set(mask.tolist()) == set(scores[name].flatten().topk(len(mask)).indices.tolist())
    method._sensitivity.score = "random"
    drawn = method._sensitivity.masks(scores, 0.1, 4.0, generator)
    assert {n: len(m) for n, m in drawn.items()} == {n: len(m) for n, m in masks.items()}
    assert any(drawn[name].tolist() != masks[name].tolist() for name in masks)
    method._sensitivity.score = "fisher"
    with pytest.raises(BadInput, match="no adapted weight has a gradient"):
        method._sensitivity.masks({n: torch.zeros_like(s) for n, s in scores.items()}, 0.1, 1.0, generator)


# ---- invariants
@every_host
def test_supports_are_disjoint_and_grow_less_than_the_masks(host):
    notes = told(host)
    method = notes["method"]
    entries = len(owned(method))  # asserts that no position has two owners
    assert method.values["overlaps"][-1] > 0
    assert entries < sum(method.values["masks"])
    figures = method.plasticity()
    assert 0 < figures["support_share"] < figures["mask_share"] and figures["experts"] == len(method.values["experts"])
    experts = method.values["experts"]
    assert any(len(e) > 1 for e in experts) and [2] in experts and all(e == sorted(set(e)) for e in experts)


def test_without_split_growth_is_the_sum_of_the_masks():
    learner = learner_on("gpt2", split=False)
    for experience in cases.experiences("gpt2"):
        learner.learn(experience)
    method: Any = learner.methods[0]
    assert method.values["experts"] == [[0], [1], [2]] and method.values["overlaps"][-1] > 0
    assert sum(bank.size for bank in method.banks.values()) == sum(method.values["masks"])


@every_host
def test_a_new_task_changes_no_output(host):
    """Split, inherited gate rows and a new expert with zero values: the function is the same."""
    notes = told(host)
    assert torch.equal(notes["before"][0], notes["after"][0])
    for task in (1, 2):
        assert any(len(e) > 1 and e[-1] == task for e in notes["experts"][task]), "nothing was split"
        scale = (notes["before"][task] - notes["before"][0]).abs().max()
        assert scale > 1e-3, "nothing was learnt"
        assert (notes["after"][task] - notes["before"][task]).abs().max() < 1e-6 * scale


@every_host
def test_both_losses_begin_at_zero_and_then_act(host):
    notes = told(host)
    assert set(notes["losses"][0][0]) == {"loss"}
    for steps in notes["losses"][1:]:
        assert steps[0]["seta.anchor"] == 0 and steps[0]["seta.routing"] == 0
        assert steps[-1]["seta.anchor"] > 0 and steps[-1]["seta.routing"] > 0


@every_host
def test_past_unique_experts_keep_their_values_on_what_is_left_of_them(host):
    notes = told(host)
    for task in (1, 2):
        start, end, experts = notes["start"][task], notes["end"][task], notes["experts"][task]
        resting = [key for key, (expert, _) in start.items() if task not in experts[expert]]
        past_unique = [key for key in resting if len(experts[start[key][0]]) == 1]
        assert past_unique and all(end[key] == start[key] for key in resting)
        moving = [key for key in start if key not in set(resting)]
        assert sum(end[key] != start[key] for key in moving) > len(moving) / 2, "the trained experts did not move"
        shared = [key for key in moving if len(experts[start[key][0]]) > 1]
        assert any(end[key] != start[key] for key in shared)


@every_host
def test_open_experts_are_a_sparse_change_of_the_weights(host):
    """Conv1D's transposed weight and the slices of its fused query, key and value included."""
    learner, made = learner_on(host, gate="open"), cases.experiences(host, 2)
    for experience in made:
        learner.learn(experience)
    method: Any = learner.methods[0]
    found = outputs(learner, made)
    changes = []
    for site in method._sites:
        index, _, values, _ = method.banks[site.name].support()
        dense = torch.zeros(site.out_features * site.in_features, dtype=torch.float64)
        dense[index.long()] = values.double()
        changes.append((site, dense.view(site.out_features, site.in_features)))
    learner.detach()
    base = outputs(learner, made)
    with torch.no_grad():
        for site, dense in changes:
            site.part(site.module.weight).add_(dense)
    assert (found - base).abs().max() > 1e-3
    assert (outputs(learner, made) - found).abs().max() < 1e-9
    assert [n for n, _ in learner.methods[0].parameter_groups()[1]["params"]] == []


def test_the_first_task_with_an_open_gate_is_sparse_fine_tuning():
    """T = 1, g = 1: one expert of the top share, and nothing else moves."""
    learner = learner_on("gpt2", gate="open", density=0.05)
    made = cases.experiences("gpt2")
    learner.learn(made[0])
    method: Any = learner.methods[0]
    weights = sum(bank.in_features * bank.out_features for bank in method.banks.values())
    assert method.values["experts"] == [[0]] and len(owned(method)) == round(0.05 * weights)
    assert set(method.state_dict()[1]["values"]["experts"][0]) == {0}


# ---- oracle
GRANTED = {"task_id": "test"}


def test_the_oracle_without_sharing_forgets_nothing():
    learner = learner_on("gpt2", gate="oracle", split=False, protocol=GRANTED)
    made = with_tasks(cases.experiences("gpt2"))
    learner.learn(made[0])
    before = learner.evaluate(made[:1])
    for experience in made[1:]:
        learner.learn(experience)
    assert learner.evaluate(made[:1]) == before
    method: Any = learner.methods[0]
    with method._gate.decision.given([10] * len(made[0].train)):
        own = outputs(learner, made[:1])
    assert not torch.equal(own, outputs(learner, made[:1])), "the last task's experts give the same"


def test_the_oracle_bounds_the_learned_gate():
    made = with_tasks(cases.experiences("gpt2"))
    final = {}
    for gate in ("learned", "oracle"):
        learner = learner_on("gpt2", gate=gate, protocol=GRANTED, training={"epochs": 6})
        for experience in made:
            learner.learn(experience)
        final[gate] = sum(learner.evaluate(made).values()) / 3  # type: ignore[arg-type]
    assert final["oracle"] < final["learned"]


@pytest.mark.parametrize("task_id", ["none", "train"])
def test_the_protocol_must_grant_the_oracle_its_task_ids(task_id):
    with pytest.raises(ProtocolRefused, match=rf"protocol.task_id: is {task_id}, but seta .* set it to test"):
        learner_on("bert", gate="oracle", protocol={"task_id": task_id})
    learner_on("bert", protocol={"task_id": task_id}).detach()


def test_the_oracle_says_what_it_lacks():
    learner = learner_on("bert", gate="oracle", protocol=GRANTED)
    made = cases.experiences("bert")
    with pytest.raises(BadInput, match="needs task ids, which this stream does not give"):
        learner.learn(made[0])
    known = with_tasks(made)
    learner.learn(known[0])
    with pytest.raises(BadInput, match="needs the task of every row"):
        learner.predict(known[0].test)
    assert learner.evaluate(known)[1] is not None  # a task that was never learnt: all experts closed
    base = learner_on("bert", gate="oracle", protocol=GRANTED)
    method: Any = learner.methods[0]
    with method._gate.decision.given([11] * 12):
        assert torch.equal(outputs(learner, known[:1]), outputs(base, known[:1]))


def test_the_router_log_numbers_experts_at_rest_first():
    learner = learner_on("bert")
    made = cases.experiences("bert")
    for experience in made[:2]:
        learner.learn(experience)
    method: Any = learner.methods[0]
    experts, log = method.values["experts"], learner.services.router_log
    trains = [1 in e for e in experts]
    assert trains == [False, True, True]  # the rest of the first expert, what is shared, what is new
    summary = log.summary()
    assert set(summary) == set(method.banks)
    for figures in summary.values():
        assert figures["items"] == 3 and figures["new_items"] == 2 and figures["output_ratio"] > 0
        assert figures["new_share"] == pytest.approx(2 / 3) and 0 < figures["mass"] < 3


# ---- generation
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}


@pytest.mark.parametrize("host", ["gpt2", "llama"])
def test_the_decision_on_the_prompt_is_kept_through_generation(host):
    notes = told(host)
    learner, gate = notes["learner"], notes["method"]._gate
    prompt = torch.tensor([[256, 256, 72, 101, 108, 108], [120, 121, 122, 33, 97, 98]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    seen = []
    handle = learner.model.register_forward_hook(lambda *_: seen.append(gate.decision.gates))
    try:
        with torch.no_grad():
            learner.model(prompt[1:], use_cache=False)
            alone = seen.pop()[0, -1]
            cached = learner.model.generate(prompt, attention_mask=mask, use_cache=True, **OPTIONS)
            kept = [gates[:, -1] for gates in seen]
            assert [gates.shape[1] for gates in seen] == [6] + [1] * 7, "one token a step after the prompt"
            plain = learner.model.generate(prompt, attention_mask=mask, use_cache=False, **OPTIONS)
    finally:
        handle.remove()
    assert all(torch.equal(gates, kept[0]) for gates in kept)
    assert torch.allclose(kept[0][1], alone, atol=1e-12), "the other row and its padding play no part"
    assert (kept[0][0] - kept[0][1]).abs().max() > 1e-6, "the gate tells the rows apart"
    assert torch.equal(cached, plain)  # prompts are not shorter than prompt_tokens


def test_a_cache_that_the_gate_did_not_see_is_refused():
    learner = learner_on("llama")
    prompt = torch.tensor([[72, 101, 108]])
    with torch.no_grad():
        cache = learner.model(prompt, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(BadInput, match="another number of rows"):
            learner.model(prompt.repeat(2, 1)[:, :1], past_key_values=cache)
        learner.detach()
        cache = learner.model(prompt, use_cache=True).past_key_values
        again = Learner(learner.model, cases.ByteTokenizer(), method={"seta": SMALL}, objective="causal_lm")
        with pytest.raises(BadInput, match="filled without this gate"):
            again.model(prompt[:, :1], past_key_values=cache)


def test_plain_text_is_scored_without_a_look_ahead():
    notes = told("gpt2")
    model = notes["learner"].model
    ids = torch.tensor([[72, 101, 108, 108, 111, 32, 119, 111]])
    other = ids.clone()
    other[:, 3:] = 90
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False)[0][:, :3], model(other, use_cache=False)[0][:, :3])
        assert not torch.equal(model(ids, use_cache=False)[0][:, 3], model(other, use_cache=False)[0][:, 3])


# ---- refusals
def test_what_cannot_be_honoured_is_refused_by_name():
    with pytest.raises(BadInput, match=r"gate_layer: is 2, but the model has 2 blocks.*set it to 1 or less"):
        learner_on("bert", gate_layer=2)
    with pytest.raises(BadInput, match=r"layers: blocks \[0\] come before the gate's"):
        learner_on("bert", layers=[0, 1])
    with pytest.raises(ProtocolRefused, match="boundaries"):
        learner_on("bert", protocol={"boundaries": "none"})
    learner = learner_on("llama")
    enable = (
        getattr(learner.model, "activation_checkpointing_enable", None) or learner.model.gradient_checkpointing_enable
    )
    enable()
    with pytest.raises(BadInput, match="gradient checkpointing"):
        learner.learn(cases.experiences("llama")[0])


def test_rehearsed_rows_have_no_oracle():
    model, processor = cases.build_host("gpt2")
    learner = Learner(
        model, processor, method=[{"seta": {**SMALL, "gate": "oracle"}}, {"er": {"budget": 8, "per_step": 2}}],
        objective={"causal_lm": {"block_size": 32}}, protocol={"rehearsal": 8, "task_id": "test"},
        training={"per_device_train_batch_size": 4},
    )  # fmt: skip
    with pytest.raises(BadInput, match="does not know the tasks of rehearsed rows"):
        learner.learn(with_tasks(cases.experiences("gpt2"))[0])


def test_closing_past_experts():
    learner = learner_on("gpt2", close=1.0, routing=0.0, anchor=0.0)
    made = cases.experiences("gpt2")
    steps: list[dict[str, float]] = []
    for experience in made:
        steps.clear()
        learner.learn(experience, on_step=lambda _, losses: steps.append(losses))
    assert set(steps[0]) == {"loss", "seta.close"} and steps[-1]["seta.close"] < steps[0]["seta.close"]
