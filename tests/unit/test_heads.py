"""Heads: growth, seeds, state, autocast, and the ridge head's pass."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

from perdure.errors import BadInput, NonFiniteLoss
from perdure.registry import HEADS

NAMES = ["linear", "cosine", "ridge", "ncm", "slda", "slca"]
SETTINGS = {name: {} for name in NAMES} | {"ridge": {"features": 32}}


def make(name, width=6, seed=3, classes=0, **settings):
    ((_, config),) = HEADS.parse({name: SETTINGS[name] | settings}, "head")
    head = HEADS.get(name)(config)
    assert head.build(width, seed) is head.module
    head.grow(classes)
    return head


def filled(name, classes=4, **settings):
    head = make(name, classes=classes, **settings)
    if head.closed_form or head.fits:
        torch.manual_seed(0)
        head.begin_fit(60, 1)
        head.update(torch.randn(60, 6), torch.arange(60) % classes)
        head.end_fit()
    return head


def test_importing_heads_and_objectives_loads_no_torch():
    code = (
        "import sys; from perdure.registry import HEADS, OBJECTIVES; import perdure.processors, perdure.replay;"
        "print(HEADS.names(), OBJECTIVES.names());"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "'ridge'" in out[0] and "'causal_lm'" in out[0]
    assert out[1] == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_growth_keeps_old_scores(name):
    head = filled(name)
    x = torch.randn(5, 6)
    before = head.logits(x).detach()
    head.grow(7)
    after = head.logits(x).detach()
    assert before.abs().max() > 0
    assert torch.allclose(after[:, :4], before, atol=1e-6)
    assert after.shape == (5, 7) and after.isfinite().all() and after.dtype == torch.float32
    head.grow(2)
    assert head.classes == 7


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_steps_of_growth_do_not_change_the_weights(name):
    at_once, by_steps = make(name, classes=5), make(name)
    for classes in (1, 3, 5):
        by_steps.grow(classes)
    assert torch.equal(at_once.module.weight, by_steps.module.weight)
    assert not torch.equal(at_once.module.weight, make(name, seed=4, classes=5).module.weight)
    assert len(at_once.module.weight.unique()) == 30
    assert at_once.module.weight.abs().max() <= 1 / math.sqrt(6)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_round_into_a_head_of_any_size(name):
    head = filled(name)
    tensors, values = head.state_dict()
    x = torch.randn(3, 6)
    for classes in (0, 4, 9):
        other = make(name, seed=8, classes=classes)
        other.load_state_dict({k: t.clone() for k, t in tensors.items()}, values)
        assert other.classes == 4
        assert torch.equal(other.logits(x), head.logits(x))
    assert [n for n, _ in other.parameters()] == [n for n, _ in head.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_float32_under_autocast(name):
    head = filled(name)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head.logits(x)
        low = head.logits(x.bfloat16())
    assert inside.dtype == low.dtype == torch.float32
    assert torch.equal(inside, head.logits(x))


def test_linear_formula_and_gradient():
    head = make("linear", classes=3)
    with torch.no_grad():
        head.module.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.randn(4, 6)
    assert torch.allclose(head.logits(x), x @ head.module.weight.T + head.module.bias, atol=1e-6)
    head.logits(x).sum().backward()
    assert torch.allclose(head.module.weight.grad, x.sum(0).expand(3, 6), atol=1e-6)
    assert [n for n, _ in make("linear", classes=2, bias=False).parameters()] == ["weight"]


def test_cosine_formula_scale_and_length():
    head = make("cosine", classes=3, scale=4.0)
    x = torch.randn(4, 6)
    expected = 4 * normalize(x, dim=1) @ normalize(head.module.weight, dim=1).T
    assert torch.allclose(head.logits(x), expected, atol=1e-6)
    assert torch.allclose(head.logits(100 * x), head.logits(x), atol=1e-5)
    assert [n for n, _ in head.parameters()] == ["weight", "scale"]
    assert [n for n, _ in make("cosine", classes=3, learn_scale=False).parameters()] == ["weight"]
    assert head.logits(torch.zeros(1, 6)).isfinite().all()


def test_ridge_state_is_half_of_the_square():
    head = filled("ridge")
    tensors, values = head.state_dict()
    assert tensors["gram"].shape == (32 * 33 // 2,) and tensors["gram"].dtype == torch.float64
    assert values["values"]["lambda"] in head.config.lambdas and values["values"]["rows"] == 60
    assert set(tensors) == {"projection", "gram", "cross", "weight"}


def test_ridge_without_rows_and_single_rows():
    head = make("ridge", classes=2)
    assert torch.equal(head.logits(torch.randn(3, 6)), torch.zeros(3, 2))
    head.begin_fit(0, 0)
    head.end_fit()
    assert head.ridge == 1.0
    head.begin_fit(1, 0)
    head.update(torch.randn(1, 6), torch.tensor([1]))
    head.end_fit()
    assert head.values["rows"] == 1 and not head.values["chosen"]
    assert head.logits(torch.randn(3, 6)).isfinite().all()


def test_ridge_ignores_rows_that_count_nothing():
    head, other = make("ridge", classes=2), make("ridge", classes=2)
    x, y = torch.randn(20, 6), torch.arange(20) % 2
    filler = torch.full((5, 6), float("inf"))
    for h, features, labels in (
        (head, x, y),
        (other, torch.cat([x, filler]), torch.cat([y, torch.full((5,), -100)])),
    ):
        h.begin_fit(20, 0)
        h.update(features, labels)
        h.end_fit()
    assert torch.equal(head.module.weight, other.module.weight)


def test_ridge_refuses_what_would_spoil_the_statistics():
    head = make("ridge", classes=2)
    with pytest.raises(RuntimeError, match="begin_fit"):
        head.update(torch.randn(2, 6), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="begin_fit"):
        head.end_fit()
    head.begin_fit(4, 0)
    with pytest.raises(RuntimeError, match="label 2 with room for 2"):
        head.update(torch.randn(2, 6), torch.tensor([0, 2]))
    with pytest.raises(NonFiniteLoss):
        head.update(torch.tensor([[float("nan")] * 6]), torch.tensor([0]))
    head.update(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))
    head.end_fit()
    assert head.values["rows"] == 4


def test_ridge_config_names_the_field():
    with pytest.raises(BadInput, match="head.ridge.lambdas.*ascending"):
        HEADS.parse({"ridge": {"lambdas": [1.0, 0.1]}}, "head")
    with pytest.raises(BadInput, match="did you mean 'features'"):
        HEADS.parse({"ridge": {"feature": 10}}, "head")


def test_ridge_chooses_the_best_of_the_grid():
    """The walk ends where an exhaustive search does, and large noise asks for a larger λ than none."""
    chosen = {}
    for noise in (0.0, 3.0):
        torch.manual_seed(1)
        centers = torch.randn(3, 6)
        y = torch.arange(90) % 3
        x = centers[y] + noise * torch.randn(90, 6)
        head = make("ridge", classes=3)
        head.begin_fit(90, 5)
        head.update(x, y)
        head._flush(1)
        features, labels = (torch.cat(part) for part in zip(*head._held, strict=True))
        assert len(labels) == 18
        z, target = head.random_features(features).double(), torch.nn.functional.one_hot(labels, 3).double()
        errors = {ridge: head._error(ridge, z, target) for ridge in head.config.lambdas}
        head.end_fit()
        assert head.ridge == min(errors, key=errors.__getitem__)
        chosen[noise] = head.ridge
    assert chosen[0.0] < chosen[3.0]


def test_ridge_sums_that_overflow_are_refused():
    ridge = make("ridge", classes=2, normalize=False, holdout=0)
    ridge.begin_fit(2, 0)
    ridge.update(torch.full((2, 6), 3e38), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteLoss, match="the sums over the features are no longer finite"):
        ridge.end_fit()
