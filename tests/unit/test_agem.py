"""A-GEM: the projection by hand, what stands in its memory, and what a step then does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loop_methods import build
from torch.nn.functional import cross_entropy

from perdure.errors import BadInput
from tests.conformance import cases

AGEM = {"budget": 8, "per_step": 6}


def learner_of(host: str = "bert", method: Any = "linear_probe", **options: Any) -> Any:
    options = {"dtype": torch.float64, "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None} | options
    protocol = {"rehearsal": 8, "mask": "seen", **options.pop("protocol", {})}
    return build([method, {"agem": AGEM}], host, protocol=protocol, **options)


def steps_of(learner: Any, made: Any) -> list[dict[str, Any]]:
    """Each step: gradients before and after the projection, the drawn rows, the values before and after the step."""
    noted: list[dict[str, Any]] = []
    method = learner.methods[-1]
    plain, reference = method.after_backward, method._reference

    def drawn(rows: Any) -> Any:
        noted[-1]["rows"], noted[-1]["reference"] = rows, reference(rows)
        return noted[-1]["reference"]

    def after_backward() -> None:
        trained = dict(learner.services.trained())
        noted.append({"g": {n: p.grad.clone() for n, p in trained.items()}, "rows": []})
        noted[-1]["before"] = {n: p.detach().clone() for n, p in trained.items()}
        plain()
        noted[-1]["projected"] = {n: p.grad.clone() for n, p in trained.items()}

    def on_step(loop: Any, _: Any) -> None:
        noted[-1].update(
            after={n: p.detach().clone() for n, p in loop.services.trained()},
            experience=loop.position.experience,
        )

    method._reference, method.after_backward = drawn, after_backward
    for experience in made:
        learner.learn(experience, on_step=on_step)
    return noted


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients.values()])


def test_gradient_and_step_are_the_formula() -> None:
    learner = learner_of(head="linear")
    made = cases.experiences("bert", 2, rows=8)
    noted = steps_of(learner, [*made, replace(made[0], index=2, name="again"), replace(made[0], index=3, name="more")])
    kinds = set()
    for step in noted:
        assert (step["experience"] == 0) == (not step["rows"]), "the first experience has no memory"
        g, projected = flat(step["g"]), flat(step["projected"])
        moved = flat(step["after"]) - flat(step["before"])
        assert torch.allclose(moved, -0.05 * projected, atol=1e-7)
        if not step["rows"]:
            assert torch.equal(g, projected)
            continue
        weight, bias = (step["before"][f"head/{n}"].double().requires_grad_(True) for n in ("weight", "bias"))
        (batch,) = learner.batches(step["rows"])
        with torch.no_grad():
            features, _ = learner.objective.features(learner.model, batch, learner.pooling)
        cross_entropy(features @ weight.T + bias, batch.labels).backward()
        g_ref = torch.cat([weight.grad.flatten(), bias.grad])
        assert torch.allclose(flat(step["reference"]), g_ref, atol=1e-7)
        dot = g @ g_ref
        kinds.add(bool(dot < 0))
        expected = g - dot / (g_ref @ g_ref) * g_ref if dot < 0 else g
        assert torch.allclose(projected, expected, atol=1e-6) and projected @ g_ref > -1e-6
        if dot >= 0:
            assert torch.equal(projected, g)
    assert kinds == {True, False}, "both cases must have come"
    told = learner.methods[-1]
    assert told.values["steps"] == 6 and 0 < told.plasticity()["projected_steps"] < 1


def test_the_memory_is_of_past_experiences_and_passes_are_counted() -> None:
    learner, made = learner_of(epochs=2), cases.experiences("bert", 3, rows=8)
    noted = steps_of(learner, made)
    past = {row["text"] for row in made[0].train}
    assert learner.replay.seen == 24 and {row["text"] for s in noted[4:8] for row in s["rows"]} <= past
    assert learner.counters.extra_passes == 8 and learner.counters.extra_rows == 48


def test_without_boundaries_rows_are_kept_as_they_come() -> None:
    learner = learner_of(epochs=2, protocol={"boundaries": "none"})
    noted = steps_of(learner, cases.experiences("bert", 2, rows=8))
    assert learner.replay.seen == 16 and [len(step["rows"]) for step in noted] == [4, *[6] * 7]


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_reference_is_the_mean_over_all_rows_however_they_are_batched(host: str) -> None:
    """Texts of different lengths: a mean of the batches' means would weigh their tokens otherwise."""
    found = []
    for size in (64, 4, 1):
        learner = learner_of(host, "finetune", per_device_eval_batch_size=size)
        learner.learn(cases.experiences(host, 1, rows=8)[0])
        rows = list(learner.replay.rows)[:6]
        found.append(flat(learner.methods[-1]._reference(rows)))
        if size == 64:
            assert torch.allclose(found[0], flat(next(learner.services.gradients(rows))), atol=1e-12)
    assert found[0].abs().max() > 1e-3
    for other in found[1:]:
        assert torch.allclose(other, found[0], atol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BadInput, match="er and agem both fill the one replay buffer"):
        build([{"er": {"budget": 8}}, {"agem": AGEM}], protocol={"rehearsal": 8})
    with pytest.raises(Exception, match=r"protocol.rehearsal: grants 0 samples, but agem stores 8"):
        build({"agem": AGEM})
