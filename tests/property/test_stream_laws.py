"""Laws of streams: rows are neither lost nor doubled, caps hold, seek gives the tail, the hash sees every row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.streams import Spool, Stream
from perdure.streams.scenarios import (
    Selection,
    Splits,
    boundary_free,
    class_incremental,
    domain_incremental,
    group_classes,
    online,
)
from perdure.streams.sources import Reading, read_rows
from perdure.streams.spool import decode_value, encode_value, frame, unframe

LABELS = st.lists(st.integers(0, 9).map(str), min_size=1, max_size=60)
LAWS = settings(max_examples=40, deadline=None)


def rows(labels, tag="train"):
    return [{"text": f"{tag} {i}", "label": label} for i, label in enumerate(labels)]


def data(labels):
    return Splits("toy", rows(labels), rows(labels, "test"))


def texts(experiences, split="train"):
    return [row["text"] for e in experiences for row in getattr(e, split)]


@LAWS
@given(LABELS, st.integers(1, 10), st.integers(0, 5))
def test_class_incremental_shares_out_every_row_once(labels, experiences, order):
    experiences = min(experiences, len(set(labels)))
    made = class_incremental(data(labels), experiences, order)
    assert len(made) == experiences
    for split in ("train", "test"):
        assert Counter(texts(made, split)) == Counter(row["text"] for row in rows(labels, split))
    classes = [label for e in made for label in e.classes]
    assert len(classes) == len(set(classes)) and set(classes) == set(labels)
    for e in made:
        assert {row["label"] for row in e.train} == set(e.classes) == {row["label"] for row in e.test}
        places = [int(row["text"].split()[1]) for row in e.train]
        assert places == sorted(places)


@LAWS
@given(LABELS, st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_caps_hold_and_splits_stay_disjoint(labels, cap, test_cap, aside, seed):
    labels = labels + [label for label in set(labels) for _ in range(aside + 1)]
    how = Selection(rows_per_class=cap, test_rows_per_class=test_cap, validation=aside or None, seed=seed)
    [made] = class_incremental(data(labels), 1, how=how)
    have = Counter(labels)
    assert Counter(row["label"] for row in made.train) == {x: min(cap, n - aside) for x, n in have.items()}
    assert Counter(row["label"] for row in made.test) == {x: min(test_cap, n) for x, n in have.items()}
    assert Counter(row["label"] for row in made.valid) == {x: aside for x in have if aside}
    assert not set(texts([made])) & set(texts([made], "valid"))
    assert all(text.startswith("train") for text in texts([made], "valid"))


@LAWS
@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 30))
def test_patterns_cover_all_classes_in_order(count, base, step):
    ordered = [str(i) for i in range(count)]
    base, step = min(base, count), min(step, count)
    groups = group_classes(ordered, f"B{base}-Inc{step}")
    assert [label for group in groups for label in group] == ordered
    sizes = [len(group) for group in groups]
    if base:
        assert sizes.pop(0) == base
    assert all(size == step for size in sizes[:-1]) and all(0 < size <= step for size in sizes[-1:])


@LAWS
@given(LABELS, st.integers(1, 20), st.floats(0, 2), st.integers(0, 3))
def test_portions_hold_every_row_once(labels, size, blend, seed):
    blocks = class_incremental(data(labels), len(set(labels)))
    for made in (online(blocks, size, seed), boundary_free(blocks, size, blend, seed)):
        for split in ("train", "test"):
            assert Counter(texts(made, split)) == Counter(texts(blocks, split))
        assert all(1 <= len(e.train) <= size for e in made)
        assert [e.index for e in made] == list(range(len(made))) and [e.last for e in made].index(True) == len(made) - 1
    assert all(len(e.train) == size for e in boundary_free(blocks, size, blend, seed)[:-1])


@LAWS
@given(st.lists(LABELS, min_size=1, max_size=5))
def test_domains_keep_their_rows(parts):
    made = domain_incremental([Splits(str(i), rows(labels, f"d{i}")) for i, labels in enumerate(parts)])
    assert [len(e.train) for e in made] == [len(labels) for labels in parts]
    assert [set(e.classes) for e in made] == [set(labels) for labels in parts]


@LAWS
@given(st.lists(LABELS, min_size=1, max_size=6), st.data())
def test_seek_gives_the_tail(parts, draw):
    stream = Stream.of([rows(labels, f"e{i}") for i, labels in enumerate(parts)])
    everything = list(stream)
    place = draw.draw(st.integers(0, len(parts)))
    stream.seek(place)
    assert stream.seen == everything[:place]
    assert list(stream) == everything[place:] and stream.seen == everything


@LAWS
@given(st.lists(LABELS, min_size=1, max_size=4), st.data())
def test_the_hash_changes_if_and_only_if_rows_change(parts, draw):
    def build(rows_of):
        return Stream.of([(train, test) for train, test in rows_of]).hash

    content = [(rows(labels, f"e{i}"), rows(labels[:2], f"t{i}")) for i, labels in enumerate(parts)]
    base = build(content)
    assert base == build([([dict(row) for row in train], list(test)) for train, test in content])
    i = draw.draw(st.integers(0, len(parts) - 1))
    train, test = content[i]
    place = draw.draw(st.integers(0, len(train) - 1))
    field = draw.draw(st.sampled_from(["text", "label", "extra"]))
    altered = [*train[:place], {**train[place], field: "other"}, *train[place + 1 :]]
    assert build([*content[:i], (altered, test), *content[i + 1 :]]) != base
    assert build([*content[:i], (train, test[1:]), *content[i + 1 :]]) != base
    if len(train) > 1:
        assert build([*content[:i], ([*train[1:], train[0]], test), *content[i + 1 :]]) != base


WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
TABLE = st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=8)


@LAWS
@given(TABLE, st.sampled_from(["jsonl", "csv", "tsv", "parquet"]), st.booleans(), st.booleans(), st.booleans())
def test_rows_survive_every_format(table, kind, packed, named, marked):
    """Any text and label, whatever the format, its packing, its ending and a byte-order mark."""
    made = [{"text": text, "label": label} for text, label in table]
    data = written(made, kind)
    data = b"\xef\xbb\xbf" + data if marked and kind != "parquet" else data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (f"rows.{kind}" if named else "rows.data")
        path.write_bytes(gzip.compress(data, 1) if packed else data)
        assert [dict(row) for row in read_rows(path, Reading(required=("label",)), kind=kind)] == made


def written(made, kind):
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(made), buffer)
        return buffer.getvalue()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=len(made) % 2 == 0) + "\n" for row in made).encode()
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",")
    writer.writerows([["text", "label"], *([row["text"], row["label"]] for row in made)])
    return text.getvalue().encode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@LAWS
@given(st.dictionaries(st.text(min_size=1).filter(lambda k: k not in ("label", "image")), VALUES, max_size=4))
def test_rows_survive_the_spool(row):
    row["text"] = "t"
    stored = {key: encode_value(value, "here") for key, value in row.items()}
    assert {key: decode_value(value) for key, value in stored.items()} == row
    with tempfile.TemporaryDirectory() as folder:
        made = Stream.of([[row]]).experience(0)
        Spool(folder).add(made)
        again = Spool(folder).experience(0)
        assert dict(again.train[0]) == row and again.hash == made.hash == again.with_rows(train=again.train).hash


@LAWS
@given(st.binary(max_size=40).filter(lambda b: b"\n" not in b), st.data())
def test_a_frame_shows_every_alteration(payload, draw):
    line = frame(payload)
    assert unframe(line) == payload
    place = draw.draw(st.integers(0, len(line) - 1))
    assert unframe(line[:place]) is None
    altered = bytearray(line)
    altered[place] ^= 1 << draw.draw(st.integers(0, 7))
    assert unframe(bytes(altered)) is None
