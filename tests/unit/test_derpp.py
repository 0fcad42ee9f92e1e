"""DER++: its loss by hand, what is stored with a row and when, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_methods import build
from torch.nn.functional import cross_entropy

from perdure.errors import BadInput
from perdure.replay import pack, row_bytes, unpack
from perdure.streams import Experience
from tests.conformance import cases

DERPP = {"budget": 8, "per_step": 3}


def learner_of(settings: dict[str, Any], **options: Any) -> Any:
    protocol = {"rehearsal": 8, **options.pop("protocol", {"mask": "current"})}
    return build(
        ["linear_probe", {"derpp": {**DERPP, **settings}}], dtype=torch.float64, head="linear", optimizer="sgd",
        max_grad_norm=None, protocol=protocol, **options,
    )  # fmt: skip


def steps_of(learner: Any, made: list[Experience]) -> list[dict[str, Any]]:
    """Each step: the batch that the loop learnt from, the buffer before it, and the head before and after it."""
    noted: list[dict[str, Any]] = []
    method, plain = learner.methods[-1], learner.methods[-1].before_step

    def before_step(batch: Any) -> Any:
        head = {name: p.detach().clone() for name, p in learner.head.module.named_parameters()}
        noted.append({"stored": [dict(row) for row in learner.replay.rows], "before": head, "batch": plain(batch)})
        return noted[-1]["batch"]

    def on_step(loop: Any, losses: dict[str, float]) -> None:
        head = {name: p.detach().clone() for name, p in loop.head.module.named_parameters()}
        noted[-1].update(after=head, losses=losses, current=[loop.labels[n] for n in loop.history[-1].classes])

    method.before_step = before_step
    for experience in made:
        learner.learn(experience, on_step=on_step)
    return noted


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.5), (0.7, 0.0), (0.0, 2.0)])
def test_loss_and_gradient_are_the_formula(alpha: float, beta: float) -> None:
    learner = learner_of({"alpha": alpha, "beta": beta}, learning_rate=0.05)
    noted = steps_of(learner, cases.experiences("bert", 3, rows=8))
    assert len(noted) == 6
    for number, step in enumerate(noted):
        batch, rows = step["batch"], step["batch"].rows
        weight = step["before"]["weight"].double().requires_grad_(True)
        bias = step["before"]["bias"].double().requires_grad_(True)
        with torch.no_grad():
            features, _ = learner.objective.features(learner.model, batch, learner.pooling)
        logits = features @ weight.T + bias
        ids = torch.tensor([learner.labels[row["label"]] for row in rows])
        now = logits[:4].masked_fill(~torch.isin(torch.arange(logits.shape[1]), torch.tensor(step["current"])), -1e9)
        expected = {"loss": cross_entropy(now, ids[:4])}
        drawn = min(3, len(step["stored"]))
        assert len(rows) == 4 + drawn * (2 if beta else 1) and (drawn == 0) == (number == 0)
        if drawn:
            errors = []
            for row, z in zip(rows[4 : 4 + drawn], logits[4 : 4 + drawn], strict=True):
                target = unpack([row["logits"]])[0][0]
                errors += [(z[c] - target[c]).square() for c in range(len(target))]
            expected["derpp.logits"] = alpha * torch.stack(errors).mean()
            if beta:
                expected["derpp.rehearsed"] = beta * cross_entropy(logits[4 + drawn :], ids[4 + drawn :])
        assert step["losses"] == pytest.approx(
            {name: float(value.detach()) for name, value in expected.items()}, abs=1e-9
        )
        sum(expected.values()).backward()  # type: ignore[union-attr]
        for name, before in (("weight", weight), ("bias", bias)):
            moved = step["after"][name].double() - before.detach()
            assert before.grad.abs().max() > 1e-3 and torch.allclose(moved, -0.05 * before.grad, atol=1e-7)
    widths = {row["logits"].shape[0] for step in noted for row in step["stored"]}
    assert widths == {2, 4, 6}, "rows of every age must have been rehearsed"


def test_logits_are_those_of_the_first_time_and_of_the_classes_known_then() -> None:
    learner, (first, second) = learner_of({"budget": 8}, epochs=3), cases.experiences("bert", 2, rows=4)
    outputs: list[tuple[Any, torch.Tensor]] = []
    method, plain = learner.methods[-1], learner.methods[-1].losses

    def losses(batch: Any, output: Any) -> Any:
        outputs.append((batch, output.logits.detach().clone()))
        return plain(batch, output)

    method.losses = losses
    learner.learn(first)
    learner.learn(second)
    assert learner.replay.seen == 8 == len(learner.replay), "offered in the first of three epochs alone"
    (one, of_one), (two, of_two) = outputs[0], outputs[3]
    expected = {
        id_of(row): z
        for b, logits in ((one, of_one), (two, of_two))
        for row, z in zip(b.rows[:4], logits[:4], strict=True)
    }
    for number, row in enumerate(learner.replay.rows):
        (stored,), (length,) = unpack([row["logits"]])
        assert length == (2 if number < 4 else 4) and torch.equal(stored, expected[id_of(row)])


def id_of(row: Any) -> tuple[str, str]:
    return row["text"], row["label"]


def test_with_declared_classes_those_not_seen_have_no_target() -> None:
    learner = build(
        ["linear_probe", {"derpp": DERPP}], protocol={"rehearsal": 8, "mask": "all"}, classes=["class0", "class1", "z"]
    )
    learner.learn(cases.experiences("bert", 1, rows=4)[0])
    assert learner.head is not None and learner.head.classes == 3
    assert {row["logits"].shape for row in learner.replay.rows} == {(2, 4)}


def test_logits_count_in_the_budget_of_bytes() -> None:
    made = cases.experiences("bert", 1, rows=12)[0]
    plain = max(row_bytes(row) for row in made.train)
    learner = learner_of({}, protocol={"rehearsal_bytes": 3 * plain + 20})
    learner.learn(made)
    assert 1 <= len(learner.replay) < 3 and learner.replay.nbytes <= 3 * plain + 20
    assert all(row_bytes(row) - row_bytes({**row, "logits": row["logits"][:0]}) == 16 for row in learner.replay.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_are_packed_without_loss(dtype: torch.dtype) -> None:
    vectors = [torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=dtype) for n in (3, 1, 5)]
    values, lengths = unpack([pack(vector) for vector in vectors])
    assert values.dtype == dtype and values.shape == (3, 5) and lengths.tolist() == [3, 1, 5]
    for row, vector in zip(values, vectors, strict=True):
        assert torch.equal(row[: len(vector)], vector) and not row[len(vector) :].any()
    assert unpack([])[0].shape == (0, 0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BadInput, match=r"method\.derpp: keeps the logits.*tokens, not classes.*use er"):
        build({"derpp": DERPP}, host="gpt2", protocol={"rehearsal": 8})
    with pytest.raises(BadInput, match="er and derpp both fill the one replay buffer"):
        build(["lora", {"er": {"budget": 8}}, {"derpp": DERPP}], protocol={"rehearsal": 8})
    learner = cases.build_learner("clip", [{"moram": {"rank": 2, "top_k": 2}}, {"derpp": DERPP}])
    made = cases.experiences("clip", 1)[0]
    captions = [{"image": row["image"], "text": f"{n}"} for n, row in enumerate(made.train)]
    with pytest.raises(BadInput, match="rows with captions"):
        learner.learn(made.with_rows(train=captions, test=()))
