"""Heads of class means: whatever the batches, the order or the interruptions, the same statistics."""

import torch
from head_passes import feed, fit
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.registry import HEADS

WIDTH = 5
NAMES = st.sampled_from(["ncm", "slda", "slca"])


def make(name, classes, **extra):
    own = {"slca": {"samples": 8, "epochs": 2}}.get(name, {})
    ((_, config),) = HEADS.parse({name: own | extra}, "head")
    head = HEADS.get(name)(config)
    head.build(WIDTH, 7)
    head.grow(classes)
    return head


def data(seed, rows, classes):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + torch.randn(rows, WIDTH, generator=generator)
    return x, torch.randint(classes, (rows,), generator=generator)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    return [name for name in a[0] if not torch.equal(a[0][name], b[0][name])]


def direct(x, y, classes):
    """Means [C, D] and scatter within classes [C, D, D] from all rows at once."""
    parts = [x[y == c].double() for c in range(classes)]
    means = torch.stack([part.mean(0) if len(part) else torch.zeros(WIDTH).double() for part in parts])
    return means, torch.stack([(part - m).T @ (part - m) for part, m in zip(parts, means, strict=True)])


def check(head, x, y, classes):
    means, scatter = direct(x, y, classes)
    assert torch.allclose(head.means, means, rtol=1e-9) and head.counts.sum() == len(y) == head.values["rows"]
    if hasattr(head.module, "scatter"):
        whole = scatter.sum(0) if head.module.scatter.ndim == 2 else scatter.float()
        assert torch.allclose(head.module.scatter, whole, rtol=1e-4, atol=1e-3)
    assert head.logits(x).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    NAMES, st.integers(0, 10**6), st.integers(1, 1200), st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.integers(1, 6),
)  # fmt: skip
def test_any_batches_give_the_same_statistics(name, seed, rows, sizes, classes):
    x, y = data(seed, rows, classes)
    head, whole = make(name, classes), make(name, classes)
    fit(head, x, y, sizes)
    fit(whole, x, y, [rows])
    assert same(head, whole) == []
    check(head, x, y, classes)


@settings(max_examples=25, deadline=None)
@given(NAMES, st.integers(0, 10**6), st.permutations(range(4)), st.integers(1, 64))
def test_order_of_experiences_does_not_change_the_statistics(name, seed, order, size):
    parts = [data(seed + i, 20 + 7 * i, 5) for i in range(4)]
    other = make(name, 5)
    for i in order:
        fit(other, *parts[i], [size], seed=i)
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    check(other, x, y, 5)


@settings(max_examples=20, deadline=None)
@given(NAMES, st.integers(0, 10**6), st.integers(2, 700), st.integers(0, 700))
def test_interrupted_pass_goes_on_bit_for_bit(name, seed, rows, cut):
    cut = min(cut, rows)
    x, y = data(seed, rows, 4)
    whole, first = make(name, 4), make(name, 4)
    old = data(seed + 1, 30, 3)
    fit(whole, *old, [8], seed=1)
    fit(first, *old, [8], seed=1)
    fit(whole, x, y, [33], seed=2)
    first.begin_fit(rows, 2)
    feed(first, x[:cut], y[:cut], [33])
    tensors, values = first.state_dict()
    tensors = {k: t.clone() for k, t in tensors.items()}
    feed(first, x[cut:], y[cut:], [33])  # the lost work of the killed process must not matter
    resumed = make(name, 0)
    resumed.load_state_dict(tensors, values)
    feed(resumed, x[cut:], y[cut:], [50])
    resumed.end_fit()
    assert same(whole, resumed) == []
