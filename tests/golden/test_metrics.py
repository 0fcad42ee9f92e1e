"""Every metric against a matrix worked by hand."""

from __future__ import annotations

import pytest

from perdure.errors import BadInput
from perdure.evaluation import metrics as m

N = None
# Accuracy after each of three experiences; the next one is scored as well.
R = [[0.8, 0.1, N], [0.6, 0.9, 0.2], [0.5, 0.7, 1.0]]
FULL = [[0.8, 0.1, 0.3], [0.6, 0.9, 0.2], [0.5, 0.7, 1.0]]
# Perplexities: lower is better. Experience 0: 10 -> 8 -> 14, experience 1: 20 -> 26.
P = [[10.0, N, N], [8.0, 20.0, N], [14.0, 26.0, 30.0]]


def test_average_accuracy():
    assert m.row_averages(R) == pytest.approx([0.8, 0.75, 2.2 / 3])
    assert m.average_accuracy(R) == pytest.approx(2.2 / 3)
    assert m.average_accuracy(P) == pytest.approx(70 / 3)
    assert m.average_incremental_accuracy(R) == pytest.approx((0.8 + 0.75 + 2.2 / 3) / 3)
    assert m.learning_accuracy(R) == pytest.approx((0.8 + 0.9 + 1.0) / 3)
    assert m.worst_experience(R) == 0.5
    assert m.worst_experience(P, higher_is_better=False) == 30.0


def test_forgetting_counts_from_the_best_earlier_score():
    assert m.forgetting_per_experience(R) == pytest.approx([0.3, 0.2])
    assert m.forgetting(R) == pytest.approx(0.25)
    # The best earlier perplexity of experience 0 is 8, reached after experience 1.
    assert m.forgetting_per_experience(P, higher_is_better=False) == pytest.approx([6.0, 6.0])
    assert m.forgetting(P, higher_is_better=False) == pytest.approx(6.0)
    # Better in the end than ever before: negative.
    assert m.forgetting([[0.5, N], [0.7, 0.9]]) == pytest.approx(-0.2)


def test_a_score_from_before_learning_counts_as_an_earlier_one():
    # Zero-shot 0.9 on experience 1, 0.7 just after learning it, 0.8 at the end.
    assert m.forgetting_per_experience([[0.5, 0.9, N], [0.5, 0.7, N], [0.5, 0.8, 0.6]]) == pytest.approx([0.0, 0.1])


def test_backward_transfer():
    assert m.backward_transfer(R) == pytest.approx((-0.3 - 0.2) / 2)
    assert m.backward_transfer(P, higher_is_better=False) == pytest.approx((-4 - 6) / 2)
    # TRACE's code: the last experience counts in T with 0, gains are cut off.
    assert m.backward_transfer_clipped(R) == pytest.approx((-0.3 - 0.2 + 0) / 3)
    gained = [[0.5, N, N], [0.6, 0.9, N], [0.7, 0.6, 0.8]]
    assert m.backward_transfer(gained) == pytest.approx((0.2 - 0.3) / 2)
    assert m.backward_transfer_clipped(gained) == pytest.approx(-0.3 / 3)


def test_forward_transfer_needs_the_baseline_and_the_next_experience():
    assert m.forward_transfer(R, [0.0, 0.05, 0.1]) == pytest.approx((0.05 + 0.1) / 2)
    assert m.forward_transfer(R, None) is None
    assert m.forward_transfer(R, [0.0, 0.05]) is None
    assert m.forward_transfer(P, [50.0, 60.0, 70.0], higher_is_better=False) is None
    seen = [[10.0, 40.0], [8.0, 20.0]]
    assert m.forward_transfer(seen, [50.0, 60.0], higher_is_better=False) == pytest.approx(20.0)


def test_x_tail():
    assert m.transfer(FULL) == pytest.approx((0.1 + (0.3 + 0.2) / 2) / 2)
    assert m.average(FULL) == pytest.approx(5.1 / 9)
    assert m.last(FULL) == pytest.approx(2.2 / 3)
    assert m.transfer(R) is None and m.average(R) is None


def test_a_true_zero_counts_in_transfer():
    assert m.transfer([[0.5, 0.0], [0.5, 0.5]]) == 0.0


def test_x_tail_row_of_the_published_table():
    # MoRAM, Transfer per data set and its printed mean.
    columns = [74.5, 38.1, 46.9, 65.3, 82.9, 45.8, 88.2, 65.1, 62.9]
    matrix = [[90.0, *columns] for _ in range(10)]
    assert round(m.transfer(matrix) or 0, 1) == 63.3


def test_intransigence():
    assert m.intransigence(R, [0.85, 0.9, 0.9]) == pytest.approx((0.05 + 0.0 - 0.1) / 3)
    assert m.intransigence(P, [9.0, 19.0, 29.0], higher_is_better=False) == pytest.approx(1.0)
    assert m.intransigence(R, [0.85, N, 0.9]) is None


def test_one_experience_has_nothing_to_forget_yet():
    figures = m.summary([[0.7]])
    assert figures["average_accuracy"] == figures["learning_accuracy"] == 0.7
    assert figures["average_incremental_accuracy"] == 0.7
    for name in ("forgetting", "backward_transfer", "forward_transfer", "transfer"):
        assert figures[name] is None, name
    assert figures["backward_transfer_clipped"] == 0.0


def test_empty_matrix():
    assert set(m.summary([]).values()) == {None}


def test_joint_training_is_measured_at_the_end_only():
    joint = [[N, N, N], [N, N, N], [0.9, 0.8, 0.7]]
    figures = m.summary(joint)
    assert figures["average_accuracy"] == pytest.approx(0.8)
    # One diagonal cell of three is no learning accuracy.
    for name in ("learning_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer"):
        assert figures[name] is None, name


def test_experience_without_test_rows_is_left_out():
    figures = m.summary([[0.8, N, N], [0.6, N, N], [0.4, N, 1.0]])
    assert figures["average_accuracy"] == pytest.approx(0.7)
    assert figures["learning_accuracy"] == pytest.approx(0.9)
    assert figures["forgetting"] == pytest.approx(0.4)
    assert figures["average_incremental_accuracy"] == pytest.approx((0.8 + 0.6 + 0.7) / 3)


def test_rows_of_different_length():
    assert m.check_matrix([[0.8], [0.6, 0.9]]) == [[0.8, N], [0.6, 0.9]]
    assert m.forgetting([[0.8], [0.6, 0.9]]) == pytest.approx(0.2)
    # More columns than rows while a run goes on.
    assert m.average_accuracy([[0.8, 0.3, 0.2]]) == 0.8


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ("abc", "expected a list of rows"),
        ([[0.1], 0.2], "row 1"),
        ([[0.1, "x"]], "row 0, column 1"),
        ([[0.1, N], [0.2, float("nan")]], "row 1, column 1"),
        ([[float("inf")]], "row 0, column 0"),
        ([[True]], "row 0, column 0"),
    ],
)
def test_malformed_matrix_is_named(matrix, words):
    with pytest.raises(BadInput, match=words):
        m.summary(matrix)


def test_baseline_is_checked():
    with pytest.raises(BadInput, match="baseline: column 1"):
        m.forward_transfer(R, [0.1, "x"])  # type: ignore[list-item]


def test_anytime_accuracy():
    assert m.anytime_accuracy([(10, 0.2), (20, 0.4), (30, 0.9)]) == pytest.approx(0.5)
    # Uneven samples weigh by the steps they stand for: (10 * 0.2 + 30 * 0.6) / 40.
    assert m.anytime_accuracy([(10, 0.2), (40, 0.6)]) == pytest.approx(0.5)
    assert m.anytime_accuracy([]) is None
    with pytest.raises(BadInput, match="sample 1"):
        m.anytime_accuracy([(10, 0.2), (10, 0.4)])


# Three experiences that end at steps 10, 20, 30.
ENDS = [10, 20, 30]
PROBES = {
    0: [(5, 0.1), (10, 0.8), (11, 0.3), (15, 0.7), (25, 0.6)],
    1: [(15, 0.2), (20, 0.9), (21, 0.5), (30, 0.7)],
    2: [(25, 0.4), (30, 1.0)],
}


def test_stability_gap():
    # Worst after its end: 0.3 for experience 0, 0.5 for experience 1.
    assert m.min_acc(PROBES, ENDS) == pytest.approx(0.4)
    assert m.wc_acc(PROBES, ENDS) == pytest.approx(1.0 / 3 + 2 / 3 * 0.4)
    assert m.min_acc(PROBES, [10]) is None
    assert m.wc_acc({0: [(5, 0.4), (10, 0.8)]}, [10]) == 0.8  # one experience: a(1), as the formula has it
    assert m.wc_acc({}, [10]) is None
    assert m.min_acc({0: [(5, 0.1)], 1: [(20, 0.9)]}, [10, 20]) is None
    assert m.min_acc({0: [(11, 20.0), (12, 30.0)], 1: []}, [10, 20], higher_is_better=False) == 30.0


def test_windowed_forgetting_and_plasticity_count_steps():
    # Window of 6 steps: drops 0.8 -> 0.3, 0.9 -> 0.5, and for experience 2 the rise 0.4 -> 1.0.
    assert m.windowed_forgetting(PROBES, 6) == pytest.approx((0.5 + 0.4 - 0.6) / 3)
    # Rises: 0.1 -> 0.8, 0.2 -> 0.9, 0.4 -> 1.0.
    assert m.windowed_plasticity(PROBES, 6) == pytest.approx((0.7 + 0.7 + 0.6) / 3)
    # In 2 steps only neighbours in time meet: 10 -> 11 and 20 -> 21.
    assert m.windowed_forgetting(PROBES, 2) == pytest.approx((0.5 + 0.4) / 2)
    assert m.windowed_plasticity(PROBES, 2) == pytest.approx((-0.5 - 0.4) / 2)
    assert m.windowed_forgetting({0: [(0, 5.0), (1, 9.0)]}, 10, higher_is_better=False) == 4.0
    with pytest.raises(BadInput, match="window"):
        m.windowed_forgetting(PROBES, 1)


def test_direction():
    assert m.direction("average_accuracy", True) and not m.direction("average_accuracy", False)
    assert not m.direction("forgetting", True) and not m.direction("evaluation_seconds", True)
    assert m.direction("backward_transfer", False)
