"""The stream that every installation can build: the Python standard library."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from perdure.errors import BadInput
from perdure.streams import build_stream
from perdure.streams.stdlib import MASK, PREFERRED, StdlibOptions, normalise, read_stdlib

BUILD = """
from perdure.streams import build_stream
stream = build_stream({"source": "stdlib", "experiences": 5, "class_order": 1993, "seed": 0})
print(stream.hash, sum(len(e.train) for e in stream))
"""


@pytest.fixture(scope="module")
def data():
    return read_stdlib()


@pytest.fixture(scope="module")
def every_row(data):
    return [*data.train, *data.valid, *data.test]


def test_twenty_classes_with_fixed_rows(data):
    assert len(data.classes) == 20 and set(data.classes) <= set(PREFERRED)
    for rows, size in ((data.train, 40), (data.valid, 10), (data.test, 10)):
        assert Counter(row["label"] for row in rows) == dict.fromkeys(data.classes, size)
    assert data.details["python"] == ".".join(map(str, sys.version_info[:3]))


def test_no_text_twice_across_splits_and_classes(every_row):
    assert len({normalise(row["text"]) for row in every_row}) == len(every_row) == 20 * 60


def test_the_class_is_masked(every_row):
    for row in every_row:
        if len(row["label"]) > 3:
            assert row["label"] not in row["text"].lower()
        else:
            assert not re.search(rf"(?<![a-z]){row['label']}(?![a-z])", row["text"].lower())
    assert sum(MASK in row["text"] for row in every_row) > 20


def test_texts_are_of_a_usable_size(every_row):
    assert all(40 <= len(row["text"]) <= 600 and row["text"].strip() for row in every_row)
    sources = [row for row in every_row if re.match(r"(@|(async )?def )", row["text"])]
    assert 0 < len(sources) < len(every_row)


def test_the_hash_does_not_depend_on_the_process():
    outputs = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", BUILD],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1 and outputs.pop().split()[1] == "800"


def library(folder, packages=3, functions=12):
    for p in range(packages):
        package = folder / f"package{'abc'[p]}"
        package.mkdir()
        (package / "__init__.py").write_text(
            f'"""The {package.name} package does its own thing, quite well indeed."""\n'
        )
        verb = ("Says", "Sings", "Whispers")[p]
        body = "".join(
            f"def f{i}():\n    '''{verb} {letter} in the voice of {package.name}, helper{'xyz'[p]}, quite loud.'''\n"
            for i, letter in enumerate("abcdefghijklmnop"[:functions])
        )
        body += "def shared():\n    '''This docstring stands word for word in every package of all.'''\n"
        (package / f"helper{'xyz'[p]}.py").write_text(body)
    return folder


def test_masking_duplicates_and_seed_on_a_small_library(tmp_path):
    options = StdlibOptions(classes=3, train_rows=6, valid_rows=2, test_rows=2)
    root = library(tmp_path)
    data = read_stdlib(options, 0, root)
    every = [*data.train, *data.valid, *data.test]
    assert len(every) == 30 and not any("in every" in row["text"] for row in every)
    text = " ".join(row["text"] for row in every)
    assert "voice of NAME, NAME, quite" in text and not re.search("package[abc]|helper[xyz]", text)
    same, other = read_stdlib(options, 0, root), read_stdlib(options, 1, root)
    assert same.train == data.train and other.train != data.train and other.classes == data.classes


def test_too_few_classes_is_an_error(tmp_path):
    with pytest.raises(BadInput, match=r"only 0 packages of .* have 60 different texts, 20 are needed; ask for fewer"):
        read_stdlib(root=library(tmp_path))
    with pytest.raises(BadInput, match="only 0 packages"):
        read_stdlib(root=tmp_path / "absent")


def test_broken_files_do_not_matter(tmp_path):
    root = library(tmp_path)
    (root / "packagea" / "broken.py").write_text("def (:\n")
    (root / "packagea" / "latin.py").write_bytes(b"# \xff\xfe\n")
    assert len(read_stdlib(StdlibOptions(3, 6, 2, 2), 0, root).train) == 18


def test_through_the_configuration():
    source = {"stdlib": {"classes": 4, "train_rows": 5, "valid_rows": 2, "test_rows": 3}}
    stream = build_stream({"source": source, "experiences": 2, "class_order": "seed"}, seed=3)
    assert [len(e.train) for e in stream] == [10, 10] and [len(e.test) for e in stream.seen] == [6, 6]
    told = stream.describe()
    assert told["python"] == ".".join(map(str, sys.version_info[:3])) and told["scenario"] == "class_incremental"
    orders = {
        build_stream({"source": source, "experiences": 4, "class_order": "seed"}, seed=s).classes for s in range(4)
    }
    assert len(orders) > 1
