"""Streams, scenarios, spool and configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from perdure.errors import BadInput, DamagedState
from perdure.streams import Experience, Spool, Stream, StreamConfig, build_stream
from perdure.streams.scenarios import (
    Selection,
    Splits,
    boundary_free,
    class_incremental,
    domain_incremental,
    group_classes,
    online,
    order_classes,
    task_incremental,
)


def rows(labels, count, tag="train", **extra):
    return [{"text": f"{tag} {label} {i}", "label": label, **extra} for label in labels for i in range(count)]


def splits(labels="abcdef", count=6, **options):
    return Splits("toy", rows(labels, count), rows(labels, 3, "test"), **options)


def texts(some):
    return [row["text"] for row in some]


# ---- experience and stream
def test_labels_become_text_and_classes_are_found():
    made = Experience(0, "one", [{"text": "a", "label": 10}, {"text": "b", "label": np.int64(9)}])
    assert [row["label"] for row in made.train] == ["10", "9"]
    assert made.classes == ("9", "10")


@pytest.mark.parametrize("label", [None, [1, 2], 1.5, np.zeros(2)])
def test_a_label_must_be_one_value(label):
    with pytest.raises(BadInput, match=r"row 0: field 'label'"):
        Experience(0, "one", [{"text": "a", "label": label}])


def test_an_empty_experience_is_named():
    with pytest.raises(BadInput, match=r"experience 1 \('experience 1'\) is empty.*training rows"):
        Stream.of([rows("a", 1), []])


def test_a_row_must_be_a_mapping():
    with pytest.raises(BadInput, match=r"train rows, row 1: expected a mapping.*found str"):
        Experience(0, "one", [{"text": "a"}, "b"])


def test_an_iterator_is_refused_with_the_remedy():
    with pytest.raises(BadInput, match="from_generator"):
        Stream.of(iter([rows("a", 1)]))
    with pytest.raises(BadInput, match="iterator"):
        Experience(0, "one", iter(rows("a", 1)))


def test_forms_of_an_experience():
    train, test = rows("a", 2), rows("a", 1, "test")
    stream = Stream.of([train, (train, test), (train, test, test), {"train": train, "test": test, "name": "last"}])
    assert [len(e.test) for e in stream] == [0, 1, 1, 1]
    assert [len(e.valid) for e in stream.seen] == [0, 0, 1, 0]
    assert stream.experience(3).name == "last" and stream.experience(3).last and not stream.experience(2).last
    with pytest.raises(BadInput, match=r"found \['rows', 'train'\]"):
        Stream.of([{"train": train, "rows": test}])


def test_cursor_seek_and_seen():
    stream = Stream.of([rows("a", 1), rows("b", 1), rows("c", 1)])
    assert len(stream) == stream.length == 3 and stream.seen == []
    iterator = iter(stream)
    assert next(iterator).index == 0 and stream.cursor == 1
    assert [e.index for e in stream] == [1, 2]
    assert [e.index for e in stream.seen] == [0, 1, 2] and list(stream) == []
    stream.seek(1)
    assert [e.index for e in stream.seen] == [0] and [e.index for e in stream] == [1, 2]
    for place in (-1, 4):
        with pytest.raises(BadInput, match=f"seek: {place}"):
            stream.seek(place)
    with pytest.raises(IndexError):
        stream.experience(3)


def test_a_label_outside_the_declared_classes():
    with pytest.raises(BadInput, match=r"test row 0: label 'z' is outside the declared"):
        Stream.of([(rows("a", 1), rows("z", 1))], classes=["a", "b"])
    with pytest.raises(BadInput, match=r"label 'c' is outside the declared"):
        Stream.of([rows("a", 1), rows("c", 1)], classes=["a", "b"])


def test_hash_sees_rows_order_splits_and_image_bytes():
    a, b = rows("a", 3), rows("b", 2)
    base = Stream.of([(a, b)]).hash
    assert base == Stream.of([(a, b)], name="other").hash
    assert base != Stream.of([(a[::-1], b)]).hash
    assert base != Stream.of([(b, a)]).hash
    assert base != Stream.of([(a, (), b)]).hash
    assert base != Stream.of([([*a[:2], {**a[2], "label": "z"}], b)]).hash
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    other = picture.copy()
    other[0, 0, 0] ^= 1
    assert Stream.of([[{"image": picture}]]).hash == Stream.of([[{"image": picture.copy()}]]).hash
    assert Stream.of([[{"image": picture}]]).hash != Stream.of([[{"image": other}]]).hash


def test_with_rows_renews_the_hash():
    one = Experience(0, "one", rows("a", 2))
    assert one.with_rows(train=rows("a", 3)).hash != one.hash
    assert one.with_rows(train=rows("a", 2)).hash == one.hash


def test_describe_is_json():
    import json

    stream = Stream.of([(rows("ab", 2), rows("a", 1))], name="mine", classes=["a", "b"], details={"seed": 3})
    told = json.loads(json.dumps(stream.describe()))
    assert told["classes"] == [["a", "b"]] and told["rows"] == {"train": [4], "valid": [0], "test": [1]}
    assert told["hash"] == stream.hash and told["seed"] == 3 and told["name"] == "mine"


def test_nothing_heavy_is_imported():
    heavy = ["torch", "transformers", "accelerate", "peft", "matplotlib", "numpy", "PIL", "pyarrow", "datasets"]
    code = f"import sys, perdure.streams; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- images
def test_images_are_hwc_uint8():
    chw = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    first, second = Experience(0, "i", [{"image": chw, "label": 1}, {"image": grey, "label": 2}]).train
    assert np.array_equal(first["image"], chw.transpose(1, 2, 0))
    assert second["image"].shape == (4, 5, 3) and np.array_equal(second["image"][..., 2], grey)
    assert dict(first)["label"] == "1" and set(first) == {"label", "image"}


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3), "f4"), np.zeros((4, 4, 4), "u1"), np.zeros(4, "u1")])
def test_other_arrays_are_refused(image):
    with pytest.raises(BadInput, match=r"row 0: field 'image' has (type|shape)"):
        Experience(0, "i", [{"image": image}])


# ---- class-incremental
def test_class_order_1993_is_the_convention_of_the_field():
    data = Splits("c", rows([str(i) for i in range(100)], 1))
    order = order_classes(data, 1993)
    assert order[:10] == ["68", "56", "78", "8", "23", "84", "90", "65", "74", "76"]


def test_class_order_given_list_and_errors():
    data = Splits("c", rows("cab", 2))
    assert order_classes(data, "given") == ["c", "a", "b"]
    assert order_classes(Splits("c", rows("cab", 2), classes=("b", "c", "a")), "given") == ["b", "c", "a"]
    assert order_classes(data, ["b", "a"]) == ["b", "a"]
    with pytest.raises(BadInput, match="no training row of 'c' has label 'x'"):
        order_classes(data, ["x"])
    with pytest.raises(BadInput, match="twice"):
        order_classes(data, ["a", "a"])
    with pytest.raises(BadInput, match="no field 'label'"):
        order_classes(Splits("c", [{"text": "t"}]), "given")


@pytest.mark.parametrize(
    ("experiences", "sizes"),
    [
        (5, [2] * 5),
        (3, [4, 3, 3]),
        ("B0-Inc5", [5, 5]),
        ("B4-Inc2", [4, 2, 2, 2]),
        ("b0inc4", [4, 4, 2]),
        ("B10-Inc5", [10]),
    ],
)
def test_groups(experiences, sizes):
    groups = group_classes([str(i) for i in range(10)], experiences)
    assert [len(group) for group in groups] == sizes
    assert [label for group in groups for label in group] == [str(i) for i in range(10)]


@pytest.mark.parametrize("experiences", [0, 11, "B0-Inc0", "B11-Inc1", "ten", [["0"], []], [["0"], ["0"]], [["x"]]])
def test_groups_that_cannot_be(experiences):
    with pytest.raises(BadInput, match="experiences"):
        group_classes([str(i) for i in range(10)], experiences)


def test_class_incremental_brings_new_classes_only():
    made = class_incremental(splits(), [["c", "a"], ["f"]])
    assert [e.classes for e in made] == [("c", "a"), ("f",)]
    assert {row["label"] for row in made[0].train} == {"a", "c"} == {row["label"] for row in made[0].test}
    assert [e.task for e in made] == [None, None] and [e.last for e in made] == [False, True]
    assert [e.task for e in task_incremental(splits(), 3)] == [0, 1, 2]


def test_a_test_label_without_training_rows():
    data = Splits("toy", rows("ab", 2), rows("abz", 1, "test"))
    with pytest.raises(BadInput, match=r"test row 2: label 'z' is outside the labels of the training rows"):
        class_incremental(data, 2)


def test_validation_comes_from_training_rows_before_the_cap():
    data = splits(count=10)
    [made] = class_incremental(data, 1, how=Selection(rows_per_class=4, test_rows_per_class=2, validation=3, seed=1))
    assert len(made.train) == 6 * 4 and len(made.valid) == 6 * 3 and len(made.test) == 6 * 2
    assert not set(texts(made.train)) & set(texts(made.valid))
    assert set(texts(made.valid)) <= set(texts(data.train)) and set(texts(made.test)) <= set(texts(data.test))
    [share] = class_incremental(data, 1, how=Selection(validation=0.2))
    assert len(share.valid) == 6 * 2 and len(share.train) == 6 * 8
    with pytest.raises(BadInput, match="only 10 training rows"):
        class_incremental(data, 1, how=Selection(validation=10))


def test_own_validation_rows_are_kept_unless_others_are_asked_for():
    own = Splits("toy", rows("ab", 5), rows("ab", 1, "test"), rows("ab", 4, "valid"))
    assert len(class_incremental(own, 1)[0].valid) == 8
    assert len(class_incremental(own, 1, how=Selection(valid_rows_per_class=1))[0].valid) == 2
    taken = class_incremental(own, 1, how=Selection(validation=1))[0].valid
    assert all(text.startswith("train") for text in texts(taken))


def test_draws_depend_on_the_seed_and_on_nothing_else():
    def kept(seed, experiences, order):
        made = class_incremental(splits(count=20), experiences, order, Selection(rows_per_class=5, seed=seed))
        return sorted(text for e in made for text in texts(e.train))

    assert kept(0, 2, "given") == kept(0, 3, 7) != kept(1, 2, "given")


def test_test_share_and_plain_text_tail():
    [made] = class_incremental(Splits("toy", rows("ab", 10)), 1, how=Selection(test_share=0.2))
    assert len(made.test) == 4 and not set(texts(made.test)) & set(texts(made.train))
    [text] = domain_incremental([Splits("t", [{"text": str(i)} for i in range(10)])], Selection(test_share=0.3))
    assert texts(text.train) == list("0123456") and texts(text.test) == list("789")
    with pytest.raises(BadInput, match="test rows of its own"):
        class_incremental(splits(), 1, how=Selection(test_share=0.2))


# ---- domains, portions
def test_domains_keep_their_own_classes():
    parts = [Splits("x", rows("ab", 4), rows("ab", 1)), Splits("y", rows("bc", 4), rows("c", 1))]
    made = domain_incremental(parts, Selection(rows_per_class=2))
    assert [e.classes for e in made] == [("a", "b"), ("b", "c")] and [len(e.train) for e in made] == [4, 4]
    with pytest.raises(BadInput, match=r"domain 'x', test row 0: label 'c'"):
        domain_incremental([Splits("x", rows("ab", 4), rows("c", 1)), parts[1]])


def test_online_hands_out_each_row_once_and_tests_at_the_end_of_a_block():
    blocks = class_incremental(splits(), 2)
    made = online(blocks, 5)
    assert [len(e.train) for e in made] == [5, 5, 5, 3] * 2
    assert [len(e.test) for e in made] == [0, 0, 0, 9] * 2
    assert sorted(text for e in made for text in texts(e.train)) == sorted(texts(splits().train))
    assert {row["label"] for e in made[:4] for row in e.train} == set("abc")
    assert texts(made[0].train) != texts(blocks[0].train)[:5] and made[-1].last


@pytest.mark.parametrize("blend", [0.0, 0.8])
def test_boundary_free_portions_straddle_blocks(blend):
    blocks = class_incremental(splits(count=20), 3)
    made = boundary_free(blocks, 32, blend)
    assert sorted(text for e in made for text in texts(e.train)) == sorted(texts(splits(count=20).train))
    assert sorted(text for e in made for text in texts(e.test)) == sorted(texts(splits().test))
    assert [len(e.train) for e in made] == [32, 32, 32, 24]
    home = {label: i for i, block in enumerate(blocks) for label in block.classes}
    sequence = [home[row["label"]] for e in made for row in e.train]
    assert (sequence == sorted(sequence)) == (blend == 0)
    for e in made:  # a block is tested when all of its rows have come
        for row in e.test:
            later = {home[r["label"]] for other in made[e.index + 1 :] for r in other.train}
            assert home[row["label"]] not in later


# ---- unbounded
def endless(start=0):
    i = start
    while True:
        yield {"text": f"row {i}", "label": i % 3, "vector": np.full(2, i, np.float32)}
        i += 1


def test_an_unbounded_stream(tmp_path):
    stream = Stream.from_generator(endless(), tmp_path, rows_per_experience=4)
    assert stream.length is None
    with pytest.raises(TypeError, match="unbounded"):
        len(stream)
    for experience in stream:
        if experience.index == 2:
            break
    assert [len(e.train) for e in stream.seen] == [4, 4, 4]
    row = stream.experience(1).train[2]
    assert row["text"] == "row 6" and row["label"] == "0" and row["vector"].dtype == np.float32
    assert np.array_equal(row["vector"], [6, 6]) and not stream.experience(0).last
    assert stream.describe()["length"] is None


def test_a_live_source_goes_on_after_a_crash(tmp_path):
    source = endless()
    first = Stream.from_generator(source, tmp_path, rows_per_experience=4)
    drawn = [next(iter(first)), next(iter(first))]
    first.spool.append(next(source))  # drawn, on disk, not handed out: the crash comes here
    with (tmp_path / "spool.jsonl").open("ab") as file:
        file.write(b'80 0123456789abcdef {"split":"tr')
    again = Stream.from_generator(source, tmp_path, rows_per_experience=4)
    assert again.spool.dropped > 0 and again.spool.pending == 1
    handed = [again.experience(i) for i in range(3)]
    assert [e.hash for e in handed[:2]] == [e.hash for e in drawn]
    assert texts(handed[2].train) == ["row 8", "row 9", "row 10", "row 11"]


def test_a_source_that_restarts_is_skipped_and_compared(tmp_path):
    first = Stream.from_generator(endless(), tmp_path, rows_per_experience=3)
    hashes = [first.experience(i).hash for i in range(2)]
    again = Stream.from_generator(endless(), tmp_path, rows_per_experience=3, restarts=True)
    again.seek(1)
    assert again.cursor == 1 and [e.hash for e in again.seen] == hashes[:1]
    assert texts(again.experience(2).train) == ["row 6", "row 7", "row 8"]
    with pytest.raises(BadInput, match="gives other rows"):
        Stream.from_generator(endless(5), tmp_path, rows_per_experience=3, restarts=True)


def test_whole_experiences_from_a_generator(tmp_path):
    items = ((rows(label, 2), rows(label, 1, "test")) for label in "ab")
    stream = Stream.from_generator(items, tmp_path, classes=["a", "b"])
    assert [e.classes for e in stream] == [("a",), ("b",)] and len(stream) == 2
    same = Stream.of([(rows(label, 2), rows(label, 1, "test")) for label in "ab"])
    assert [e.hash for e in stream.seen] == [e.hash for e in same]
    with pytest.raises(BadInput, match="seek"):
        stream.seek(3)
    with pytest.raises(BadInput, match="rows_per_experience"):
        next(iter(Stream.from_generator(iter(rows("a", 2)), tmp_path / "other")))
    with pytest.raises(BadInput, match=r"label 'z' is outside"):
        next(iter(Stream.from_generator(iter(rows("z", 2)), tmp_path / "z", rows_per_experience=2, classes=["a"])))


# ---- spool
def test_every_torn_tail_is_cut_off(tmp_path):
    spool = Spool(tmp_path)
    spool.add(Experience(0, "one", rows("a", 2)))
    kept = spool.path.stat().st_size
    spool.add(Experience(1, "two", rows("b", 1)))
    whole = spool.path.read_bytes()
    for end in [*range(kept, len(whole), 7), len(whole) - 1]:
        spool.path.write_bytes(whole[:end])
        opened = Spool(tmp_path)
        assert len(opened) == 1 and texts(opened.experience(0).train) == ["train a 0", "train a 1"]
        opened.discard()
        again = opened.add(Experience(1, "two", rows("b", 1)))
        assert texts(again.train) == ["train b 0"]
        assert spool.path.read_bytes() == whole


def test_damage_before_a_closed_experience_is_an_error(tmp_path):
    spool = Spool(tmp_path)
    spool.add(Experience(0, "one", rows("a", 2)))
    spool.add(Experience(1, "two", rows("b", 2)))
    data = bytearray(spool.path.read_bytes())
    data[data.index(b"train a 1")] ^= 1
    spool.path.write_bytes(bytes(data))
    with pytest.raises(DamagedState, match=r"line 3"):
        Spool(tmp_path)


def test_a_killed_process_leaves_a_readable_spool(tmp_path):
    code = textwrap.dedent(
        """
        import os, signal, sys
        from perdure.streams import Stream
        def rows():
            i = 0
            while True:
                yield {"text": "row %d" % i, "label": i % 2}
                i += 1
        for e in Stream.from_generator(rows(), sys.argv[1], rows_per_experience=5):
            print(e.hash, flush=True)
            if e.index == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -9
    spool = Spool(tmp_path)
    assert [spool.experience(i).hash for i in range(4)] == done.stdout.split()
    assert texts(spool.experience(3).train)[-1] == "row 19"


def test_values_survive_the_spool(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    row = {
        "image": picture,
        "label": 3,
        "meta": {"a": [1, None, True, 2.5], "$array": "text"},
        "raw": b"\x00\xff",
        "x": np.ones((2, 3)),
    }
    made = Experience(0, "one", [row])
    back = Spool(tmp_path).add(made)
    (read,) = back.train
    assert np.array_equal(read["image"], picture) and read["meta"] == row["meta"] and read["raw"] == row["raw"]
    assert read["x"].shape == (2, 3) and back.hash == made.hash
    assert back.with_rows(train=back.train).hash == made.hash
    with pytest.raises(BadInput, match=r"field 'thing'.*type object"):
        Spool(tmp_path / "b").append({"text": "a", "thing": object()})


def test_a_refused_experience_leaves_nothing_behind(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(BadInput):
        spool.append({"text": "a", "thing": object()})
    with pytest.raises(BadInput, match="empty"):
        spool.close()
    spool.append({"text": "a"})
    with pytest.raises(BadInput, match="pending"):
        spool.add(Experience(0, "one", rows("a", 1)))
    assert spool.discard() == 1 and len(Spool(tmp_path)) == 0


# ---- configuration
def test_impossible_combinations_are_named_before_anything_is_read():
    base = {"source": "clinc150", "experiences": 10}
    cases = [
        ({"experiences": None}, "experiences"),
        ({"scenario": "online"}, "experience_rows"),
        ({"experience_rows": 5}, "experience_rows"),
        ({"blend": 0.5}, "blend"),
        ({"domain_field": "domain"}, "domain_field"),
        ({"domain_order": ["a"]}, "domain_order"),
        ({"scenario": "domain_incremental"}, "experiences"),
        ({"scenario": "domain_incremental", "experiences": None, "class_order": 3}, "class_order"),
        ({"source": ["clinc150", "banking77"]}, "scenario"),
        ({"source": "banking77", "scenario": "domain_incremental", "experiences": None}, "domain_field"),
        ({"experiences": [["a"]], "class_order": 3}, "class_order"),
        ({"validation": 1.5}, "validation"),
        ({"validation": 5, "valid_rows_per_class": 5}, "valid_rows_per_class"),
        ({"label_prefix": True}, "label_prefix"),
        ({"max_chars": 100}, "max_chars"),
        ({"fields": {"text": "t"}}, "fields"),
        ({"source": "shakespeare"}, "scenario"),
        ({"source": {"path": "a", "hf": "b"}}, "source"),
        ({"source": {"path": "a", "tset": "b"}}, "did you mean 'test'"),
        ({"source": []}, "source"),
        ({"source": 5}, "source"),
        ({"scenario": "class"}, "scenario"),
        ({"sorce": "x"}, "did you mean 'source'"),
        ({"rows_per_class": 0}, "rows_per_class"),
        ({"experiences": True}, "experiences"),
    ]
    for change, field in cases:
        with pytest.raises(BadInput, match=field):
            build_stream({**base, **change})


def test_unknown_sources_are_named_with_near_names(monkeypatch):
    monkeypatch.delenv("PERDURE_DATA", raising=False)
    with pytest.raises(BadInput, match=r"'clinc15'.*did you mean clinc150"):
        build_stream({"source": "clinc15", "experiences": 2})
    with pytest.raises(BadInput, match="set PERDURE_DATA"):
        build_stream({"source": "clinc150", "experiences": 2})
    with pytest.raises(BadInput, match=r"source.path: nowhere.jsonl"):
        build_stream({"source": {"path": "nowhere.jsonl"}, "experiences": 2})


def test_the_config_survives_a_round_trip():
    for source in ("stdlib", {"path": "a.jsonl", "test": "b.jsonl"}, ["agnews", {"name": "clinc150"}], {"stdlib": {}}):
        scenario = "domain_incremental" if isinstance(source, list) else "class_incremental"
        config = StreamConfig(source=source, scenario=scenario, experiences=None if isinstance(source, list) else "5")
        assert StreamConfig(**config.model_dump()) == config
        assert StreamConfig(**config.model_dump(mode="json")) == config
