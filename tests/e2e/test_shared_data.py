"""Every named data set loads from PERDURE_DATA and has what its manifest says."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from perdure.streams import build_stream
from perdure.streams.sources import Reading
from perdure.streams.sources_named import GROUPS, LM, NAMED, TEXTCL, TRACE500, read_named

pytestmark = pytest.mark.needs_data


def counts(relative):
    manifest = json.loads((Path(os.environ["PERDURE_DATA"]) / "MANIFEST.json").read_text(encoding="utf-8"))
    return next(f["counts"] for entry in manifest["datasets"] for f in entry["files"] if f["path"] == relative)


def split_rows(name, part=None, **options):
    data = read_named(name, Reading(**options), part)
    return {split: getattr(data, split) for split in ("train", "valid", "test")}, data


def test_every_file_of_the_manifest_has_a_name():
    manifest = json.loads((Path(os.environ["PERDURE_DATA"]) / "MANIFEST.json").read_text(encoding="utf-8"))
    listed = {file["path"] for entry in manifest["datasets"] for file in entry["files"]}
    assert listed == {path for entry in NAMED.values() for path in [*entry.files.values(), *entry.extra.values()]}


TESTED = {"trace500/yahoo": 100, "textcl/yahoo_topics": 100, "trace500/fomc": 16}
"""Validation rows that are test rows too, as the data came: who tunes on them tunes on the test."""


@pytest.mark.parametrize("name", [name for name, entry in NAMED.items() if entry.kind in ("text", "pairs")])
def test_no_validation_row_is_a_test_row(name):
    rows, _ = split_rows(name)
    said = {
        split: {json.dumps(dict(row), sort_keys=True) for row in rows.get(split, ())} for split in ("valid", "test")
    }
    assert not said["valid"] & said["test"]


@pytest.mark.parametrize("name", [name for name, entry in NAMED.items() if entry.kind in ("text", "pairs")])
def test_rows_and_labels(name):
    rows, _ = split_rows(name)
    for split, path in NAMED[name].files.items():
        expected = counts(path)
        assert len(rows[split]) == expected["rows"] - (TESTED.get(name, 0) if split == "valid" else 0)
        if NAMED[name].kind == "pairs":
            assert all(row["prompt"] and isinstance(row["answer"], str) for row in rows[split])
            continue
        if not rows[split]:
            continue
        found = Counter(row["label"] for row in rows[split])
        labels = expected.get("labels")
        if name == "textcl/yahoo_topics":  # the manifest lists its rows as prompts with answers
            assert len(found) == 10 and all(row["text"].startswith(("Title:", "Question:")) for row in rows[split])
        elif isinstance(labels, str):  # "150 labels, 100 to 100 each"
            words = labels.replace(",", "").split()
            assert (len(found), min(found.values()), max(found.values())) == (
                int(words[0]),
                int(words[2]),
                int(words[4]),
            )
        else:
            assert found == labels


@pytest.mark.parametrize("part", ["oos_train", "oos_valid", "oos_test"])
def test_parts_of_clinc150(part):
    rows, _ = split_rows("clinc150", part)
    assert len(rows["train"]) == counts(f"intent/clinc150.{part}.jsonl.gz")["rows"]
    assert {row["label"] for row in rows["train"]} == {"oos"}


@pytest.mark.parametrize("name", LM)
def test_texts(name):
    rows, _ = split_rows(f"lm/{name}", block_chars=4096)
    for split, path in NAMED[f"lm/{name}"].files.items():
        assert sum(len(row["text"]) for row in rows[split]) == counts(path)["chars"]


@pytest.mark.parametrize(
    ("name", "train", "test", "classes", "shape"),
    [
        ("cifar100", 20000, 10000, 100, (32, 32, 3)),
        ("tiny_imagenet_100c", 10000, 5000, 100, (64, 64, 3)),
        ("pacs", 1680, 560, 7, (96, 96, 3)),
        ("mnist_12k", 10000, 2000, 10, (28, 28, 3)),
        ("omniglot_small", 3630, 1210, 242, (105, 105, 3)),
    ],
)
def test_images(name, train, test, classes, shape):
    rows, data = split_rows(name)
    paths = list(NAMED[name].files.values())
    sizes = {key: value for path in paths for key, value in counts(path).items()}
    total = {"cifar100": sizes.get("y"), "omniglot_small": sizes.get("y")}.get(name)
    assert (len(rows["train"]), len(rows["test"])) == (train, test)
    if name == "omniglot_small":
        assert total == [train + test]
    elif name == "cifar100":
        assert [counts(path)["y"] for path in paths] == [[train], [test]]
    else:
        for split, size in (("train", train), ("test", test)):
            assert sizes.get(f"{split}_y", sizes.get(f"y_{split}")) == [size]
    assert len(data.classes) == len({row["label"] for row in rows["train"]}) == classes
    for split in ("train", "test"):
        for row in (rows[split][0], rows[split][-1]):
            assert row["image"].shape == shape and row["image"].dtype == np.uint8 and row["image"].max() > 100


def test_greyscale_files_become_rgb():
    _, data = split_rows("tiny_imagenet_100c")
    from io import BytesIO

    from PIL import Image

    grey = next(row for row in data.train if Image.open(BytesIO(row.encoded())).mode == "L")
    assert grey["image"].shape == (64, 64, 3)


def test_streams_of_real_data():
    clinc = build_stream(
        {"source": "clinc150", "experiences": 10, "class_order": 1993, "rows_per_class": 30, "validation": 5}
    )
    assert [(len(e.classes), len(e.train), len(e.valid), len(e.test)) for e in clinc] == [(15, 450, 75, 450)] * 10
    pacs = build_stream({"source": "pacs", "scenario": "domain_incremental"})
    assert [e.name for e in pacs] == ["photo", "art_painting", "cartoon", "sketch"]
    assert {e.classes for e in pacs.seen} == {pacs.classes} and [len(e.train) for e in pacs.seen] == [420] * 4
    texts = build_stream({"source": ["shakespeare", "kjv_bible"], "scenario": "domain_incremental", "max_chars": 20000})
    assert [(len(e.train), len(e.valid), len(e.test)) for e in texts] == [(20, 20, 20)] * 2
    tasks = build_stream({"source": "trace500", "scenario": "domain_incremental"})
    assert [e.name for e in tasks] == TRACE500 and [e.classes for e in tasks.seen] == [()] * 8
    sequence = {"source": "textcl", "scenario": "domain_incremental", "rows_per_class": 5, "test_rows_per_class": 5}
    assert [e.name for e in build_stream(sequence)] == TEXTCL == [name.split("/")[1] for name in GROUPS["textcl"]]
    prefixed = build_stream({**sequence, "label_prefix": True})
    assert prefixed.classes is not None and "mnli:neutral" in prefixed.classes and "cb:neutral" in prefixed.classes
