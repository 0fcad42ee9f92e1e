"""What a user types in Python, on a model and rows of their own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

import perdure
from perdure.errors import BadInput
from perdure.processors import ByteTokenizer
from perdure.streams import Stream

from . import tiny

SIZE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def bert() -> transformers.BertModel:
    torch.manual_seed(3)
    return transformers.BertModel(transformers.BertConfig(**SIZE, max_position_embeddings=64), add_pooling_layer=False)


def test_ten_lines_on_ones_own_model_and_rows(tmp_path: Path):
    model, tokenizer = bert(), ByteTokenizer()
    labels = ["alpha", "bravo", "delta", "gamma"]
    parts = [[row for label in pair for row in tiny.rows(label, 24, 0)] for pair in (labels[:2], labels[2:])]
    tests = [[row for label in pair for row in tiny.rows(label, 8, 1)] for pair in (labels[:2], labels[2:])]
    stream = Stream.of(list(zip(parts, tests, strict=True)))

    learner = perdure.Learner(
        model, tokenizer, method={"moram": {"rank": 4}}, head={"ridge": {"features": 64}},
        training={"learning_rate": 3e-3, "per_device_train_batch_size": 8},
        objective={"classification": {"max_length": 48}},
    )  # fmt: skip
    for experience in stream:
        learner.learn(experience)
        scores = learner.evaluate(stream.seen)
        assert set(scores) == set(range(experience.index + 1))
    assert learner.model is model and learner.seen == labels
    assert sum(scores.values()) / 2 > 0.6  # the label's letters stand in the text; chance is .25
    learner.save_pretrained(tmp_path / "kept")

    rows = [{"text": row["text"]} for row in tests[0] + tests[1]]
    again = perdure.Learner.from_pretrained(tmp_path / "kept", bert(), ByteTokenizer())
    assert again.predict(rows) == learner.predict(rows)
    assert again.evaluate(stream.seen) == scores
    again.partial_fit(tiny.rows("omega", 6, 0))  # and it goes on learning
    assert again.seen == [*labels, "omega"]

    torch.manual_seed(9)
    other = transformers.BertModel(transformers.BertConfig(**SIZE, max_position_embeddings=64), add_pooling_layer=False)
    with pytest.raises(BadInput, match="model: its weights"):
        perdure.Learner.from_pretrained(tmp_path / "kept", other, ByteTokenizer())
    learner.detach()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), bert().parameters(), strict=True))


def gpt() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=257, eos_token_id=258
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_language_model_learns_and_still_generates(tmp_path: Path):
    model, tokenizer = gpt(), ByteTokenizer()
    texts = [[{"text": f"{name} has {name} and {name} and {name}"} for _ in range(16)] for name in ("abab", "cdcd")]
    stream = Stream.of([(rows, rows[:4]) for rows in texts])
    learner = perdure.Learner(
        model, tokenizer, method={"moram": {"rank": 4}}, objective={"causal_lm": {"block_size": 48}},
        training={"learning_rate": 1e-2, "per_device_train_batch_size": 8, "epochs": 4},
    )  # fmt: skip
    before = learner.evaluate([stream.experience(0)])[0]
    for experience in stream:
        learner.learn(experience)
    scores = learner.evaluate(stream.seen)
    assert all(math.isfinite(score) for score in scores.values()) and scores[0] < 0.9 * before
    prompt = torch.tensor([tokenizer.encode("cdcd has", add_special_tokens=False)])
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(prompt, use_cache=True, **how)
    assert with_cache.shape == (1, prompt.shape[1] + 6)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **how))
    learner.save_pretrained(tmp_path / "kept")
    again = perdure.Learner.from_pretrained(tmp_path / "kept", gpt(), tokenizer)
    assert torch.equal(again.model.generate(prompt, use_cache=True, **how), with_cache)
    with pytest.raises(BadInput, match="generate"):
        learner.predict([{"text": "a"}])


MINE = """
from perdure import yamltext  # a user's file may use the library
from perdure.methods import Method, register


@register("half_bias")
class HalfBias(Method):
    '''Trains one bias of the last layer: a user's own method.'''

    adapts = True

    def attach(self, host):
        self.bias = host.blocks()[-1].module.output.dense.bias

    def parameter_groups(self):
        return [{"params": [("bias", self.bias)]}]

    def touched(self):
        return [("bias", self.bias)]

    def state_dict(self):
        return {"bias": self.bias.detach()}, {"values": {}}

    def load_state_dict(self, tensors, values):
        self.bias.data.copy_(tensors["bias"])
"""


def test_a_users_own_method_from_a_file_is_killed_and_resumed_too(tmp_path: Path, nursery):
    from .nursery import point

    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    recipe = str(tiny.write_recipe(tmp_path, "half_bias"))

    def run(folder: str, *at):
        return nursery.run(
            tmp_path, "run", recipe, f"output_dir={folder}", "--import", "mine.py", "--no-progress", at=at
        )

    done = run("whole")
    assert done.code == 0, done.output
    assert tiny.report(tmp_path / "whole")["method"] == "half_bias"
    assert tiny.report(tmp_path / "whole")["cost"]["trainable_parameters"] > 16
    assert run("run", point("update", 7)).code == -9
    assert run("run").code == 0
    assert tiny.differences(tmp_path / "whole", tmp_path / "run") == []
    told = nursery.run(tmp_path, "methods", "half_bias", "--import", "mine.py")
    assert told.code == 0 and "a user's own method" in told.output
