"""L2P: what is chosen, what pulls the keys, what a token may see, what is refused."""

from __future__ import annotations

import pytest
import torch
from hosts_tiny import WIDTH, build, inputs, result
from prompt_methods import clones, learner, prose, strong, texts

from perdure.attachment import attach, detach
from perdure.config import MethodConfig
from perdure.errors import BadInput
from perdure.layers import PromptPool
from perdure.methods import Method

SMALL = {"l2p": {"size": 5, "length": 2, "top_n": 2, "prompt_tokens": 4}}
LM = {"causal_lm": {"block_size": 32}}


def pool(**more) -> PromptPool:
    made = PromptPool(6, 5, 3, 2, generator=torch.Generator().manual_seed(2), **more).double()
    return made


def plain_choice(queries, keys, top_n):
    """By loops: numbers of the nearest keys, and their cosines."""
    chosen, found = [], []
    for q in queries:
        cosines = [float(q @ k / (q.norm() * k.norm())) for k in keys]
        best = sorted(range(len(keys)), key=lambda m: -cosines[m])[:top_n]
        chosen.append(best)
        found.append([cosines[m] for m in best])
    return chosen, found


def test_choice_tokens_and_pull_against_loops():
    made = pool()
    queries = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made.take(queries, None)
    chosen, cosines = plain_choice(queries, made.keys.detach(), 2)
    choice = made.choice
    assert choice.chosen.tolist() == chosen and len({tuple(c) for c in chosen}) > 1
    torch.testing.assert_close(choice.cosines, torch.tensor(cosines, dtype=torch.float64))
    expected = torch.stack([torch.cat([made.prompts[m] for m in row]) for row in chosen])
    torch.testing.assert_close(choice.tokens, expected, atol=0, rtol=0)
    # gradients: of the pull with regard to the keys by the quotient rule, of the tokens with regard to the prompts
    (1 - choice.cosines).sum(1).mean().backward()
    by_hand = torch.zeros_like(made.keys)
    for q, row in zip(queries, chosen, strict=True):
        for m in row:
            k = made.keys[m].detach()
            by_hand[m] -= (q / (q.norm() * k.norm()) - (q @ k) * k / (q.norm() * k.norm() ** 3)) / len(queries)
    torch.testing.assert_close(made.keys.grad, by_hand, atol=1e-12, rtol=1e-10)
    assert made.prompts.grad is None
    made.take(queries, None)
    made.choice.tokens.sum().backward()
    counts = [sum(m in row for row in chosen) for m in range(5)]
    assert made.prompts.grad[:, 0, 0].tolist() == counts
    torch.testing.assert_close(made.keys.grad, by_hand, atol=1e-12, rtol=1e-10)  # tokens do not move the keys


def test_a_vote_takes_what_most_rows_chose():
    made, asked = pool(vote=True), pool()
    queries = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made.take(queries, None)
    asked.take(queries, None)
    votes = torch.bincount(asked.choice.chosen.flatten(), minlength=5).tolist()
    best = sorted(range(5), key=lambda m: (-votes[m], m))[:2]
    assert made.choice.chosen.tolist() == [best] * 7 and asked.choice.chosen.tolist() != [best] * 7


@pytest.mark.parametrize(("vote", "alone"), [(False, True), (True, False)])
def test_a_row_depends_on_no_other_row_unless_they_vote(vote, alone):
    model, fed = build("BertModel"), inputs("BertModel", batch=6)
    attach(model, {"l2p": {**SMALL["l2p"], "size": 12, "vote": vote}})
    strong(type("Made", (), {"model": model}))
    together = result(model, **fed)
    single = torch.cat([result(model, input_ids=row[None]) for row in fed["input_ids"]])
    assert torch.allclose(together, single, atol=1e-4) == alone
    detach(model)


def test_learning_moves_keys_and_prompts_alone_and_counts_the_query_pass():
    model = build("BertModel", vocab_size=300)
    made, before, logged = learner(model, SMALL, epochs=2, logging_steps=1), {}, []
    base = clones(made.frozen_base())
    before |= clones(made.methods[0].modules["query"].state_dict())
    made.learn(texts(0), on_step=lambda _, losses: logged.append(losses["l2p.keys"]))
    after = made.methods[0].modules["query"].state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in ("keys", "prompts"))
    assert all(torch.equal(base[name], tensor) for name, tensor in made.frozen_base().items())
    assert made.counters.extra_rows == 24 and made.counters.extra_passes == 1
    assert logged[-1] < logged[0]  # the chosen keys come nearer
    made.learn(texts(1))
    assert made.counters.extra_rows == 48 and made.counters.extra_passes == 2


def test_the_key_loss_is_the_mean_over_rows_of_the_pull():
    made = learner(build("BertModel", vocab_size=300), {"l2p": {**SMALL["l2p"], "key_weight": 0.5}})
    batch = next(made.batches(texts(0).train, unlabelled=True))
    output = made.forward(batch)
    query, keys = made.methods[0].modules["query"].choice.query, made.methods[0].modules["query"].keys
    _, cosines = plain_choice(query, keys.detach(), 2)
    expected = 0.5 * sum(1 - c for row in cosines for c in row) / len(cosines)
    assert float(made.methods[0].losses(batch, output)["keys"].detach()) == pytest.approx(expected, rel=1e-5)
    assert made.methods[0].losses(batch, output) == {}  # once for each forward pass


# ---- language models
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_no_token_sees_what_comes_after_it(name):
    model, fed = build(name), inputs(name, tokens=8)
    plain = result(model, **fed)
    attach(model, SMALL)
    strong(type("Made", (), {"model": model}))
    changed = result(model, **fed)
    torch.testing.assert_close(changed[:, :3], plain[:, :3], atol=1e-5, rtol=0)  # before the query is known
    assert bool(((changed - plain)[:, 3:].abs().amax(-1) > 1e-3).all())
    for moved in (2, 5):
        later = {"input_ids": fed["input_ids"].clone()}
        later["input_ids"][:, moved:] = 6
        torch.testing.assert_close(result(model, **later)[:, :moved], changed[:, :moved], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["l2p", "dual_prompt", "coda_prompt"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_generation_keeps_the_choice_of_the_prompt(name, method):
    """A left-padded batch of prompts, with a cache and without; a prompt shorter than the limit only has to work."""
    settings = {
        "l2p": SMALL["l2p"], "coda_prompt": {"components": 3, "prompt_tokens": 4},
        "dual_prompt": {"general_layers": [0], "expert_layers": [1], "prompt_tokens": 4},
    }[method]  # fmt: skip
    made = learner(build(name, vocab_size=300), {method: settings}, LM)
    made.learn(prose(0)).learn(prose(1))
    model = strong(made, 30.0).model
    prompt = torch.tensor([[0, 0, 7, 8, 9, 17], [11, 12, 13, 14, 15, 16]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = (prompt != 0).long()
    found = [model.generate(prompt, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)
    short = model.generate(prompt[1:, :2], attention_mask=mask[1:, :2], **options)
    assert short.shape == (1, 8)
    cache = model(input_ids=prompt[1:], use_cache=True).past_key_values
    model(input_ids=prompt[1:].flip(1))  # the choice of other texts in between is not taken for this one's
    with torch.no_grad():
        later = model(input_ids=torch.tensor([[9, 4]]), past_key_values=cache).logits
        whole = model(input_ids=torch.cat((prompt[1:], torch.tensor([[9, 4]])), 1), use_cache=False).logits
    torch.testing.assert_close(later, whole[:, -2:], atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="past_key_values: .*another number of rows"):
        model(input_ids=torch.tensor([[4], [5]]), past_key_values=cache)


# ---- refused
def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(BadInput, match="top_n is 6, more than the size 5"):
        learner(build("BertModel", vocab_size=300), {"l2p": {"size": 5, "top_n": 6}})


class Unsaid(Method):
    """Trains a parameter of the host and does not declare it."""

    name = "unsaid"

    def attach(self, host):
        self._named = host.named_parameters()[:1]

    def parameter_groups(self):
        return [{"params": self._named}]


def test_a_host_that_trains_is_refused_before_the_first_step():
    made = learner(build("BertModel", vocab_size=300), [SMALL, Unsaid(MethodConfig())])
    with pytest.raises(BadInput, match="method.l2p: its query is that of the frozen host, but .*weight trains too"):
        made.learn(texts(0))
    assert made.counters.steps == 0 and made.counters.extra_rows == 0


def test_texts_that_end_before_the_prompts_are_seen_are_refused():
    made = learner(build("GPT2LMHeadModel", vocab_size=300), {"l2p": {"prompt_tokens": 40}}, LM)
    with pytest.raises(BadInput, match="method.l2p.prompt_tokens: is 40, and no text .* more than 2\\d tokens"):
        made.learn(prose(0))


def test_gradient_checkpointing_is_refused():
    model = build("BertModel", vocab_size=300)
    model.gradient_checkpointing_enable()
    with pytest.raises(BadInput, match="gradient checkpointing .* method l2p cannot honour"):
        learner(model, SMALL).learn(texts(0))


def test_a_part_of_the_model_has_no_query():
    model = build("BertModel")
    attach(model, SMALL)
    with pytest.raises(BadInput, match="prompts: no query was taken, a block has 2 rows"):
        model.encoder(torch.zeros(2, 3, WIDTH))
