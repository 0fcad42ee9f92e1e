"""DualPrompt: one expert an experience, found by its key at test; what is old does not move."""

from __future__ import annotations

import pytest
import torch
from hosts_tiny import build, inputs, result
from prompt_methods import clones, learner, prose, strong, texts

from perdure.attachment import attach
from perdure.errors import BadInput, ProtocolRefused
from perdure.hosts import Host, PrefixAdapter
from perdure.layers import ExpertKeys, StaticPrefix

SMALL = {"general_length": 2, "general_layers": [0], "expert_length": 3, "expert_layers": [1]}


def trained(name: str = "BertModel", **more):
    made = learner(build(name, vocab_size=300), {"dual_prompt": {**SMALL, **more}}, epochs=2, logging_steps=1)
    return made.learn(texts(0)).learn(texts(1))


def test_training_takes_the_newest_key_and_use_the_nearest():
    keys = ExpertKeys(6).double()
    queries = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys.take(queries, None)
    assert keys.choice.chosen is None  # nothing was learnt
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        keys.pool.freeze()
        keys.add(generator)
    every = keys.pool.whole("keys").detach()
    assert every.shape == (3, 6)
    cosines = [[float(q @ k / (q.norm() * k.norm())) for k in every] for q in queries]
    keys.train().take(queries, None)
    assert keys.choice.chosen.tolist() == [[2]] * 5
    torch.testing.assert_close(keys.choice.cosines, torch.tensor([[c[2]] for c in cosines], dtype=torch.float64))
    keys.eval().take(queries, None)
    nearest = [[c.index(max(c))] for c in cosines]
    assert keys.choice.chosen.tolist() == nearest and len({n for (n,) in nearest}) > 1
    assert keys.choice.cosines is None  # nothing pulls in use


def test_old_experts_and_keys_stay_byte_for_byte_and_general_prompts_move():
    made = learner(build("BertModel", vocab_size=300), {"dual_prompt": SMALL}, epochs=2, weight_decay=0.1)
    made.learn(texts(0))
    first, base = clones(made.methods[0].state_dict()[0]), clones(made.frozen_base())
    began = {}

    def on_step(loop, _):
        if loop.position.step == 1:
            began.update(clones(dict(loop.named_trainable())))

    made.learn(texts(1), on_step=on_step)
    second = made.methods[0].state_dict()[0]
    for name in ("modules/1.expert/old_P", "modules/query/pool.old_keys"):
        assert len(first[name]) == 1 and len(second[name]) == 2
        assert torch.equal(second[name][:1], first[name])
        assert not torch.equal(second[name][1:], began[f"method/0/{name[8:].replace('/', '.').replace('old', 'new')}"])
    assert not torch.equal(second["modules/0.general/P"], first["modules/0.general/P"])
    assert all(torch.equal(base[name], tensor) for name, tensor in made.frozen_base().items())


@pytest.mark.parametrize(("start", "same"), [("previous", True), ("fresh", False)])
def test_where_a_new_expert_starts(start, same):
    made = learner(build("BertModel", vocab_size=300), {"dual_prompt": {**SMALL, "start": start}}).learn(texts(0))
    method = made.methods[0]
    method.before_experience(texts(1))
    expert, keys = method.modules["1.expert"], method.modules["query"].pool
    assert torch.equal(expert.new_P[0], expert.old_P[0]) == same
    assert not torch.equal(keys.new_keys[0], keys.old_keys[0])


@pytest.mark.parametrize("name", ["BertModel", "LlamaModel"])
def test_a_row_gets_the_prefixes_of_its_expert(name):
    """The same as the bare host with that expert's rows put in front by hand."""
    made = strong(trained(name))
    batch = next(made.batches([*texts(0).train, *texts(1).train], unlabelled=True))
    found = result(made.model, **batch.inputs)
    method = made.methods[0]
    general, expert = method.modules["0.general"], method.modules["1.expert"]
    chosen = method.modules["query"].choice.chosen[:, 0].tolist()
    assert general.P.shape[-1] == (32 if name == "BertModel" else 16)  # two key heads of four
    for row, number in enumerate(chosen):
        bare = build(name, vocab_size=300)
        for layer, start in ((0, general.P), (1, expert.old_P[number])):
            PrefixAdapter(Host(bare).blocks()[layer], StaticPrefix(start.detach().clone()))
        one = {key: value[row : row + 1] for key, value in batch.inputs.items()}
        real = one["attention_mask"][0].bool()
        torch.testing.assert_close(found[row][real], result(bare, **one)[0][real], atol=1e-5, rtol=1e-5)


def test_the_key_loss_pulls_the_current_key_alone():
    made = learner(build("BertModel", vocab_size=300), {"dual_prompt": {**SMALL, "key_weight": 2.0}}).learn(texts(0))
    method = made.methods[0]
    method.before_experience(texts(1))
    batch = next(made.batches(texts(1).train, unlabelled=True))
    made.model.train()
    loss = method.losses(batch, made.forward(batch))["keys"]
    keys = method.modules["query"]
    key = keys.pool.new_keys[0].detach()
    expected = [1 - float(q @ key / (q.norm() * key.norm())) for q in keys.choice.query]
    assert float(loss.detach()) == pytest.approx(2 * sum(expected) / len(expected), rel=1e-5)


def test_a_language_model_sees_experts_from_the_last_token_of_the_query_on():
    made = learner(
        build("GPT2LMHeadModel", vocab_size=300),
        {"dual_prompt": {**SMALL, "general_layers": [], "prompt_tokens": 4}},
        {"causal_lm": {"block_size": 32}},
    )
    strong(made.learn(prose(0)).learn(prose(1)))
    fed = inputs("GPT2LMHeadModel", tokens=8)
    changed, plain = result(made.model, **fed), result(build("GPT2LMHeadModel", vocab_size=300), **fed)
    torch.testing.assert_close(changed[:, :3], plain[:, :3], atol=1e-5, rtol=0)
    assert bool(((changed - plain)[:, 3:].abs().amax(-1) > 1e-3).all())


# ---- refused
@pytest.mark.parametrize("beside", [{"er": {"budget": 8, "per_step": 2}}, "joint"])
def test_rows_of_older_experiences_are_refused(beside):
    with pytest.raises(BadInput, match="method.dual_prompt: rows of older experiences .* take l2p or coda_prompt"):
        learner(build("BertModel", vocab_size=300), [{"dual_prompt": SMALL}, beside], protocol={"rehearsal": 8})


def test_without_boundaries_or_without_a_block_it_is_refused():
    with pytest.raises(ProtocolRefused, match="boundaries"):
        learner(build("BertModel", vocab_size=300), {"dual_prompt": SMALL}, protocol={"boundaries": "none"})
    model = build("BertModel")
    with pytest.raises(BadInput, match=r"expert_layers: the default \[2, 3, 4\] names no block of BertModel"):
        attach(model, "dual_prompt")
    assert not Host(model).attached()
