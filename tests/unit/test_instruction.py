"""The objective instruction: loss on the answer, score on what the model writes."""

import pytest
import torch

from perdure.data import question
from perdure.errors import BadInput
from perdure.learner import Learner
from perdure.objectives.causal_lm import CausalLM, PastPadding
from perdure.objectives.instruction import Instruction
from perdure.processors import ByteTokenizer
from perdure.registry import OBJECTIVES
from perdure.streams import Experience, Stream

TOKENIZER = ByteTokenizer()
ROWS = [{"prompt": "Q: two?\nA:", "answer": " 2"}, {"prompt": "Q: three?\nA:", "answer": " 3"}]
SHORT = {"max_prompt": 24, "max_answer": 6}


def objective(**settings):
    ((_, config),) = OBJECTIVES.parse({"instruction": {**SHORT, **settings}}, "objective")
    return OBJECTIVES.get("instruction")(config)


@pytest.fixture
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    ).eval()  # fmt: skip


def learner(model, **settings):
    training = {"learning_rate": 3e-3, "epochs": 60, "per_device_train_batch_size": 2}
    return Learner(
        model, TOKENIZER, method="finetune", objective={"instruction": {**SHORT, **settings.pop("objective", {})}},
        training={**training, **settings.pop("training", {})}, **settings,
    )  # fmt: skip


def stream(*parts):
    return Stream.of(list(parts))


def test_loss_and_batch_are_those_of_causal_lm(gpt2):
    ours = objective()
    ((_, config),) = OBJECTIVES.parse({"causal_lm": {"block_size": 48}}, "objective")
    plain = CausalLM(config)
    batches = [each.collate(each.encode(ROWS, TOKENIZER), ROWS) for each in (ours, plain)]
    assert torch.equal(batches[0].labels, batches[1].labels)
    with torch.no_grad():
        pairs = zip((ours, plain), batches, strict=True)
        losses = [float(each.loss(batch, each.forward(gpt2, None, batch))[0]) for each, batch in pairs]
    assert losses[0] == losses[1] > 0


def test_prompt_and_answer_are_cut_apart():
    row = {"prompt": "abcdefghij", "answer": "klmnopq"}
    ((_, config),) = OBJECTIVES.parse({"instruction": {"max_prompt": 3, "max_answer": 4}}, "objective")
    encoded = Instruction(config).encode([row], TOKENIZER)[0]
    # The token that opens a text stays in front of the prompt's end.
    assert encoded["input_ids"] == [TOKENIZER.bos_token_id, *b"ijklmn"]
    assert [label for label in encoded["labels"] if label != -100] == encoded["input_ids"][3:]


def test_what_was_learnt_is_written_and_scored(gpt2):
    taught = learner(gpt2)
    first = stream((ROWS, ROWS))
    before = taught.evaluate(first.seen or [first.experience(0)])[0]
    taught.learn(first.experience(0))
    state = torch.get_rng_state()
    after = taught.evaluate([first.experience(0)])[0]
    assert before == 0 and after == 1
    assert torch.equal(state, torch.get_rng_state()) and not gpt2.training
    wrong = stream((ROWS, [{**ROWS[0], "answer": " 9"}, ROWS[1]]))
    assert taught.evaluate([wrong.experience(0)])[0] == 0.5


def test_batches_of_one_and_of_many_write_the_same(gpt2):
    taught = learner(gpt2)
    taught.learn(stream((ROWS, ROWS)).experience(0))
    prompts = ["Q: two?\nA:", "Q: three?\nA:", "A much longer question, two?\nA:"]
    rows = [{"prompt": prompt, "answer": "x"} for prompt in prompts]
    batch = taught.objective.collate(taught.objective.encode(rows, TOKENIZER), rows)
    together = taught.objective.write(gpt2, TOKENIZER, batch).texts
    alone = []
    for row in rows:
        single = taught.objective.collate(taught.objective.encode([row], TOKENIZER), [row])
        alone += taught.objective.write(gpt2, TOKENIZER, single).texts
    assert together == alone and together[:2] == [" 2", " 3"]


class NoPad(ByteTokenizer):
    pad_token_id = None  # then the end token is padded with


@pytest.mark.parametrize("rules", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}])
def test_rules_of_generation_do_not_read_the_padding(gpt2, rules):
    taught = learner(gpt2)
    taught.learn(stream((ROWS, ROWS)).experience(0))
    rows = [*ROWS, {"prompt": "A much longer question", "answer": "x"}]
    ours, alone = objective(**rules), []
    for each in ([row] for row in rows):
        batch = ours.collate(ours.encode(each, NoPad()), each)
        alone += ours.write(gpt2, NoPad(), batch).texts
    batch = ours.collate(ours.encode(rows, NoPad()), rows)
    assert ours.write(gpt2, NoPad(), batch).texts == alone
    beams = ours.generate(gpt2, NoPad(), rows, 4, 3, num_beams=2, **rules)
    assert beams == [ours.generate(gpt2, NoPad(), [row], 4, 1, num_beams=2, **rules)[0] for row in rows]


def test_a_rule_sees_a_row_from_its_first_real_token():
    from transformers import RepetitionPenaltyLogitsProcessor

    rule = PastPadding([RepetitionPenaltyLogitsProcessor(2.0)], [2, 0])
    scores = rule(torch.tensor([[3, 3, 1], [2, 1, 2]]), torch.ones(2, 4))
    assert scores.tolist() == [[1, 0.5, 1, 1], [1, 0.5, 0.5, 1]]


def test_the_models_own_habits_of_generation_are_off(gpt2):
    rows = [{"prompt": "aaaa", "answer": "x"}]
    batch = objective().collate(objective().encode(rows, TOKENIZER), rows)
    plain = objective(max_answer=20).write(gpt2, TOKENIZER, batch).texts
    gpt2.generation_config.update(num_beams=4, repetition_penalty=9.0, no_repeat_ngram_size=1)
    assert objective(max_answer=20).write(gpt2, TOKENIZER, batch).texts == plain


# ---- conversations
def talker():
    """A fast tokenizer of bytes whose template closes a turn with a token that is not the end token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(text, special=True) for text in ("<b>", "<e>", "</turn>")])
    made = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<b>", eos_token="<e>", pad_token="<e>")
    made.chat_template = (
        "<b>{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</turn>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return made


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_what_was_learnt_from_conversations_ends_with_the_turn(gpt2):
    rows = [talk("two?", "2"), talk("three?", "3")]
    taught = Learner(
        gpt2, talker(), method="finetune", objective={"instruction": SHORT},
        training={"learning_rate": 3e-3, "epochs": 60, "per_device_train_batch_size": 2},
    )  # fmt: skip
    experience = stream((rows, rows)).experience(0)
    taught.learn(experience)
    assert taught.evaluate([experience])[0] == 1
    assert taught.objective.generate(gpt2, talker(), rows, 6) == ["2", "3"]


def test_a_long_conversation_is_cut_as_a_prompt_with_its_answer():
    tokenizer = talker()
    ((_, config),) = OBJECTIVES.parse({"instruction": {"max_prompt": 4, "max_answer": 3}}, "objective")
    encoded = Instruction(config).encode([talk("question", "klmnop")], tokenizer)[0]
    assert tokenizer.decode(encoded["input_ids"]) == "<b></turn>a:klm"
    assert tokenizer.decode([label for label in encoded["labels"] if label != -100]) == "klm"
    assert len(encoded["labels"]) == len(encoded["input_ids"])
    ((_, config),) = OBJECTIVES.parse({"causal_lm": {"block_size": 6}}, "objective")
    encoded = CausalLM(config).encode([talk("question", "klmnop")], tokenizer)[0]
    assert tokenizer.decode(encoded["input_ids"]) == "<b>mnop</turn>" and len(encoded["labels"]) == 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "answer": "x"}, "row 0: field 'prompt' gives no token, found ''"),
        (talk("q", ""), "row 0: the assistant's last turn in 'messages' is empty"),
        (talk("q", None), "row 0: field 'messages': the last answer and its question must be texts.*NoneType and str"),
        (talk(["q"], "a"), "row 0: field 'messages': the last answer and its question must be texts.*str and list"),
        ({"messages": talk("q", "a")["messages"][1:]}, "row 0: field 'messages' does not begin with a question"),
    ],
)
def test_rows_that_could_not_be_scored_are_refused_before_learning(row, message):
    with pytest.raises(BadInput, match=message):
        objective().check([row], talker())


def test_prompt_and_answer_go_before_messages_in_the_score_as_in_training():
    row = {"prompt": "p", "answer": "a", **talk("q", "m")}
    assert float(objective().grade([row], ["a"], "x")[0]) == 1


def test_each_experience_has_its_scorer():
    ours = objective(scorer="exact_match", scorers={"sums": "number"})
    rows = [{"prompt": "", "answer": "2"}, {"prompt": "", "answer": "3"}]
    assert [float(x) for x in ours.grade(rows, ["it is 2.0", "3"], "sums")] == [2, 2]
    assert [float(x) for x in ours.grade(rows, ["it is 2.0", "3"], "letters")] == [1, 2]


def test_a_conversation_is_scored_on_its_last_turn():
    messages = [
        {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"},
    ]  # fmt: skip
    assert float(objective().grade([{"messages": messages}], ["2"], "x")[0]) == 1
    with pytest.raises(BadInput, match="row 0: field 'messages' does not end with the assistant's turn"):
        objective().grade([{"messages": messages[:3]}], ["2"], "x")


def test_no_method_sees_an_answer(gpt2):
    seen = []

    taught = learner(gpt2)

    def peek(batch, forward):
        seen.extend(batch.rows)
        return forward(batch)

    taught.methods[0].predict = peek
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
    taught.evaluate([stream((ROWS, ROWS)).experience(0)])
    assert [set(row) for row in seen] == [{"prompt"}] * 2
    assert question({"messages": messages, "answer": "2"}) == {"messages": messages[:1]}


def test_rules_of_generation_are_kept(gpt2, monkeypatch):
    rows = [{"prompt": "aaaa", "answer": "x"}]
    batch = objective().collate(objective().encode(rows, TOKENIZER), rows)
    written, generate = [], gpt2.generate
    monkeypatch.setattr(gpt2, "generate", lambda **given: written.append(generate(**given)) or written[-1])
    for rules in ({}, {"no_repeat_ngram_size": 1}, {"repetition_penalty": 9.0}):
        objective(max_answer=20, max_prompt=3, **rules).write(gpt2, TOKENIZER, batch)
    plain, once, dear = (ids[0].tolist() for ids in written)
    assert plain[:3] == once[:3] == [TOKENIZER.bos_token_id, *b"aa"] and len(plain) == len(once) == 23
    assert len(set(once[3:])) == 20 > len(set(plain[3:])) and dear != plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "bleu"}, r"objective.instruction.scorer: .*'bleu' is unknown; known: exact_match"),
        ({"scorers": {"sums": "bleu"}}, r"objective.instruction.scorers: .*'bleu' is unknown"),
        ({"max_prompt": 100}, r"objective.instruction: max_prompt 100 and max_answer 6 are more than the model's 48"),
    ],
)
def test_bad_settings_are_named(gpt2, settings, message):
    with pytest.raises(BadInput, match=message):
        learner(gpt2, objective=settings)


def test_rows_without_an_answer_are_refused(gpt2):
    bad = Experience(0, "0", [{"text": "plain"}], [], [])
    with pytest.raises(BadInput, match="row 0: field 'text' has no answer to learn; give `prompt` and `answer`"):
        learner(gpt2).learn(bad)
