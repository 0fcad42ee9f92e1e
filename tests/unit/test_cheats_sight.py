"""Methods, heads and objectives that look where the protocol does not let them: at what comes, at answers, at tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cheating import Cheat, experiences, learner, registered, replace, shown

from perdure.config import ProtocolConfig, TrainingConfig
from perdure.errors import ProtocolRefused
from perdure.objectives.classification import Classification
from perdure.protocol import check_methods
from perdure.registry import HEADS, METHODS, OBJECTIVES


# ---- what comes
def test_no_later_experience_and_no_later_class_is_within_reach() -> None:
    found: list[str] = []  # outside the method, where its keeping is no breach of its own

    class Peeks(Cheat):
        """Reads everything that hangs on its services, private names included."""

        def before_step(self, batch: Any) -> Any:
            loop = self.loop._loop  # type: ignore[attr-defined]
            found.append(shown([vars(loop)[name] for name in ("current", "history", "labels", "declared")]))
            found.append(shown(self.loop.labels))
            return batch

    made = experiences(3)
    every = learner(Peeks())
    every.learn(made[0])
    told = " ".join(found)
    assert made[0].train[0]["text"] in told and "kind1" in told
    for later in made[1:]:
        assert not any(name in told for name in later.classes)
        assert not any(row["text"] in told for split in ("train", "test") for row in getattr(later, split))


def test_a_run_tells_of_later_classes_only_where_the_protocol_declares_them(tmp_path: Any) -> None:
    from perdure.progress import Progress
    from perdure.recipe import make_recipe
    from perdure.run import Run
    from tests.e2e import tiny

    for protocol, declared in (({}, None), ({"mask": "all"}, [f"kind{n}" for n in range(6)])):
        run = Run(make_recipe(tiny.settings(tmp_path, "lora", protocol=protocol)), Progress(enabled=False))
        assert run.learner.declared == declared
        run.learner.detach()


# ---- answers
def test_test_rows_are_not_there_while_a_method_learns() -> None:
    found: list[str] = []  # outside the method, where its keeping is no breach of its own

    class Peeks(Cheat):
        def before_experience(self, experience: Any) -> None:
            found.append(shown(experience))

        def before_step(self, batch: Any) -> Any:
            found.append(shown(self.loop._loop.current))  # type: ignore[attr-defined]
            return batch

    (made,) = experiences(1)
    every = learner(Peeks())
    every.learn(made)
    told = " ".join(found)
    assert made.train[0]["text"] in told
    assert not any(row["text"] in told for row in made.test)


@pytest.mark.parametrize("frozen", [False, True])
def test_answers_are_withheld_while_rows_are_scored(frozen: bool) -> None:
    """Cached features take another way than a forward pass; the objective's own forward sees no answer on either."""

    answers: list[Any] = []

    class Reads(Cheat):
        frozen_features, adapts = frozen, not frozen

        def predict(self, batch: Any, forward: Callable[..., Any]) -> Any:  # type: ignore[override]
            answers.append((batch.labels, [dict(row) for row in batch.rows], batch.task))
            return forward(batch)

        def parameter_groups(self) -> list[dict[str, Any]]:
            return [] if frozen else super().parameter_groups()

        def losses(self, batch: Any, output: Any) -> dict[str, Any]:
            return {}

    seen: list[Any] = []
    with registered(OBJECTIVES, "reading") as register:

        @register
        class Reading(Classification):
            def forward(self, model: Any, head: Any, batch: Any, pooling: str | None = None) -> Any:
                if not torch.is_grad_enabled():
                    seen.append((batch.labels, [dict(row) for row in batch.rows]))
                return super().forward(model, head, batch, pooling)

        from loop_methods import cases

        from perdure.learner import Learner

        model, processor = cases.build_host("bert")
        every = Learner(model, processor, method=Reads(), objective={"reading": {"max_length": 32}}, seed=3)
        made = experiences(2)
        every.learn(made[0])
        seen.clear()
        every.evaluate([made[0]])
    assert answers and seen
    for labels, rows, *task in (*answers, *seen):
        assert labels is None and task in ([], [None])
        assert all(set(row) == {"text"} for row in rows), "a field beside the question reached it"


# ---- tasks
@pytest.mark.parametrize("grant", ["none", "train"])
def test_the_task_is_told_under_no_name(grant: str) -> None:
    found: list[str] = []

    class Reads(Cheat):
        def before_experience(self, experience: Any) -> None:
            found.append(shown(experience))

        def before_step(self, batch: Any) -> Any:
            found.append(shown([batch, self.loop._loop.current]))  # type: ignore[attr-defined]
            return batch

        def predict(self, batch: Any, forward: Callable[..., Any]) -> Any:  # type: ignore[override]
            found.append(shown(batch) if batch.task is None else f"task {batch.task}")
            return forward(batch)

    made = experiences(2)[1]
    every = learner(Reads(), protocol={"task_id": grant})
    every.learn(made)
    training = " ".join(found)
    found.clear()
    every.evaluate([made])
    scoring = " ".join(found)
    secrets = ("41", "secret1", "domain1")
    assert scoring and not any(secret in scoring for secret in secrets)
    assert ("41" in training, "domain1" in training) == (grant == "train", grant == "train")
    assert "secret1" not in training


def test_a_method_that_needs_the_task_is_refused_before_work_starts() -> None:
    class Needs(Cheat):
        needs = frozenset({"task_id"})

        def attach(self, host: Any) -> None:
            raise AssertionError("work started")

    with pytest.raises(ProtocolRefused, match=r"protocol\.task_id: is none"):
        learner(Needs())


def test_predictions_that_hang_on_the_rest_of_the_batch_are_found() -> None:
    """Rows of one experience are scored together, so a vote over the batch is the task id by another name."""

    class Votes(Cheat):
        def predict(self, batch: Any, forward: Callable[..., Any]) -> Any:  # type: ignore[override]
            output = forward(batch)
            together = output.logits.softmax(-1).mean(0, keepdim=True)  # which classes does this batch hold?
            return replace(output, logits=output.logits + 5 * together.log())

    every, made = learner(Votes(), epochs=3, learning_rate=1e-1, protocol={"mask": "seen"}), experiences(2)
    for each in made:
        every.learn(each)
    with pytest.raises(ProtocolRefused, match=r"protocol\.task_id: .*other rows of its batch"):
        every.evaluate(made)
    known = learner(Votes(), protocol={"task_id": "test"})
    known.learn(made[0])
    known.evaluate(made[:1])  # where the task is granted a vote tells nothing new


def test_the_vote_of_a_published_method_is_refused_before_work_starts() -> None:
    spec = METHODS.parse({"l2p": {"vote": True}}, "method")
    with pytest.raises(ProtocolRefused, match=r"protocol\.task_id: is train, but with method\.l2p\.vote"):
        check_methods(spec, ProtocolConfig(task_id="train"), TrainingConfig())
    check_methods(spec, ProtocolConfig(task_id="test"), TrainingConfig())


# ---- boundaries
@pytest.mark.parametrize("fact", ["write_id", "experience_step", "steps_planned", "first_epoch"])
def test_where_an_experience_begins_cannot_be_asked(fact: str) -> None:
    class Asks(Cheat):
        def before_step(self, batch: Any) -> Any:
            self.found.append(getattr(self.loop, fact))
            return batch

    every, (made, _) = learner(Asks(), protocol={"boundaries": "none"}), experiences()
    with pytest.raises(ProtocolRefused, match=rf"protocol\.boundaries: is none, .*{fact}"):
        every.learn(made)
    learner(Asks()).learn(made)


def test_where_an_experience_begins_is_told_by_no_hook_and_no_field() -> None:
    class Watches(Cheat):
        def before_experience(self, experience: Any) -> None:
            self.found.append("told")

        after_experience = sampler = before_experience  # type: ignore[assignment]

        def before_step(self, batch: Any) -> Any:
            self.found.append((batch.index.tolist(), batch.task, self.loop.experiences_learnt))
            return batch

    every = learner(Watches(), protocol={"boundaries": "none", "task_id": "train"})
    for made in experiences(3):
        every.learn(replace(made, task=None, last=False))
    first, *steps = every.methods[0].found
    assert first == "told"  # that the stream begins
    assert steps == [([0] * 4, None, 0)] * 6, "something differs from step to step"


def test_ownership_by_write_is_declared_and_told() -> None:
    class Asks(Cheat):
        needs = frozenset({"write_ids"})

        def before_step(self, batch: Any) -> Any:
            self.found.append(self.loop.write_id)
            return batch

    every = learner(Asks(), protocol={"boundaries": "none"})
    for made in experiences():
        every.learn(made)
    assert every.methods[0].found == [0, 0, 1, 1]
    assert every.describe()["details"][0]["needs"] == ["write_ids"]


def test_a_head_that_needs_boundaries_is_refused() -> None:
    from perdure.heads.cosine import CosineHead

    with registered(HEADS, "needy") as register:

        @register
        class Needy(CosineHead):
            needs_boundaries = True

        with pytest.raises(ProtocolRefused, match=r"protocol\.boundaries: is none, but head needy"):
            learner(head="needy", protocol={"boundaries": "none"})
