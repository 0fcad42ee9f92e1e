"""Nearest class mean, streaming LDA and the aligned head against plain references."""

from __future__ import annotations

import math

import pytest
import torch
from test_heads import make
from torch.nn.functional import cross_entropy, normalize

from perdure.errors import BadInput, NonFiniteLoss
from perdure.registry import HEADS

WIDTH = 6


def data(rows=90, classes=4, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator)
    y[:classes] = torch.arange(classes)
    centres = 2 * torch.randn(classes, width, generator=generator)
    return centres[y] + torch.randn(rows, width, generator=generator), y


def fit(head, x, y, seed=1, size=None):
    head.begin_fit(len(y), seed)
    for start in range(0, len(y), size or len(y)):
        end = start + (size or len(y))
        head.update(x[start:end], y[start:end])
    head.end_fit()
    return head


def class_means(x, y, classes):
    return torch.stack([x[y == c].double().mean(0) for c in range(classes)])


# ---- ncm
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ncm_scores(metric):
    x, y = data()
    head = fit(make("ncm", classes=4, metric=metric), x, y, size=7)
    means = class_means(x, y, 4)
    assert torch.allclose(head.means, means, rtol=1e-12) and head.means.dtype == torch.float64
    assert head.counts.tolist() == torch.bincount(y).tolist()
    expected = (
        normalize(x.double(), dim=1) @ normalize(means, dim=1).T
        if metric == "cosine"
        else -torch.cdist(x.double(), means).square()
    )
    assert torch.allclose(head.logits(x).double(), expected, atol=1e-4)
    far = fit(make("ncm", classes=4, metric=metric), 10 * x, y)
    same = bool((far.logits(x).argmax(1) == head.logits(x).argmax(1)).all())
    assert same == (metric == "cosine")  # lengths of means count for the distance alone


@pytest.mark.parametrize("name", ["ncm", "slda"])
def test_a_class_without_rows_never_wins(name):
    x, y = data(classes=2)
    head = fit(make(name, classes=5), x, y)
    away = torch.cat([-x, torch.zeros(1, WIDTH), 1e3 * torch.randn(9, WIDTH)])
    assert head.logits(away).isfinite().all() and int(head.logits(away).argmax(1).max()) <= 1


# ---- slda
def batch_lda(x, y, classes, epsilon):
    """Weights [C, D] and biases [C] of LDA with equal priors, from all rows at once."""
    x = x.double()
    means = class_means(x, y, classes)
    within = x - means[y]
    shrunk = (1 - epsilon) * within.T @ within / len(y) + epsilon * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(shrunk, means.T).T
    return weight, -0.5 * (weight * means).sum(1)


@pytest.mark.parametrize("epsilon", [1e-4, 0.3, 1.0])
def test_slda_equals_the_batch_lda(epsilon):
    x, y = data(300)
    head = make("slda", classes=4, shrinkage=epsilon)
    for start in range(0, 300, 100):  # three experiences
        fit(head, x[start : start + 100], y[start : start + 100], size=9)
    weight, bias = batch_lda(x, y, 4, epsilon)
    assert torch.allclose(head.module.weight.double(), weight, rtol=1e-5, atol=1e-5)
    assert torch.allclose(head.module.bias.double(), bias, rtol=1e-5, atol=1e-5)
    assert torch.allclose(head.logits(x).double(), x.double() @ weight.T + bias, rtol=1e-4, atol=1e-4)
    assert (head.logits(x).argmax(1) == y).float().mean() > 0.8


def test_slda_as_published_row_by_row():
    """Σ and μ of the paper, one row after the other: the plain transcription of its two updates."""
    x, y = data(60)
    covariance, means, counts = torch.zeros(WIDTH, WIDTH).double(), torch.zeros(4, WIDTH).double(), [0] * 4
    for t, (row, c) in enumerate(zip(x.double(), y.tolist(), strict=True)):
        away = row - means[c]
        delta = t * torch.outer(away, away) / (t + 1)
        covariance = (t * covariance + delta) / (t + 1)
        means[c] = (counts[c] * means[c] + row) / (counts[c] + 1)
        counts[c] += 1
    head = make("slda", classes=4, covariance="published")
    fit(fit(head, x[:25], y[:25], size=4), x[25:], y[25:], size=11)
    assert torch.allclose(head.scatter / 60, covariance, rtol=1e-10) and torch.allclose(head.means, means)
    exact = fit(make("slda", classes=4), x, y)
    assert (exact.scatter - head.scatter).norm() > 0.1 * exact.scatter.norm()


def test_slda_that_cannot_be_inverted_is_refused():
    head = make("slda", classes=2)
    with pytest.raises(NonFiniteLoss, match="head.slda.shrinkage"):
        fit(head, torch.tensor([[1e38] * WIDTH, [-1e38] * WIDTH] * 3), torch.tensor([0, 0, 0, 1, 1, 1]))


# ---- slca
def test_slca_gaussians():
    x, y = data(120)
    head = make("slca", classes=4)
    fit(fit(head, x[:50], y[:50], size=13), x[50:], y[50:])
    for c in range(4):
        upper = head._factor(c).double()
        expected = torch.cov(x[y == c].double().T) + 1e-4 * torch.eye(WIDTH)
        assert torch.allclose(upper.T @ upper, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(head.means, class_means(x, y, 4))


def test_slca_one_row_and_flat_classes_have_a_gaussian():
    head = make("slca", classes=2, jitter=1e-4)
    fit(head, torch.cat([torch.ones(1, WIDTH), 1e4 * torch.ones(9, WIDTH)]), torch.tensor([0] + [1] * 9))
    for c in range(2):
        assert torch.allclose(head._factor(c), 1e-2 * torch.eye(WIDTH))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_slca_loss_and_its_gradient(temperature):
    torch.manual_seed(0)
    head = make("slca", classes=5, temperature=temperature)
    scores, labels = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0, 3])
    loss = head.alignment_loss(scores, labels, torch.tensor([1, 1, 2, 2, 2]))
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(scores, labels.tolist(), strict=True):
        first, second = row[:2].square().sum().sqrt() + 1e-7, row[2:].square().sum().sqrt() + 1e-7
        scale = 1.0 if temperature is None else temperature * (first + second) / 2
        total = total - row[label] / scale + torch.log(torch.exp(row / scale).sum())
    assert torch.allclose(loss, total / 7, rtol=1e-12)
    mine, other = (torch.autograd.grad(each, scores, retain_graph=True)[0] for each in (loss, total / 7))
    assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12) and mine.abs().max() > 1e-3


def two_experiences(**settings):
    head = make("slca", classes=2, **settings)
    x, y = data(200)
    fit(head, x[y < 2], y[y < 2], seed=1)
    head.grow(4)
    return head, x, y


def test_slca_alignment_step_by_step():
    """The same draws through SGD with momentum written out."""
    settings = {"epochs": 3, "samples": 16, "learning_rate": 0.05, "momentum": 0.8, "weight_decay": 0.01}
    head, x, y = two_experiences(**settings)
    drawn, draw = [], head._draw
    head._draw = lambda *a: drawn.append(draw(*a)) or drawn[-1]
    weight, bias = head.module.weight.detach().clone(), head.module.bias.detach().clone()
    fit(head, x[y >= 2], y[y >= 2], seed=2)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch, (features, labels) in enumerate(drawn):
        assert torch.bincount(labels).tolist() == [16] * 4 and not torch.equal(labels, labels.sort().values)
        for start in range(0, 64, 16):
            parts = [weight.requires_grad_(), bias.requires_grad_()]
            scores = features[start : start + 16] @ weight.T + bias
            norms = (scores[:, :2].norm(dim=1) + scores[:, 2:].norm(dim=1)) / 2 + 1e-7
            loss = cross_entropy(scores / (0.1 * norms[:, None]), labels[start : start + 16])
            gradients = torch.autograd.grad(loss, parts)
            with torch.no_grad():
                rate = 0.05 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
                speed = [0.8 * v + g + 0.01 * p for v, g, p in zip(speed, gradients, parts, strict=True)]
                weight, bias = (p - rate * v for p, v in zip(parts, speed, strict=True))
    assert len(drawn) == 3 and not torch.equal(drawn[0][0], drawn[1][0])
    assert torch.allclose(head.module.aligned_weight, weight, atol=1e-5)
    assert torch.allclose(head.module.aligned_bias, bias, atol=1e-5)


def test_slca_draws_from_the_gaussians_of_all_classes():
    head, x, y = two_experiences(samples=20000)
    fit(head, x[y >= 2], y[y >= 2], seed=2)
    of = torch.tensor(head.values["of"])
    assert of.tolist() == [1, 1, 2, 2] and head._decay(of).tolist() == pytest.approx([0.95, 0.95, 1.0, 1.0])
    factors = [head._factor(c) for c in range(4)]
    features, labels = head._draw((head.means * 0.5).float(), factors, torch.Generator().manual_seed(0))
    for c in range(4):
        mine = features[labels == c].double()
        assert torch.allclose(mine.mean(0), head.means[c] * 0.5, atol=0.05)
        assert torch.allclose(torch.cov(mine.T), torch.cov(x[y == c].double().T), atol=0.12)


def test_slca_corrects_a_head_that_favours_new_classes():
    head, x, y = two_experiences(epochs=20, learning_rate=0.05)
    with torch.no_grad():
        head.module.bias[2:] += 30.0
    trained = head.module.weight.detach().clone()
    assert set(head.logits(x).argmax(1).tolist()) <= {2, 3}
    fit(head, x[y >= 2], y[y >= 2], seed=2)
    assert (head.logits(x).argmax(1) == y).float().mean() > 0.9
    assert torch.equal(head.module.weight.detach(), trained), "training goes on from before the alignment"
    assert set(head.in_training().logits(x).argmax(1).tolist()) <= {2, 3}
    aligned = head.logits(x)
    head.grow(5)  # a class that came since has the scores of training
    assert torch.equal(head.logits(x)[:, :4], aligned) and torch.equal(
        head.logits(x)[:, 4], head.in_training().logits(x)[:, 4]
    )


@pytest.mark.parametrize("settings", [{}, {"epochs": 0}, {"bias": False}])
def test_slca_first_experience_no_epochs_no_bias(settings):
    head, x, y = two_experiences(**settings)
    assert not len(head.module.aligned_weight), "one experience has nothing to be aligned with"
    fit(head, x[y >= 2], y[y >= 2], seed=2)
    assert bool(len(head.module.aligned_weight)) == (settings != {"epochs": 0})
    assert len(head.module.aligned_bias) == (0 if settings else 4)
    assert torch.equal(head.logits(x), head.in_training().logits(x)) == (settings == {"epochs": 0})


def test_slca_trains_and_draws_by_seed_alone():
    ends = []
    for noise in (0, 1):
        head, x, y = two_experiences()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        fit(head, x[y >= 2], y[y >= 2], seed=2)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(head.module.aligned_weight)
    assert torch.equal(*ends) and [n for n, _ in head.parameters()] == ["weight", "bias"]


def test_slca_overflow_is_refused():
    head = make("slca", classes=2)
    with pytest.raises(NonFiniteLoss, match="slca head: the features of a class are too large"):
        fit(head, torch.tensor([[2e38] * WIDTH, [-2e38] * WIDTH]), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"ncm": {"metric": "manhattan"}}, "head.ncm.metric"),
        ({"slda": {"shrinkage": 0.0}}, "head.slda.shrinkage.*greater than 0"),
        ({"slca": {"temperature": 0.0}}, "head.slca.temperature"),
        ({"slca": {"refresh": True}}, "head.slca.refresh: unknown key"),
        ({"ridge": {"recentre": {"sigma": 0}}}, "head.ridge.recentre.sigma"),
    ],
)
def test_settings_name_the_field(spec, message):
    with pytest.raises(BadInput, match=message):
        HEADS.parse(spec, "head")
