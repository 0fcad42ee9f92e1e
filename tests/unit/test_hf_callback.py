"""Under the Hugging Face Trainer a method does what it does under the Learner: same batches, same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import perdure
from perdure.streams import Experience
from tests.unit import trainers
from tests.unit.trainers import texts, tokens

METHODS: dict[str, Any] = {
    "lora": {"lora": {"rank": 2}},
    "moram": {"moram": {"rank": 2, "top_k": 2}},
    "moram-protected": {"moram": {"rank": 2, "top_k": 2, "protect": {"inputs": 0.5}}},
    "ewc": {"ewc": {"strength": 50.0}},
    "codyra": {"codyra": {"rank": 3, "threshold": 0.3}},
    "olora": {"olora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "lambda2": 0.01}},
    "lora+lwf": [{"lora": {"rank": 2}}, "lwf"],
    "lora+l2": [{"lora": {"rank": 2}}, {"l2_anchor": {"strength": 0.5}}],
    "apn": {"apn": {"patches": 6, "top_k": 2, "rank": 3}},
    "seta": {"seta": {"density": 0.1, "gate_layer": 1, "prompt_tokens": 4, "draws": 8, "smallest": 4}},
}
DOMAINS = [texts("ab", 10), texts("cd", 9)]


def by_learner(method: Any) -> tuple[perdure.Learner, list[list[int]]]:
    """A Learner after two experiences, and the order in which it took their rows."""
    model, tokenizer = trainers.language_model(), trainers.ByteTokenizer()
    learner = perdure.Learner(
        model, tokenizer, method=method, objective={"causal_lm": {"block_size": 32}}, seed=3,
        training={
            "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "logging_steps": 1,
        },
    )  # fmt: skip
    taken = []
    for number, rows in enumerate(DOMAINS):
        taken.append(learner._plan(rows).order(0).tolist())
        learner.learn(Experience(number, str(number), rows))
    return learner, taken


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_ends_with_the_weights_of_the_learner(name: str, tmp_path: Any) -> None:
    learner, taken = by_learner(METHODS[name])
    callback = perdure.PerdureCallback(METHODS[name])
    trainer = callback.bind(trainers.trainer(tmp_path, trainers.language_model(), tokens(DOMAINS[0]), seed=3))
    for rows, order in zip(DOMAINS, taken, strict=True):
        trainer.train_dataset, trainer.order = tokens(rows), order
        trainer.train()
    expected, found = learner.learnt_state()[0], callback._bound().learnt_state()[0]
    assert expected.keys() == found.keys()
    start = dict(trainers.language_model().state_dict())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=2e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    # a check of stillness: the two agree on something that has moved
    batch = trainers.collate(tokens(DOMAINS[0]))
    fresh = trainers.language_model()
    fresh.load_state_dict(start)
    with torch.no_grad():
        scores = [m.eval()(**batch).logits for m in (learner.model, trainer.model, fresh)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[1], scores[2], atol=1e-3)
