"""PCR against a plain supervised contrast with proxies, HPCR's terms by hand, what is stored, what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop_methods import build

from perdure.data import Batch, Output
from perdure.errors import BadInput
from perdure.registry import METHODS
from perdure.replay import pack, unpack
from perdure.services import Services
from tests.conformance import cases

PCR = METHODS.get("pcr")


def method_of(settings: dict[str, Any], **loop: Any) -> Any:
    method = PCR(PCR.Config(**settings))
    facts = {
        "knows_boundaries": True,
        "experiences_learnt": 1,
        "experience_step": 0,
        "step": 0,
        "remember": lambda *_, **__: None,
    }
    method.loop = SimpleNamespace(**{**facts, "labels": {f"c{n}": n for n in range(5)}, "mean": Services.mean, **loop})
    return method


def contrast(features: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor, tau: float) -> torch.Tensor:
    """Supervised contrast whose anchors are rows and whose samples are the proxies of all rows, one for each row."""
    anchors = torch.nn.functional.normalize(features, dim=1)
    samples = torch.nn.functional.normalize(proxies[labels], dim=1)
    similar = anchors @ samples.T / tau
    same = labels[:, None] == labels[None]
    log_p = similar - similar.logsumexp(1, keepdim=True)
    return -((log_p * same).sum(1) / same.sum(1)).mean()


def test_the_contrast_is_that_of_rows_with_their_proxies() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 3, 3, 1, 3, 0])
    found = []
    for plain in (True, False):
        features = torch.randn(6, 4, generator=draw.manual_seed(1), dtype=torch.float64).requires_grad_(True)
        proxies = torch.randn(5, 4, generator=draw.manual_seed(2), dtype=torch.float64).requires_grad_(True)
        if plain:
            loss = contrast(features, proxies, labels, 0.09)
        else:
            unit = [torch.nn.functional.normalize(each, dim=1) for each in (features, proxies)]
            summed, count = method_of({}).criterion(Batch({}, labels), Output(unit[0] @ unit[1].T / 0.09))
            loss = summed / count
        loss.backward()
        assert proxies.grad is not None and features.grad is not None
        found.append((loss.detach(), features.grad, proxies.grad))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    absent = found[1][2][[2, 4]]
    assert not absent.any() and found[1][2][[0, 1, 3]].abs().min() > 0, "classes that are not in the batch stay"


def test_a_row_by_hand_and_fillers_count_nothing() -> None:
    """Two rows of class 0 and one of class 1, scores (1, 2, 9): −log(e / (2e + e²)) and so on; class 2 is absent."""
    logits = torch.tensor([[1.0, 2.0, 9.0]] * 4, dtype=torch.float64)
    summed, count = method_of({}).criterion(Batch({}, torch.tensor([0, 0, 1, -100])), Output(logits))
    below = 2 * math.e + math.e**2
    assert count == 3
    assert float(summed) == pytest.approx(-2 * math.log(math.e / below) - math.log(math.e**2 / below), abs=1e-12)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.5625), (125, (0.5625 + 1.8) / 2), (250, 1.8), (500, 0.5625)])
def test_the_factor_of_the_contrast_goes_up_and_down(step: int, factor: float) -> None:
    batch, output = Batch({}, torch.tensor([0, 1])), Output(torch.randn(2, 3, dtype=torch.float64))
    plain, _ = method_of({}, experience_step=step).criterion(batch, output)
    told, _ = method_of({"holistic": {}}, experience_step=step, step=7).criterion(batch, output)
    assert float(told / plain) == pytest.approx(factor, abs=1e-9)
    unbounded = method_of({"holistic": {}}, knows_boundaries=False, experience_step=3, step=step)
    assert float(unbounded.criterion(batch, output)[0] / plain) == pytest.approx(factor, abs=1e-9)


def holistic_batch() -> tuple[Batch, Output, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Two current rows, three rehearsed ones: their labels, stored scores of 2, 2 and 4 classes, stored features."""
    draw = torch.Generator().manual_seed(4)
    logits, features, stored = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (5, 5, 3))
    logits.requires_grad_(True)
    features.requires_grad_(True)
    scores = [torch.randn(n, generator=draw, dtype=torch.float64) for n in (2, 2, 4)]
    labels = torch.tensor([4, 3, 0, 1, 3])
    kept = [{"logits": pack(z), "features": pack(f)} for z, f in zip(scores, stored, strict=True)]
    batch = Batch({}, labels, [{}, {}, *kept], extra={"pcr": {"own": 2, "any": True}})
    return batch, Output(logits, features), labels, scores, stored


def test_both_distillations_are_the_formula() -> None:
    batch, output, labels, scores, stored = holistic_batch()
    found = method_of({"holistic": {"alpha": 0.7, "beta": 0.2, "temperature": 0.5}}).losses(batch, output)
    assert output.logits is not None and output.features is not None
    counts, above, below = torch.bincount(labels), torch.zeros(()), 0
    for row, target in zip(output.logits[2:], scores, strict=True):
        for c, z in enumerate(target):
            above, below = above + counts[c] * (row[c] - z) ** 2, below + int(counts[c])
    assert below == 2 + 2 + 4  # class 2 is known to the last row, but not in the batch
    assert torch.allclose(found["pcd"], 0.7 * above / below, atol=1e-12)
    parts = []
    for i in range(3):
        others = [j for j in range(3) if j != i]
        now, then = (
            torch.stack([torch.cosine_similarity(each[i], each[j], dim=0) / 0.5 for j in others])
            for each in (output.features[2:], stored)
        )
        parts.append(-(then.softmax(0) * now.log_softmax(0)).sum())
    assert torch.allclose(found["scd"], 0.2 * torch.stack(parts).mean(), atol=1e-12)
    expected = torch.autograd.grad(0.2 * torch.stack(parts).mean(), output.features, retain_graph=True)[0]
    gradient = torch.autograd.grad(found["scd"], output.features)[0]
    assert torch.allclose(gradient, expected, atol=1e-12) and gradient[2:].abs().min() > 0 and not gradient[:2].any()


@pytest.mark.parametrize("facts", [{"experiences_learnt": 0}, {"rows": False}, {"holistic": None}])
def test_when_nothing_is_distilled(facts: dict[str, Any]) -> None:
    batch, output, *_ = holistic_batch()
    if "rows" in facts:
        batch.extra["pcr"] = {"own": 5, "any": False}
    settings = {"holistic": facts.get("holistic", {})}
    assert method_of(settings, experiences_learnt=facts.get("experiences_learnt", 1)).losses(batch, output) == {}
    assert method_of({"holistic": {}}, experiences_learnt=0, knows_boundaries=False).losses(*holistic_batch()[:2])


@pytest.mark.parametrize("holistic", [None, {}])
@pytest.mark.parametrize("views", [1, 2])
def test_rows_of_a_step_and_what_is_stored(holistic: Any, views: int) -> None:
    settings = {"budget": 8, "per_step": 3, "views": views, "holistic": holistic}
    learner = build(["linear_probe", {"pcr": settings}], protocol={"rehearsal": 8}, epochs=2)
    batches: list[Any] = []
    method, plain = learner.methods[-1], learner.methods[-1].before_step

    def before_step(batch: Any) -> Any:
        batches.append(plain(batch))
        return batches[-1]

    method.before_step = before_step
    made = cases.experiences("bert", 2, rows=4)
    for experience in made:
        learner.learn(experience)
    assert learner.replay.seen == 8 == len(learner.replay), "every row is offered once"
    texts = [[row["text"] for row in batch.rows] for batch in batches]
    assert [len(each) for each in texts] == [4 * views, 4 * views + 3 * views, *[4 * views + 3 * views] * 2]
    assert all(each[:4] == each[4 : 4 * views] or views == 1 for each in texts)
    late = batches[-1]
    assert late.rehearsed.tolist() == [False] * 4 + [True] * (4 * (views - 1) + 3 * views)
    assert views == 1 or texts[-1][8::2] == texts[-1][9::2], "a rehearsed row and its second view stand together"
    for number, row in enumerate(learner.replay.rows):
        kept = {"text", "label"} | ({"logits", "features"} if holistic is not None else set())
        assert set(row) == kept
        if holistic is not None:
            assert unpack([row["logits"]])[1] == (2 if number < 4 else 4) and row["features"].shape == (16, 4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BadInput, match=r"method\.pcr: contrasts rows.*tokens, not classes.*use er"):
        build({"pcr": {"budget": 8}}, host="llama", protocol={"rehearsal": 8})
    with pytest.raises(BadInput, match=r"low 2\.0 is more than high 1\.8"):
        build({"pcr": {"budget": 8, "holistic": {"low": 2.0}}}, protocol={"rehearsal": 8})
    with pytest.raises(BadInput, match="views"):
        build({"pcr": {"budget": 8, "views": 3}}, protocol={"rehearsal": 8})
    with pytest.raises(BadInput, match="derpp and pcr both fill"):
        build([{"derpp": {"budget": 8}}, {"pcr": {"budget": 8}}], protocol={"rehearsal": 8})
