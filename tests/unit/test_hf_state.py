"""Under the Trainer: checkpoints and resuming, the forgetting report, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import perdure
from perdure.errors import BadInput
from tests.unit import trainers

METHOD: Any = [{"moram": {"rank": 2, "top_k": 2, "dropout": 0.1}}, {"ewc": {"strength": 20.0, "rows": 6}}]
TRAIN = {"ab": trainers.classes("ab", 10), "cd": trainers.classes("cd", 9)}
TEST = {"ab": trainers.classes("ba", 4), "cd": trainers.classes("dc", 4)}


class StopAt(TrainerCallback):
    """An error after so many steps of one experience."""

    def __init__(self, experience: str, step: int):
        self.experience, self.step = experience, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.output_dir.endswith(self.experience):
            raise KeyboardInterrupt


def sequence(
    folder: Path, resume: bool = False, stop: StopAt | None = None, **changes: Any
) -> tuple[perdure.PerdureCallback, Any]:
    """The loop of a user's script, in which every random draw takes part: shuffling, dropout, growth."""
    from transformers import Trainer

    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **changes}
    callback = perdure.PerdureCallback(METHOD)
    trainer = callback.bind(
        Trainer(
            trainers.classifier(dropout=0.1), trainers.arguments(folder, **settings), train_dataset=TRAIN["ab"],
            eval_dataset=TEST, data_collator=trainers.collate, callbacks=[stop] if stop else None,
        )
    )  # fmt: skip
    for rows in TRAIN.values():
        trainer.train_dataset = rows
        trainer.train(resume_from_checkpoint=resume)
    return callback, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[perdure.PerdureCallback, Any, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return *sequence(folder), folder


def test_a_script_that_was_killed_goes_on_where_it_was_to_the_bit(whole: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sequence(tmp_path, stop=StopAt("experience-2", 2))
    assert sorted(path.name for path in (tmp_path / "experience-2").iterdir()) == ["checkpoint-1"]
    callback, trainer = sequence(tmp_path, resume=True)
    expected = whole[1].model.state_dict()
    found = trainer.model.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert callback.matrix == whole[0].matrix
    a, b = (c._bound().state_dict()[0] for c in (whole[0], callback))
    assert [name for name in a if name.startswith(("method", "host_head")) and not torch.equal(a[name], b[name])] == []
    # all was learnt: the script does nothing but load
    again, _ = sequence(tmp_path, resume=True)
    assert again.matrix == whole[0].matrix and again._bound().counters.steps == whole[0]._bound().counters.steps


def test_the_report_holds_the_matrix(whole: Any) -> None:
    callback, trainer, folder = whole
    report = json.loads((folder / "report.json").read_text())
    assert report["matrix"] == [[callback.matrix[0][0], None], callback.matrix[1]]
    assert all(0 <= cell <= 1 for row in callback.matrix for cell in row)
    assert report["details"]["stream"]["experiences"] == ["ab", "cd"] and report["status"] == "complete"
    assert report["metric"] == "accuracy" and report["cost"]["steps"] == 6 and report["cost"]["samples"] == 19
    assert report["metrics"]["forgetting"] == pytest.approx(callback.matrix[0][0] - callback.matrix[1][0])
    assert "<html" in (folder / "report.html").read_text()
    assert trainer.state.log_history[-1]["perdure/average_accuracy"] == report["metrics"]["average_accuracy"]
    with torch.no_grad():  # the score is what the model says of these rows
        guesses = trainer.model(**{k: v for k, v in trainers.collate(TEST["cd"]).items() if k != "labels"}).logits
    right = (guesses.argmax(-1) == torch.tensor([row["labels"] for row in TEST["cd"]])).float().mean()
    assert callback.matrix[1][1] == pytest.approx(float(right))


def test_states_of_other_rows_models_and_folders_are_refused(whole: Any, tmp_path: Path) -> None:
    folder = whole[2]
    callback = perdure.PerdureCallback(METHOD)
    trainer = callback.bind(trainers.trainer(folder, trainers.classifier(), TRAIN["cd"], TEST))
    with pytest.raises(BadInput, match="whose rows are not those of the Trainer's train_dataset"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(BadInput, match="has no folder 'perdure'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    other = trainers.classifier()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1)
    trainer = perdure.PerdureCallback(METHOD).bind(trainers.trainer(folder, other, TRAIN["ab"], TEST))
    with pytest.raises(BadInput, match="was learnt on another model"):
        trainer.train(resume_from_checkpoint=True)


def test_what_was_learnt_can_be_given_away(whole: Any, tmp_path: Path) -> None:
    whole[0].save_pretrained(tmp_path / "kept")
    with pytest.raises(BadInput, match="the model's own classification head"):
        perdure.Learner.from_pretrained(tmp_path / "kept", trainers.classifier(), trainers.ByteTokenizer())
    callback = perdure.PerdureCallback(METHOD)
    trainer = callback.bind(trainers.trainer(tmp_path, trainers.classifier(), TRAIN["ab"], TEST))
    callback.load_pretrained(tmp_path / "kept")
    batch = trainers.collate(TEST["ab"])
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch).logits, whole[1].model.eval()(**batch).logits)
    trainer.train()  # the third experience
    assert callback.matrix[:2] == [[None], [None, None]] and len(callback._bound().writes) == 3
    assert [score is None for score in callback.matrix[2]] == [False, False, True]  # no set for a third


def test_a_language_models_state_is_a_learners_too(tmp_path: Path) -> None:
    rows = trainers.tokens(trainers.texts("ab", 8))
    callback = perdure.PerdureCallback({"moram": {"rank": 2, "top_k": 2}}, eval_sets={"ab": rows[:4]})
    first = callback.bind(trainers.trainer(tmp_path, trainers.language_model(), rows))
    first.train()
    second = callback.bind(trainers.trainer(tmp_path, first.model, rows[:4]))  # a new Trainer for each experience
    with pytest.raises(BadInput, match="bound last"):
        first.train()
    second.train()
    assert callback._name(1) == "experience 2" and len(callback.matrix) == 2 and callback.matrix[1][1] is None
    callback.save_pretrained(tmp_path / "kept")
    learner = perdure.Learner.from_pretrained(tmp_path / "kept", trainers.language_model(), trainers.ByteTokenizer())
    batch = trainers.collate(rows)
    with torch.no_grad():
        assert torch.equal(learner.model(**batch).logits, second.model.eval()(**batch).logits)
    fresh = trainers.language_model()
    assert callback.detach() is second.model and "train" not in vars(second)
    left = second.model.state_dict()
    assert list(left) == list(fresh.state_dict())
    assert all(torch.equal(tensor, left[name]) for name, tensor in fresh.state_dict().items())


def test_an_error_before_the_first_step_leaves_no_trace(tmp_path: Path) -> None:
    rows = trainers.tokens(trainers.texts("ab", 4))
    callback = perdure.PerdureCallback({"moram": {"rank": 2, "top_k": 2}})
    trainer = callback.bind(trainers.trainer(tmp_path, trainers.language_model(), [{"input_ids": [1, 2]}]))
    with pytest.raises(KeyError):
        trainer.train()
    assert callback._bound().position.phase == "boundary" and not callback._bound().writes
    trainer.train_dataset = rows
    trainer.train()
    assert len(callback._bound().writes) == 1


def test_a_callback_that_is_not_bound_says_so(tmp_path: Path) -> None:
    trainer = trainers.trainer(tmp_path, trainers.language_model(), trainers.tokens(trainers.texts("ab", 4)))
    trainer.add_callback(perdure.PerdureCallback("lora"))
    with pytest.raises(BadInput, match=r"call `callback.bind\(trainer\)`"):
        trainer.train()


REFUSED = {
    "er": ([{"lora": {}}, "er"], {}, "er does not run under the Hugging Face Trainer: it adds stored rows"),
    "joint": ([{"lora": {}}, "joint"], {}, "joint .*all experiences together"),
    "feat_kd": ([{"lora": {}}, "feat_kd"], {}, "feat_kd .*pooled features"),
    "task": ({"moe_adapters": {"router": "task"}}, {}, "must know the task of each row"),
    "pretrain": ({"lora": {"pretrain": {}}}, {}, "its setting pretrain gives the first experience"),
    "grow_every": ({"moram": {"grow_every": 3}}, {}, "its setting grow_every adds parameters between steps"),
    "shared": ("sd_lora", {}, "keeps one tensor under the names .*magnitudes per_map"),
    "fp16": ("lora", {"fp16": True}, "fp16: scaled gradients"),
    "best": (
        "lora", {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        "load_best_model_at_end: puts weights back",
    ),
    "batch": ("lora", {"auto_find_batch_size": True}, "auto_find_batch_size: begins an experience again"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_and_the_model_left_as_it_was(case: str, tmp_path: Path) -> None:
    method, changes, message = REFUSED[case]
    model = trainers.classifier() if case == "feat_kd" else trainers.language_model()
    rows = trainers.tokens(trainers.texts("ab", 4))
    names = list(model.state_dict())
    trainer = trainers.trainer(tmp_path, model, rows, rows)
    for name, value in changes.items():  # some are refused by this machine or by transformers at their own place
        setattr(trainer.args, name, value)
    with pytest.raises(BadInput, match=message):
        perdure.PerdureCallback(method).bind(trainer)
    assert list(model.state_dict()) == names and "train" not in vars(trainer)


def test_other_models_optimizers_and_rows_are_refused(tmp_path: Path) -> None:
    rows = trainers.tokens(trainers.texts("ab", 4))
    model = trainers.language_model()
    trainer = trainers.trainer(tmp_path, model, rows)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BadInput, match="optimizers: were made before"):
        perdure.PerdureCallback("lora").bind(trainer)
    from tests.conformance import cases

    with pytest.raises(BadInput, match="neither a causal language model nor"):
        perdure.PerdureCallback("lora").bind(trainers.trainer(tmp_path, cases.build_host("bert")[0], rows))
    streamed = trainers.trainer(tmp_path, trainers.language_model(), iter(rows), max_steps=2)
    trainer = perdure.PerdureCallback("lora").bind(streamed)
    with pytest.raises(BadInput, match="train_dataset: .* has no length"):
        trainer.train()
    trainer = perdure.PerdureCallback({"apn": {"patches": 4, "top_k": 2, "rank": 2}}).bind(
        trainers.trainer(tmp_path, trainers.language_model(), rows, optim="sgd")
    )
    with pytest.raises(BadInput, match="row by row, which SGD cannot"):
        trainer.train()
