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


# Level of 0.8 at the boundary after step 10; then 0.3, 0.79 and, in the third experience, never above 0.7.
GAP = {
    0: [(5, 0.4), (10, 0.8), (12, 0.3), (15, 0.79), (20, 0.7), (24, 0.5), (30, 0.6)],
    1: [(15, 0.2), (20, 0.9), (24, 0.9), (30, 0.5)],
    2: [(24, 0.4), (30, 1.0)],
}


def test_recovery_counts_steps_from_the_boundary_to_the_first_probe_that_is_back():
    # 0.95 of 0.8 is 0.76: back at step 15. Of 0.7 it is 0.665: 0.5 and 0.6 are not. Of 0.9, 0.855: 0.5 at the end.
    assert m.recoveries(GAP, ENDS) == [(0, 0, 5, True), (0, 1, 10, False), (1, 1, 10, False)]
    assert m.recovery_steps(GAP, ENDS) == pytest.approx((5 + 10 + 10) / 3)
    assert m.recovered_share(GAP, ENDS) == pytest.approx(1 / 3)
    # Half the level: 0.4, 0.35, 0.45 are the bars; only 0.3 at step 12 is below one.
    assert m.recoveries(GAP, ENDS, 0.5) == [(0, 0, 5, True), (0, 1, 0, True), (1, 1, 0, True)]
    # The whole level: 0.79 is not 0.8.
    assert m.recoveries(GAP, ENDS, 1.0)[0] == (0, 0, 10, False)
    assert m.recovery_steps(GAP, [10]) is None and m.recovered_share({}, ENDS) is None
    with pytest.raises(BadInput, match="share"):
        m.recovery_steps(GAP, ENDS, 95)


def test_recovery_of_perplexity():
    # Level 10: below 10 / 0.8 = 12.5 is back. 20 has fallen, 12 is back after 6 steps.
    probes = {0: [(10, 10.0), (13, 20.0), (16, 12.0), (20, 30.0)]}
    assert m.recoveries(probes, [10, 20], 0.8, higher_is_better=False) == [(0, 0, 6, True)]
    assert m.recovery_steps(probes, [10, 20], 0.25, higher_is_better=False) == 0.0  # 30 is not above 10 / 0.25


def test_perplexity_forms_of_what_is_seen_between_boundaries():
    probes = {0: [(5, 30.0), (10, 10.0), (15, 40.0), (20, 12.0)], 1: [(15, 50.0), (20, 20.0)]}
    assert m.min_acc(probes, [10, 20], higher_is_better=False) == 40.0
    assert m.wc_acc(probes, [10, 20], higher_is_better=False) == pytest.approx(20 / 2 + 40 / 2)
    # The largest rise of experience 0 inside 10 steps is 10 -> 40; experience 1 only falls, by 30.
    assert m.windowed_forgetting(probes, 10, higher_is_better=False) == pytest.approx((30 - 30) / 2)
    assert m.windowed_plasticity(probes, 10, higher_is_better=False) == pytest.approx((28 + 30) / 2)
    # averages 30, 10, 45, 16, each for 5 of 20 steps
    assert m.anytime_accuracy([(5, 30.0), (10, 10.0), (15, 45.0), (20, 16.0)]) == pytest.approx(101 / 4)


def test_perplexity_forms_of_the_matrix():
    figures = m.summary([[10.0, 40.0, 90.0], [8.0, 20.0, 80.0], [14.0, 26.0, 30.0]], False, [50.0, 60.0, 100.0])
    expected = {
        "average_accuracy": 70 / 3, "average_incremental_accuracy": (10 + 14 + 70 / 3) / 3, "learning_accuracy": 20.0,
        "forgetting": 6.0, "backward_transfer": -5.0, "backward_transfer_clipped": -10 / 3, "worst_experience": 30.0,
        "forward_transfer": (20 + 20) / 2, "transfer": (40 + 85) / 2, "average": 318 / 9, "last": 70 / 3,
        "geometric_average": (14 * 26 * 30) ** (1 / 3),
    }  # fmt: skip
    assert figures == pytest.approx(expected)


def test_geometric_average():
    assert m.geometric_average([[4.0, 100.0], [2.0, 8.0]]) == pytest.approx(4.0)
    assert m.geometric_average([[4.0, N], [2.0, N]]) == 2.0  # the second has no test rows
    assert m.geometric_average([[4.0, N], [N, 8.0]]) is None and m.geometric_average([[0.0]]) is None
    assert m.geometric_average([]) is None
    assert "geometric_average" not in m.summary([[0.7]])


def test_direction():
    assert not m.direction("recovery_steps", True) and m.direction("recovered_share", False)
    assert not m.direction("class_forgetting", True)
    assert m.direction("average_accuracy", True) and not m.direction("average_accuracy", False)
    assert not m.direction("forgetting", True) and not m.direction("evaluation_seconds", True)
    assert m.direction("backward_transfer", False)
