"""Rows, generators and settings from Python that are unusual, and what is said of those that cannot be honoured."""

from __future__ import annotations

import decimal
import itertools

import numpy as np
import pytest

from perdure.errors import BadInput, DamagedState
from perdure.streams import Experience, Spool, Stream, build_stream
from perdure.streams.rows import sort_labels
from perdure.streams.scenarios import Splits, order_classes

GOOD = {"text": "x", "label": "a"}


# ---- rows
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "oak \ud83d", "label": "a"}, r"train rows, row 1: field 'text' holds half a character"),
        ({"text": "x", "label": "\udc80"}, r"train rows, row 1: field 'label' holds half a character .*\\udc80"),
        ({"text": "x", "label": " "}, r"train rows, row 1: field 'label' is ' '; give the row a label"),
        ({"text": "x", "label": np.str_("")}, r"train rows, row 1: field 'label' is ''"),
        ({"text": "x", "label": float("nan")}, r"train rows, row 1: field 'label' is nan"),
        ({"text": "x", "label": 10**5000}, r"train rows, row 1: field 'label' is a number of too many digits"),
        ({**GOOD, "price": decimal.Decimal(1)}, r"\('e'\), train row 1, field 'price': a value of type Decimal cannot"),
        ({**GOOD, "a": {"b": object()}}, r"train row 1, field 'a', field 'b': a value of type object cannot be stored"),
        ({**GOOD, "objects": np.array([{}, None])}, r"train row 1, field 'objects': a value of type ndarray cannot"),
        ({**GOOD, "number": 10**5000}, r"train row 1: holds a value that cannot be stored"),
    ],
)
def test_rows_that_cannot_be_kept(row, message):
    with pytest.raises(BadInput, match=message):
        Experience(0, "e", [GOOD, row])


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def test_values_that_are_nested_without_end(tmp_path):
    with pytest.raises(BadInput, match=r"train row 0: holds a value that cannot be stored \(.*recursion"):
        Experience(0, "e", [{**GOOD, "deep": deep(5000)}])
    with pytest.raises(BadInput, match=r"experience 0, train row 0: lists or mappings are nested too deeply"):
        Spool(tmp_path).append({**GOOD, "deep": deep(5000)})


def test_labels_of_numpy_become_plain_text():
    [row] = Experience(0, "e", [{"text": "x", "label": np.str_("a")}]).train
    assert type(row["label"]) is str


def test_whole_numbers_of_any_length_are_sorted_by_value():
    long = "1" * 5000
    labels = ["10", long, "9", "0", "009", "00", "2" * 4999]
    assert sort_labels(labels) == ["0", "00", "009", "9", "10", "2" * 4999, long]


# ---- streams and generators
@pytest.mark.parametrize("items", [5, None, "rows", {"train": [GOOD]}])
def test_experiences_come_in_a_list(items):
    with pytest.raises(BadInput, match=r"expected a list of experiences, found (int|NoneType|str|dict)"):
        Stream.of(items)


def test_a_generator_that_yields_none_is_named_and_does_not_end_the_stream(tmp_path):
    source = iter([GOOD, GOOD, GOOD, None, GOOD, GOOD])
    stream = Stream.from_generator(source, tmp_path / "rows", rows_per_experience=2)
    assert len(next(iter(stream)).train) == 2
    with pytest.raises(BadInput, match=r"stream 'stream', experience 1, row 1: expected a mapping.*found NoneType"):
        next(iter(stream))
    assert stream.length is None and [len(e.train) for e in stream] == [2, 1] and stream.length == 3

    whole = Stream.from_generator(iter([[GOOD], None, [GOOD]]), tmp_path / "whole")
    assert len(next(iter(whole)).train) == 1
    with pytest.raises(BadInput, match=r"experience 1: expected a sequence of rows, found NoneType"):
        next(iter(whole))
    assert [len(e.train) for e in whole] == [1] and len(whole) == 2


def test_a_source_that_restarts_with_none(tmp_path):
    list(Stream.from_generator(iter([[GOOD]]), tmp_path))
    with pytest.raises(BadInput, match=r"experience 0: expected a sequence of rows, found NoneType"):
        Stream.from_generator(iter([None]), tmp_path, restarts=True)
    with pytest.raises(BadInput, match=r"experience 0: the source gives other rows"):
        Stream.from_generator(iter([]), tmp_path, restarts=True)


def test_rows_before_a_refused_one_are_kept(tmp_path):
    """They are on disk, and the stream goes on with them after a new start."""
    rows = ({**GOOD, "text": str(n)} if n != 3 else {"text": "\ud83d"} for n in itertools.count())
    stream = Stream.from_generator(rows, tmp_path, rows_per_experience=2)
    next(iter(stream))
    with pytest.raises(BadInput, match=r"experience 1, row 1: field 'text' holds half a character"):
        next(iter(stream))
    again = Stream.from_generator(rows, tmp_path, rows_per_experience=2)
    assert [row["text"] for i in range(2) for row in again.experience(i).train] == ["0", "1", "2", "4"]


def test_lines_of_a_spool_that_are_gone_or_doubled(tmp_path):
    source = ({"text": str(n), "label": "a"} for n in range(5))
    stream = Stream.from_generator(source, tmp_path, rows_per_experience=3)
    assert len(list(stream)) == 2
    lines = stream.spool.path.read_bytes().splitlines(keepends=True)
    for place, count in ((0, 2), (2, 0), (2, 2), (4, 0), (4, 2), (5, 0)):
        stream.spool.path.write_bytes(
            b"".join([*lines[:place], *lines[place : place + 1] * count, *lines[place + 1 :]])
        )
        with pytest.raises(
            DamagedState, match=r"line \d: this experience has .* rows, before it lie .*restore the file"
        ):
            Spool(tmp_path)


# ---- settings
@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,month\n" + "".join(f"t{i},{i % 4},{i % 2 + 1}\n" for i in range(16)))
    return {"source": str(path), "experiences": 2}


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ({"experiences": [[3, 1], [0]]}, [("3", "1"), ("0",)]),
        ({"class_order": [3, 1]}, [("3",), ("1",)]),
        ({"classes": [3, 2, 1, 0]}, [("3", "2"), ("1", "0")]),
        (
            {"experiences": None, "scenario": "domain_incremental", "domain_field": "month", "domain_order": [2]},
            [("1", "3")],
        ),
    ],
)
def test_numbers_in_lists_of_labels_are_labels(table, settings, classes):
    assert [e.classes for e in build_stream({**table, **settings})] == classes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_order": -1}, r"class_order: as a seed it must be from 0"),
        ({"class_order": 2**32}, r"class_order: .*\(found 4294967296\)"),
        ({"classes": ["0", "1", 1]}, r"classes: a label occurs twice"),
        ({"classes": []}, r"classes: an empty list"),
        ({"experiences": []}, r"experiences: an empty list"),
        ({"experiences": "B0-Inc" + "1" * 5000}, r"experiences: .* is not understood"),
        ({"experiences": [["0"], []]}, r"experiences.1: is empty"),
        ({"class_order": []}, r"class_order: an empty list"),
        ({"class_order": [True]}, r"class_order"),
        ({"validation": True}, r"validation: .*expected a number"),
        ({"blend": float("inf"), "scenario": "boundary_free", "experience_rows": 2}, r"blend: .*finite"),
        ({"seed": -1}, r"seed"),
    ],
)
def test_settings_that_mean_nothing(table, settings, message):
    with pytest.raises(BadInput, match=message):
        build_stream({**table, **settings})


def test_seeds_that_no_generator_takes(table):
    with pytest.raises(BadInput, match=r"seed: -1 is negative"):
        build_stream({**table, "rows_per_class": 1}, seed=-1)
    with pytest.raises(BadInput, match=r"class_order: seed 4294967296 is outside 0 to 4294967295"):
        build_stream({**table, "class_order": "seed"}, seed=2**32)
    with pytest.raises(BadInput, match=r"class_order: seed -1 is outside"):
        order_classes(Splits("s", [GOOD]), -1)


@pytest.mark.parametrize("chars", [0, -5, {"test": 0}])
def test_no_characters_at_all(tmp_path, chars):
    path = tmp_path / "a.txt"
    path.write_text("abc" * 50)
    with pytest.raises(BadInput, match=r"max_chars.*greater than or equal to 1"):
        build_stream({"source": [str(path)] * 2, "scenario": "domain_incremental", "max_chars": chars})


def test_a_prefix_must_tell_sources_apart(tmp_path):
    paths = [tmp_path / part / "data.csv" for part in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("text,label\nx,yes\n")
    config = {"source": [str(path) for path in paths], "scenario": "domain_incremental"}
    with pytest.raises(BadInput, match=r"label_prefix: two sources have one name \(data, data\); rename a file"):
        build_stream({**config, "label_prefix": True})
    config["source"][1] = str(paths[1].rename(tmp_path / "other.csv"))
    assert build_stream({**config, "label_prefix": True}).classes == ("data:yes", "other:yes")
