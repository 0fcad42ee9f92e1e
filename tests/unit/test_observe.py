"""Routing reports: collected in a context, never inside forward, never twice."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from perdure.memory import (
    AtomBank,
    Observation,
    RouterLog,
    Routing,
    is_observed,
    observing,
    read_atoms,
    report,
    report_written,
)


def routing(indices, weights, size=4):
    return Routing(torch.tensor(indices), torch.tensor(weights), None, size)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bank = AtomBank(6, 6)
        generator = torch.Generator().manual_seed(0)
        self.bank.grow(3, owner=0, generator=generator)
        self.bank.new_values.data.normal_(generator=generator)
        self.bank.grow(2, owner=1, generator=generator)

    def forward(self, x):
        delta, chosen = read_atoms(x, *self.bank.view()[:4], k=2, tau=0.1)
        report("0.query", chosen, self.bank.frozen_size)
        return x + delta


def test_outside_a_context_nothing_happens():
    report("a", routing([[0]], [[1.0]]), 0)
    assert not is_observed()


def test_the_innermost_context_gets_the_reports_and_the_outer_one_comes_back():
    outer, inner = [], []
    with observing(outer.append):
        report("a", routing([[0]], [[1.0]]), 0)
        with observing(inner.append):
            assert is_observed()
            report("b", routing([[0]], [[1.0]]), 0)
        report("c", routing([[0]], [[1.0]]), 0)
    assert [o.site for o in outer] == ["a", "c"] and [o.site for o in inner] == ["b"]
    assert not is_observed()


def test_a_context_is_left_after_an_error():
    with pytest.raises(RuntimeError, match="boom"), observing(lambda _: None):
        raise RuntimeError("boom")
    assert not is_observed()


def test_reports_are_detached():
    seen: list[Observation] = []
    layer = Layer()
    with observing(seen.append):
        layer(torch.randn(2, 3, 6, requires_grad=True))
    (one,) = seen
    assert one.frozen == 3 and one.routing.size == 5 and one.routing.indices.shape == (2, 3, 2)
    assert not one.routing.weights.requires_grad
    assert one.routing.scores is not None and not one.routing.scores.requires_grad


def test_statistics_of_hand_made_routings():
    log = RouterLog()
    # 4 items, the last 2 are new. Token 1: items 0, 3 at .75/.25. Token 2: item 2 alone. Token 3: all closed.
    log.add(Observation("s", routing([[0, 3], [2, 1], [0, 1]], [[0.75, 0.25], [0.5, 0.0], [0.0, 0.0]]), 2))
    stats = log.summary()["s"]
    assert stats["tokens"] == 3
    assert stats["new_share"] == pytest.approx(2 / 6)
    assert stats["new_weight_share"] == pytest.approx(0.75 / 1.5)
    assert stats["off_rate"] == pytest.approx(1 / 3)
    assert stats["effective_atoms"] == pytest.approx((1 / (0.75**2 + 0.25**2) + 1) / 2)
    assert stats["top1_weight"] == pytest.approx((0.75 + 0.5) / 3)
    assert stats["open_atoms"] == pytest.approx(1.0)
    assert stats["mass"] == pytest.approx(0.5)
    assert stats["items"] == 4 and stats["new_items"] == 2 and stats["used_share"] == pytest.approx(3 / 4)
    assert log.usage("s").tolist() == [1, 0, 1, 1]


def test_padding_is_left_out_by_the_mask():
    indices = [[[0, 1], [2, 3]], [[1, 0], [3, 2]]]
    weights = [[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]]
    whole, masked, flat = RouterLog(), RouterLog(), RouterLog()
    masked.mask = flat.mask = torch.tensor([[True, False], [True, False]])
    for log in (whole, masked):
        log.add(Observation("s", routing(indices, weights), 2))
    flat.add(Observation("s", routing(indices, weights).reshape(4), 2))
    assert whole.summary()["s"]["tokens"] == 4 and whole.summary()["s"]["new_share"] == 0.5
    assert masked.summary()["s"]["tokens"] == 2 and masked.summary()["s"]["new_share"] == 0.0
    assert masked.usage("s").tolist() == [1, 1, 0, 0]
    assert flat.summary() == masked.summary()


def test_a_shape_that_the_mask_does_not_fit_is_counted_whole_and_shown():
    log = RouterLog(mask=torch.tensor([[True, False, False]]))
    log.add(Observation("pooled", routing([[0, 1], [0, 1]], [[0.5, 0.5], [0.5, 0.5]]), 0))
    stats = log.summary()["pooled"]
    assert stats["tokens"] == 2 and stats["unmasked_calls"] == 1


def test_two_batches_add_up_and_reset_forgets():
    log = RouterLog()
    one = Observation("s", routing([[0, 1]], [[0.5, 0.5]]), 0)
    log(one)
    once = log.summary()["s"]
    log(one)
    twice = log.summary()["s"]
    assert twice["tokens"] == 2 and twice["calls"] == 2
    assert twice["effective_atoms"] == once["effective_atoms"] == pytest.approx(2.0)
    assert log.usage("s").tolist() == [2, 2, 0, 0]
    log.reset()
    assert log.summary() == {} and log.sites == []


def test_a_log_goes_on_from_its_state():
    first, second = RouterLog(), RouterLog()
    one = Observation("s", routing([[0, 3]], [[0.5, 0.5]]), 2)
    first.add(one)
    tensors, values = first.state_dict()
    first.add(one)
    second.load_state_dict(tensors, values)
    assert second.summary()["s"]["tokens"] == 1  # the snapshot did not move with the log
    second.add(one)
    assert second.summary() == first.summary() and torch.equal(second.usage("s"), first.usage("s"))


def test_a_grown_bank_extends_the_counts_and_a_shrunken_one_is_refused():
    log = RouterLog()
    log.add(Observation("s", routing([[0]], [[1.0]], size=2), 2))
    log.add(Observation("s", routing([[4]], [[1.0]], size=5), 2))
    assert log.usage("s").tolist() == [1, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="reset"):
        log.add(Observation("s", routing([[0]], [[1.0]], size=3), 2))


def test_usage_is_taken_once_and_follows_a_bank_that_drops_items():
    log = RouterLog()
    assert log.take_usage("s") is None
    log.keep("s", torch.tensor([True]))  # nothing of this site was seen: nothing to number anew
    log.add(Observation("s", routing([[0, 2]], [[0.5, 0.5]], size=3), 1))
    log.add(Observation("s", routing([[3, 2]], [[0.5, 0.5]], size=4), 3))
    taken = log.take_usage("s")
    assert taken is not None and taken.tolist() == [1, 0, 2, 1] and log.take_usage("s") is None
    log.add(Observation("s", routing([[3, 0]], [[0.5, 0.5]], size=4), 3))
    log.keep("s", torch.tensor([True, False, True, True, True]))  # grown by one since
    assert log.usage("s").tolist() == [2, 2, 2] and log.summary()["s"]["new_items"] == 1
    taken = log.take_usage("s")
    assert taken is not None and taken.tolist() == [1, 0, 1]
    log.add(Observation("s", routing([[3, 0]], [[0.5, 0.5]], size=4), 3))
    assert log.usage("s").tolist() == [3, 2, 2, 1]


def test_an_empty_bank_and_an_empty_batch_give_zeros():
    log = RouterLog()
    empty = Routing(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0), None, 0)
    log.add(Observation("none", empty, 0))
    log.add(Observation("rows", Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), None, 4), 4))
    stats = log.summary()
    assert stats["none"]["off_rate"] == 1.0 and stats["none"]["items"] == 0 and stats["none"]["new_share"] == 0
    assert stats["rows"]["tokens"] == 0 and stats["rows"]["off_rate"] == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant):
    layer, log = Layer(), RouterLog()
    calls = 0
    original = layer.forward

    def counted(x):
        nonlocal calls
        calls += 1
        return original(x)

    x = torch.randn(2, 3, 6, requires_grad=True)
    with observing(log):
        y = checkpoint(counted, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert calls == 2  # the pass was recomputed
    assert log.summary()["0.query"]["calls"] == 1 and log.summary()["0.query"]["tokens"] == 6


def test_observing_changes_no_output_and_works_without_gradients():
    layer, log = Layer(), RouterLog()
    x = torch.randn(2, 3, 6)
    plain = layer(x)
    with observing(log), torch.no_grad():
        observed = layer(x)
    assert torch.equal(plain, observed)
    counts = log.usage("0.query")
    assert counts.sum() == 2 * 3 * 2
    assert layer.bank.usage.sum() == 0  # forward wrote nothing
    layer.bank.add_usage(counts)
    assert layer.bank.usage.sum() == 12


def test_two_threads_do_not_see_each_others_context():
    import threading

    seen: list[bool] = []
    with observing(lambda _: None):
        thread = threading.Thread(target=lambda: seen.append(is_observed()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_the_size_of_what_is_added_is_averaged_over_real_tokens() -> None:
    log = RouterLog(mask=torch.tensor([[True, True, False]]))
    base = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]])
    added = torch.tensor([[[0.0, 5.0], [1.0, 0.0], [9.0, 0.0]]])
    with observing(log.add):
        report_written("0.query", added, base)
    report_written("0.query", added, base)  # nobody observes
    assert log.summary()["0.query"]["output_ratio"] == pytest.approx((1.0 + 0.5) / 2)
    again = RouterLog()
    again.load_state_dict(*log.state_dict())
    assert again.summary() == log.summary()
