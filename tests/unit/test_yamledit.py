"""Values changed inside YAML text: what is asked for is there, and every comment that need not go stays."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perdure import yamltext
from perdure.errors import BadInput
from perdure.yamledit import edited

TEXT = """\
# my recipe
name: mine   # its name
training: {learning_rate: 1e-3, epochs: 1}  # all arms
tuning:
  # how it was found
  grid: {learning_rate: [1e-3]}
  trials: 1   # few
  'on': seed 0
arms:
  lora:  # the rival
    method: {lora: {rank: 2}}
    # a note on the note
    note: plain, with a comma
  er: [lora, er]
  frozen:
"""


def changed(**changes) -> dict:
    data = yamltext.load(TEXT, "x")
    for path, value in changes.items():
        *above, last = path.split("__")
        where = data
        for part in above:
            where = where[part]
        if value is None:
            del where[last]
        else:
            where[last] = value
    return data


def lines(text: str) -> set[str]:
    return set(text.splitlines())


@pytest.mark.parametrize(
    ("changes", "gone", "new"),
    [
        ({}, set(), set()),
        (
            {"training__learning_rate": 3e-4},
            {"training: {learning_rate: 1e-3, epochs: 1}  # all arms"},
            {"training: {learning_rate: 3e-4, epochs: 1}  # all arms"},
        ),
        (
            {"training__weight_decay": 0.5},
            {"training: {learning_rate: 1e-3, epochs: 1}  # all arms"},
            {"training: {learning_rate: 1e-3, epochs: 1, weight_decay: 0.5}  # all arms"},
        ),
        ({"tuning__trials": 8}, {"  trials: 1   # few"}, {"  trials: 8   # few"}),
        ({"tuning__trials": None}, {"  trials: 1   # few"}, set()),
        ({"tuning__equal": True}, set(), {"  equal: true"}),
        ({"arms__lora__training": {"learning_rate": 1e-5}}, set(), {"    training: {learning_rate: 1e-5}"}),
        ({"arms__lora__note": "a: b, c"}, {"    note: plain, with a comma"}, {"    note: 'a: b, c'"}),
        ({"arms__frozen": {"note": "x"}}, {"  frozen:"}, {"  frozen: {note: x}"}),
        ({"arms__er": ["lora", {"er": {"budget": 9}}]}, {"  er: [lora, er]"}, {"  er: [lora, {er: {budget: 9}}]"}),
        ({"arms__er": ["lora"]}, {"  er: [lora, er]"}, {"  er: [lora]"}),
        ({"seed": 3}, set(), {"seed: 3"}),
    ],
)
def test_only_the_lines_that_must_change_do(changes, gone, new):
    wanted = changed(**changes)
    text = edited(TEXT, wanted, "x")
    assert yamltext.load(text, "x") == wanted
    assert lines(TEXT) - lines(text) == gone and lines(text) - lines(TEXT) == new


def test_line_ends_of_windows_stay():
    text = edited(TEXT.replace("\n", "\r\n"), changed(tuning__equal=True, arms__lora__training={"epochs": 2}), "x")
    assert text.count("\n") == text.count("\r\n") == TEXT.count("\n") + 2
    assert yamltext.load(text, "x") == changed(tuning__equal=True, arms__lora__training={"epochs": 2})


def test_a_text_without_a_last_line_end_takes_a_new_key():
    assert edited("a: 1", {"a": 1, "on": 2}, "x") == "a: 1\n'on': 2"


def test_what_an_anchor_serves_twice_is_refused():
    text = "a: &rates {x: 1}\nb: *rates\n"
    with pytest.raises(BadInput, match="mine: cannot be changed line by line"):
        edited(text, {"a": {"x": 2}, "b": {"x": 1}}, "mine")


scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text("ab,:#[]{}' \n", max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcde"), inner, max_size=3),
    max_leaves=5,
)
documents = st.dictionaries(st.sampled_from("abcde"), values, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents, documents)
def test_any_document_becomes_any_other(old, new):
    before = copy.deepcopy(new)
    assert yamltext.load(edited(yamltext.dump(old), new, "x"), "x") == new == before
    assert yamltext.load(edited(yamltext.inline(old), new, "x"), "x") == new


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "1e-3"), (2.5e-4, "2.5e-4"), (0.5, "0.5"), (0.01, "1e-2"), (0.0125, "0.0125"), (0.0, "0.0"), (3.0, "3.0")],
)
def test_small_numbers_are_written_as_people_write_rates(value, text):
    assert yamltext.inline(value, short=True) == text and yamltext.load(text, "x") == value
