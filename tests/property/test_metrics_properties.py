"""Laws that hold for every matrix."""

from __future__ import annotations

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.evaluation import metrics as m

scores = st.floats(0, 1, allow_nan=False)


@st.composite
def ragged(draw):
    cells = st.none() | scores
    rows = draw(st.integers(0, 6))
    return [draw(st.lists(cells, max_size=7)) for _ in range(rows)]


@st.composite
def triangles(draw):
    n = draw(st.integers(1, 6))
    return [[draw(scores) if j <= i else None for j in range(n)] for i in range(n)]


@given(ragged())
@settings(deadline=None)
def test_summary_is_finite_json_with_fixed_keys(matrix):
    figures = m.summary(matrix)
    assert list(figures) == list(m.summary([]))
    assert all(v is None or isinstance(v, float) and math.isfinite(v) for v in figures.values())
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@given(triangles())
@settings(deadline=None)
def test_relations_on_a_lower_triangle(matrix):
    f = m.summary(matrix)
    average, learning, worst = f["average_accuracy"], f["learning_accuracy"], f["worst_experience"]
    assert average is not None and learning is not None and worst is not None
    assert worst <= average + 1e-12
    if len(matrix) == 1:
        assert f["forgetting"] is None
        return
    clipped = f["backward_transfer_clipped"]
    assert f["forgetting"] is not None and f["backward_transfer"] is not None and clipped is not None
    # The best earlier score is at least the one just after learning.
    assert f["forgetting"] >= -f["backward_transfer"] - 1e-12
    # A_T = LA + (T - 1) / T BWT
    n = len(matrix)
    assert math.isclose(average, learning + (n - 1) / n * f["backward_transfer"], abs_tol=1e-9)
    assert clipped <= min(0.0, (n - 1) / n * f["backward_transfer"]) + 1e-12


@given(ragged(), st.lists(scores, max_size=7))
@settings(deadline=None)
def test_turning_the_scores_round_turns_the_direction_round(matrix, baseline):
    negated = [[None if c is None else -c for c in row] for row in matrix]
    up = m.summary(matrix, True, baseline)
    down = m.summary(negated, False, [-b for b in baseline])
    for name in ("forgetting", "backward_transfer", "backward_transfer_clipped", "forward_transfer"):
        assert up[name] == down[name], name


@given(triangles())
@settings(deadline=None)
def test_an_experience_without_test_rows_changes_nothing(matrix):
    n = len(matrix)
    longer = [[*row, None] for row in matrix]
    inserted = [[None, *row[:n]] for row in longer]
    spaced = [[None] * (n + 1), *inserted]
    a, b = m.summary(matrix), m.summary(spaced)
    for name in ("average_accuracy", "learning_accuracy", "backward_transfer", "average_incremental_accuracy"):
        one, other = a[name], b[name]
        assert (one is None) == (other is None)
        assert one is None or other is None or math.isclose(one, other, abs_tol=1e-12)


@given(st.lists(scores, min_size=1, max_size=20))
def test_even_samples_make_anytime_accuracy_their_mean(values):
    found = m.anytime_accuracy([(100 * (i + 1), v) for i, v in enumerate(values)])
    assert found is not None and math.isclose(found, math.fsum(values) / len(values), abs_tol=1e-9)
