"""Statistics that an adapter has made stale: the estimate of the drift, and what each head does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_methods import build, copied, differences
from test_fitted_heads import WIDTH, class_means, data, fit
from test_heads import make

from perdure.errors import BadInput, NonFiniteLoss, ProtocolRefused
from perdure.heads._fitted import displacement
from perdure.heads.ridge import RidgeHead
from tests.conformance import cases

RECENTRE = {"recentre": {"sigma": 0.5, "rows": 6}}
BOTH = ["ncm", "slda", "slca"]


# ---- the estimate
def test_displacement_is_the_weighted_mean_of_the_drift():
    torch.manual_seed(0)
    before, after, points = (torch.randn(n, 3, dtype=torch.float64) for n in (8, 8, 4))
    spread = float((before - before.mean(0)).square().sum(1).mean())
    for c, found in enumerate(displacement(points, before, after, 0.7)):
        total, weights = torch.zeros(3, dtype=torch.float64), 0.0
        for old, new in zip(before, after, strict=True):
            weight = float(torch.exp(-(old - points[c]).square().sum() / (2 * 0.7**2 * spread)))
            total, weights = total + weight * (new - old), weights + weight
        assert torch.allclose(found, total / weights, rtol=1e-10)


def test_displacement_follows_the_nearest_rows():
    before = torch.tensor([[0.0, 0.0], [0.1, 0.0], [9.0, 9.0]])
    after = before + torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -2.0]])
    points = torch.tensor([[0.0, 0.1], [8.0, 9.0], [1e4, 1e4]])  # the last is so far that every plain weight is 0
    expected = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, -2.0]]).double()
    assert torch.allclose(displacement(points, before, after, 0.1), expected, atol=1e-9)
    same = torch.ones(3, 2)
    assert torch.allclose(displacement(points, same, same + 0.5, 0.3), torch.full((3, 2), 0.5).double())


# ---- recentring
@pytest.mark.parametrize("name", BOTH)
def test_recentring_is_exact_where_all_rows_move_alike(name: str):
    x, y = data()
    new, _ = data(30, seed=5)
    shift = torch.linspace(-1, 2, WIDTH)
    head = fit(make(name, classes=4, **RECENTRE), x, y)
    scatter = None if name == "ncm" else head.module.scatter.clone()
    head.before = new
    head.recentre(new + shift)
    assert torch.allclose(head.means, class_means(x + shift, y, 4), atol=1e-6)
    assert scatter is None or torch.equal(head.module.scatter, scatter)
    assert not torch.allclose(head.means, class_means(x, y, 4), atol=0.1)


@pytest.mark.parametrize("name", BOTH)
def test_recentring_leaves_classes_without_rows_alone(name: str):
    x, y = data(classes=2)
    head = fit(make(name, classes=4, **RECENTRE), x, y)
    head.before = x
    head.recentre(x + 1)
    assert torch.equal(head.means[2:], torch.zeros(2, WIDTH).double()) and head.means[:2].abs().min() > 0


class Plain(RidgeHead):
    """z = f, so that the rows of z can be moved by hand."""

    def random_features(self, features):
        return features.float()


def plain(**settings: Any) -> Plain:
    settings = {"features": WIDTH, "holdout": 0.0, **settings}
    head = Plain(RidgeHead.Config(**settings))
    head.name = "ridge"
    head.build(WIDTH, 0)
    head.grow(4)
    return head


def test_recentring_ridge_is_exact_where_each_class_moves_as_one():
    y = torch.arange(80) % 4
    centres = 100 * torch.eye(4, WIDTH)  # far apart, so that each class has rows of its own near it
    torch.manual_seed(0)
    x = centres[y] + torch.randn(80, WIDTH)
    shifts = torch.randn(4, WIDTH)
    head, moved = fit(plain(recentre={"sigma": 0.05}), x, y), fit(plain(), x + shifts[y], y)
    old = head._gram.clone()
    head.before = centres
    head.recentre(centres + shifts)
    assert head._counts.tolist() == [20.0] * 4
    assert torch.allclose(head._gram, moved._gram, rtol=1e-5, atol=1e-2)
    assert torch.allclose(head._cross, moved._cross, rtol=1e-5, atol=1e-3)
    assert (old - moved._gram).norm() > 1e3 and torch.linalg.eigvalsh(head._gram).min() > 0


def test_recentring_ridge_is_off_by_no_more_than_the_bound():
    x, y = data(80)
    torch.manual_seed(2)
    shift, error = torch.randn(WIDTH), 0.3 * torch.randn(80, WIDTH)
    new, _ = data(20, seed=4)
    head = fit(plain(recentre={}), x, y)
    head.before = new
    head.recentre(new + shift)
    truth = fit(plain(), x + shift + error, y)
    far, sizes = (x + shift).double().norm(dim=1), error.double().norm(dim=1)
    for c in range(4):
        assert 0 < (head._cross - truth._cross)[:, c].norm() <= sizes[y == c].sum() + 1e-6
    assert 0 < torch.linalg.matrix_norm(head._gram - truth._gram) <= (2 * far * sizes + sizes.square()).sum() + 1e-6


def test_ridge_counts_classes_only_where_sums_are_corrected():
    x, y = data()
    plainly, counted = fit(make("ridge", classes=4), x, y), fit(make("ridge", classes=4, **RECENTRE), x, y)
    assert "counts" not in plainly.state_dict()[0]
    assert counted.state_dict()[0]["counts"].tolist() == torch.bincount(y).tolist()
    assert torch.equal(plainly.module.weight, counted.module.weight)


# ---- refreshing
@pytest.mark.parametrize("name", ["ncm", "slda", "ridge"])
def test_refreshing_from_all_rows_is_a_fit_on_the_new_features(name: str):
    x, y = data()
    turned = x @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0] + 3
    head = fit(make(name, classes=5, refresh=True), x, y)
    fresh = fit(make(name, classes=5, refresh=True), turned, y)
    before = {key: t.clone() for key, t in head.state_dict()[0].items()}
    unknown = torch.cat([turned, torch.full((3, WIDTH), 50.0)]), torch.cat([y, torch.full((3,), 4)])
    head.refresh(*unknown)  # rows of a class that is only now learnt come in the pass itself
    for key in ("means", "scatter", "gram", "cross", "counts"):
        if key in before:
            assert torch.allclose(head.state_dict()[0][key], fresh.state_dict()[0][key], rtol=1e-5, atol=1e-4), key
            assert key == "counts" or not torch.allclose(before[key], head.state_dict()[0][key], atol=0.1), key
    head.begin_fit(0, 0)
    head.end_fit()
    if name == "ridge":
        head.module.weight = head._solve(fresh.ridge).float()
    assert torch.allclose(head.logits(turned), fresh.logits(turned), rtol=1e-3, atol=1e-3)


def test_refreshing_from_some_rows_weights_them():
    x, y = data(100)
    few = torch.cat([(y == c).nonzero().flatten()[:number] for c, number in enumerate((5, 9, 2))])  # none of class 3
    now = x[few] * 2 + 1
    counts = torch.bincount(y).double()
    head = fit(plain(refresh=True), x, y)
    share = counts[3] / 100
    weights = counts[y[few]] / torch.bincount(y[few]).double()[y[few]]
    gram = share * head._gram + (now.double() * weights[:, None]).T @ now.double()
    kept = head._cross[:, 3].clone()
    head.refresh(now, y[few])
    assert torch.allclose(head._gram, gram, rtol=1e-9) and torch.equal(head._cross[:, 3], kept)
    for c in range(3):
        assert torch.allclose(head._cross[:, c], counts[c] * now[y[few] == c].double().mean(0), rtol=1e-5)
    lda = fit(make("slda", classes=4, refresh=True), x, y)
    scatter, means = lda.scatter.clone(), lda.means.clone()
    lda.refresh(now, y[few])
    inner = sum((len(r) - 1) * torch.cov(r.T) for r in (now[y[few] == c].double() for c in range(3)))
    assert torch.allclose(lda.scatter, share * scatter + (100 - counts[3] - 3) / (16 - 3) * inner, rtol=1e-9)
    assert torch.allclose(lda.means[:3], class_means(now, y[few], 3)) and torch.equal(lda.means[3], means[3])
    lda.refresh(now[:1], y[few][:1])  # one row tells where a class is, not how wide
    assert torch.allclose(lda.means[0], now[0].double())
    assert torch.allclose(lda.scatter, share * scatter + (97 - counts[3]) / 13 * inner, rtol=1e-9)


# ---- in the loop
ER = {"er": {"budget": 6, "per_step": 2}}
LORA = {"lora": {"rank": 2, "dropout": 0.1}}
SETTINGS: dict[str, Any] = {"ncm": {}, "slda": {}, "ridge": {"features": 8}, "slca": {"samples": 8}}


def spec_of(name: str, refresh: bool = True) -> dict[str, Any]:
    return {name: SETTINGS[name] | RECENTRE | ({"refresh": True} if refresh and name != "slca" else {})}


def test_features_before_and_after_learning_move_the_means() -> None:
    made = cases.experiences("bert", 2, rows=8)
    learner = build({"lora": {"rank": 2}}, head={"ncm": {"recentre": {"sigma": 0.5}}}, learning_rate=0.05)
    learner.learn(made[0])
    head: Any = learner.head
    assert (learner.counters.extra_passes, learner.counters.extra_rows) == (1, 8), "nothing is old yet"
    means, before, held = head.means.clone(), learner.features(made[1].train), []
    learner.learn(made[1], on_step=lambda loop, _: held.append(loop.state_dict()[0]["head/before"]))
    after = learner.features(made[1].train)
    assert torch.equal(held[0], before) and (after - before).abs().max() > 1e-3
    assert torch.allclose(head.means[:2], means + displacement(means, before, after, 0.5))
    labels = torch.tensor([int(row["label"] == "class3") for row in made[1].train])
    assert torch.allclose(head.means[2:], class_means(after, labels, 2)), "current rows are summed as they are now"
    assert (learner.counters.extra_passes, learner.counters.extra_rows) == (4, 32) and head.before is None
    assert "head/before" not in learner.state_dict()[0]


def test_rows_in_the_buffer_renew_old_means() -> None:
    made = cases.experiences("bert", 2, rows=8)
    er = {"er": {"budget": 100, "per_step": 2}}
    learner = build([{"lora": {"rank": 2}}, er], head={"ncm": {"refresh": True}}, protocol={"rehearsal": 100})
    for experience in made:
        learner.learn(experience)
    head: Any = learner.head
    for n, experience in enumerate(made):  # the buffer holds all rows, so old means are those under today's features
        labels = torch.tensor([int(row["label"] == f"class{2 * n + 1}") for row in experience.train])
        expected = class_means(learner.features(experience.train), labels, 2)
        assert torch.allclose(head.means[2 * n : 2 * n + 2], expected, atol=1e-6)
    assert (learner.counters.extra_passes, learner.counters.extra_rows) == (3, 8 + 16 + 8)
    assert head.counts.sum() == 16


def test_no_more_rows_are_compared_than_asked_for_and_the_same_before_and_after() -> None:
    made, compared = cases.experiences("bert", 3, rows=12), []
    learner = build({"lora": {"rank": 2}}, head={"slda": RECENTRE}, learning_rate=0.05)
    learner.learn(made[0])
    head: Any = learner.head
    plain = head.recentre
    head.recentre = lambda after: compared.append((head.before, after)) or plain(after)
    for experience in made[1:]:
        old = learner.features(experience.train)
        learner.learn(experience)
        new, (before, after) = learner.features(experience.train), compared[-1]
        chosen = torch.cdist(before, old).argmin(1)  # which rows these are
        assert len(before) == 6 and torch.allclose(before, old[chosen], atol=1e-5)
        assert torch.allclose(after, new[chosen], atol=1e-5) and not torch.allclose(after, before, atol=1e-2)
    assert (learner.counters.extra_passes, learner.counters.extra_rows) == (3 + 2 * 2, 36 + 2 * 2 * 6)


def test_nothing_is_compared_where_nothing_moves() -> None:
    made = cases.experiences("bert", 2, rows=8)
    learner = build({"lora": {"rank": 2, "first_only": True}}, head={"ncm": RECENTRE})
    for experience in made:
        learner.learn(experience)
    assert learner.counters.extra_passes == 1


@pytest.mark.parametrize(("name", "boundaries"), [*((name, "train") for name in SETTINGS), ("ridge", "none")])
def test_corrected_heads_resume_bit_for_bit(name: str, boundaries: str) -> None:
    made, states = cases.experiences("bert", 3, rows=12), []
    rights = {"rehearsal": 6, "boundaries": boundaries, "mask": "seen"}

    def learner() -> Any:
        return build([LORA, ER], head=spec_of(name), dropout=0.2, protocol=rights, per_device_eval_batch_size=5)

    whole = learner()
    for experience in made:
        whole.learn(experience, on_step=lambda loop, _: states.append(copied(loop.state_dict())))
    moments = [state for state in states if "head/before" in state[0]]
    assert len(moments) == len(states) * 2 // 3
    for state in (moments[0], moments[-2]):
        fresh = learner()
        fresh.load_state_dict(*state)
        for experience in made[fresh.position.experience :]:
            fresh.learn(experience)
        assert differences(copied(fresh.state_dict()), copied(whole.state_dict())) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_a_correction_that_fails_is_taken_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cases.experiences("bert", 2, rows=8)
    learner = build(LORA, head=spec_of(name, refresh=False))
    learner.learn(made[0])
    head: Any = learner.head
    before = {key: t.clone() for key, t in head.state_dict()[0].items()}

    def broken(*_: Any) -> None:
        raise NonFiniteLoss("no")

    with monkeypatch.context() as patched:
        patched.setattr(head, "_fit", broken)  # all was moved and summed by then
        with pytest.raises(NonFiniteLoss):
            learner.learn(made[1])
    now = head.state_dict()[0]
    kept = [key for key in ("means", "counts", "scatter", "gram") if key in before]
    assert kept and all(torch.equal(now[key][: len(before[key])], before[key]) for key in kept)
    assert now["before"].shape == (6, 16)
    learner.learn(made[1])  # goes on with the features that it kept
    assert head.before is None and head.values["rows"] == 16


@pytest.mark.parametrize(
    ("method", "head", "protocol", "error", "message"),
    [
        (
            "linear_probe",
            {"ncm": {"recentre": {}}},
            {},
            BadInput,
            "head.ncm.recentre: .* linear_probe never do; remove",
        ),
        (["linear_probe", ER], {"slda": {"refresh": True}}, {"rehearsal": 6}, BadInput, "head.slda.refresh"),
        (LORA, {"ridge": {"refresh": True}}, {}, BadInput, "head.ridge.refresh: .* no method fills one; add er"),
        (LORA, "slca", {"boundaries": "none"}, ProtocolRefused, "protocol.boundaries: is none, but head slca needs"),
    ],
)
def test_what_does_not_go_together(
    method: Any, head: Any, protocol: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(method, head=head, protocol=protocol)
