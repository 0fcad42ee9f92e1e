"""The ridge head's sums: whatever the batches, the order or the interruptions, the same solution."""

import torch
from head_passes import feed, fit
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.registry import HEADS

WIDTH, SIZE = 5, 24


def make(classes, **extra):
    ((_, config),) = HEADS.parse({"ridge": {"features": SIZE, **extra}}, "head")
    head = HEADS.get("ridge")(config)
    head.build(WIDTH, 7)
    head.grow(classes)
    return head


def data(seed, rows, classes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    return x, torch.randint(classes, (rows,), generator=generator)


def direct(head, x, y):
    """W = (ZᵀZ + λI)⁻¹ ZᵀY in one formula, all in float64."""
    z = torch.relu((x / x.norm(dim=1, keepdim=True)) @ head.module.projection).double()
    target = torch.eye(head.classes, dtype=torch.float64)[y]
    return torch.linalg.solve(z.T @ z + head.ridge * torch.eye(SIZE, dtype=torch.float64), z.T @ target)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 700),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.integers(1, 6),
    st.floats(0, 0.9),
)
def test_any_batches_give_the_direct_solution(seed, rows, sizes, classes, holdout):
    x, y = data(seed, rows, classes)
    head, whole = make(classes, holdout=holdout), make(classes, holdout=holdout)
    fit(head, x, y, sizes)
    fit(whole, x, y, [rows])
    assert head.ridge == whole.ridge
    for name in ("gram", "cross", "weight"):
        assert torch.equal(getattr(head.module, name), getattr(whole.module, name)), name
    assert head.values["rows"] == rows
    assert torch.allclose(head.module.weight.double(), direct(head, x, y), rtol=1e-3, atol=1e-4)
    assert head.logits(x).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(4)), st.integers(1, 64))
def test_order_of_experiences_does_not_change_the_sums(seed, order, size):
    parts = [data(seed + i, 20 + 7 * i, 5) for i in range(4)]
    forward, other = make(5), make(5)
    for i in range(4):
        fit(forward, *parts[i], [17], seed=i)
    for i in order:
        fit(other, *parts[i], [size], seed=i)
    for name in ("gram", "cross"):
        assert torch.allclose(getattr(forward.module, name), getattr(other.module, name), rtol=1e-9, atol=1e-9)
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    assert torch.allclose(other.module.weight.double(), direct(other, x, y), rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_growth_between_experiences_equals_room_from_the_start(seed, steps):
    growing, roomy = make(0), make(sum(steps))
    classes = 0
    for i, more in enumerate(steps):
        x, y = data(seed + i, 40, more)
        y, classes = y + classes, classes + more
        growing.grow(classes)
        fit(growing, x, y, [9], seed=i)
        roomy.config = growing.config.model_copy(update={"start": growing.ridge, "holdout": 0.0})
        roomy.values["lambda"] = growing.ridge
        fit(roomy, x, y, [9], seed=i)
        scores = growing.logits(x)
        assert scores.shape == (40, classes) and scores.isfinite().all()
        assert torch.allclose(scores, roomy.logits(x)[:, :classes], atol=1e-4)
        assert torch.equal(roomy.logits(x)[:, classes:], torch.zeros(40, sum(steps) - classes))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 700), st.integers(0, 700))
def test_interrupted_pass_goes_on_bit_for_bit(seed, rows, cut):
    cut = min(cut, rows)
    x, y = data(seed, rows, 4)
    whole, first = make(4), make(4)
    old = data(seed + 1, 30, 4)
    fit(whole, *old, [8], seed=1)
    fit(first, *old, [8], seed=1)
    fit(whole, x, y, [33], seed=2)
    first.begin_fit(rows, 2)
    feed(first, x[:cut], y[:cut], [33])
    tensors, values = first.state_dict()
    tensors = {k: t.clone() for k, t in tensors.items()}
    feed(first, x[cut:], y[cut:], [33])  # the lost work of the killed process must not matter
    resumed = make(0)
    resumed.load_state_dict(tensors, values)
    feed(resumed, x[cut:], y[cut:], [50])
    resumed.end_fit()
    a, b = whole.state_dict(), resumed.state_dict()
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        assert torch.equal(a[0][name], b[0][name]), name
