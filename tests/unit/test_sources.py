"""Readers: what they give, and what they say about input that they cannot read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys

import numpy as np
import pytest
from stream_files import CSV, LINES, ROWS, jpeg, npz, parquet, put

from perdure.errors import BadInput
from perdure.streams import build_stream, sources_named
from perdure.streams.sources import Reading, read_path, read_rows
from perdure.streams.sources_named import NAMED, read_named, verified


# ---- tables
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_in_every_packing(tmp_path, kind, packed):
    data = {"jsonl": LINES, "csv": CSV, "parquet": parquet(ROWS) if kind == "parquet" else b""}[kind]
    path = put(tmp_path / f"mine.{kind}{packed}", data)
    assert [dict(row) for row in read_rows(path, Reading())] == ROWS
    stream = build_stream({"source": str(path), "experiences": 2, "test_share": 0.4})
    assert stream.name == "mine" and stream.classes == ("a", "b") and len(stream.experience(0).test) == 1


def test_byte_order_marks_tabs_and_declared_types(tmp_path):
    assert read_rows(put(tmp_path / "a.jsonl", "\ufeff" + LINES), Reading())[0]["label"] == "a"
    assert read_rows(put(tmp_path / "a.csv", "\ufeff" + CSV), Reading())[5] == ROWS[5]
    assert read_rows(put(tmp_path / "a.tsv", "text\tlabel\nx, y\tb\n"), Reading())[0] == {"text": "x, y", "label": "b"}
    assert len(read_rows(put(tmp_path / "a.log", LINES), Reading(), kind="jsonl")) == 6


def test_fields_are_renamed_and_the_rest_is_kept(tmp_path):
    path = put(tmp_path / "a.csv", "utterance,intent,text,speaker\nhello,greet,noise,ann\n")
    [row] = read_rows(path, Reading({"text": "utterance", "label": "intent"}))
    assert row == {"text": "hello", "label": "greet", "speaker": "ann"}
    with pytest.raises(
        BadInput, match=r"a.csv, line 2: has no field 'Intent', which `fields` names for 'label'; found ut"
    ):
        read_rows(path, Reading({"label": "Intent"}))


def test_separate_files_for_each_split(tmp_path):
    train, test = put(tmp_path / "train.jsonl", LINES), put(tmp_path / "test.csv", CSV)
    data = read_path(train, test=test)
    assert len(data.train) == 6 and len(data.test) == 6 and data.valid == ()
    stream = build_stream({"source": {"path": str(train), "test": str(test)}, "experiences": 2})
    assert [len(e.test) for e in stream] == [3, 3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", LINES + '{"text": "cut', r"a.jsonl, line 7: is not JSON \(.*\); the file seems cut off"),
        ("a.jsonl", '{"text": 1, "label": "a"}\n', r"a.jsonl, line 1: field 'text' is 1, expected text"),
        (
            "a.jsonl",
            '{"body": "x", "label": "a"}\n',
            r"line 1: has none of the fields .*found body, label.*fields: \{text",
        ),
        ("a.jsonl", "[1]\n", r"line 1: expected an object .*, found list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1: is not UTF-8"),
        ("a.jsonl", "", r"a.jsonl: is empty"),
        ("a.jsonl", "\n\n", r"a.jsonl: is empty"),
        ("a.csv", "text,label\n", r"a.csv: is empty"),
        ("a.csv", "", r"a.csv: is empty"),
        ("a.csv", "text,label\nx,a\ny\n", r"a.csv, line 3: has 1 cells, the header has 2 \(text, label\)"),
        ("a.csv", "text,text\nx,a\n", r"a.csv, line 1: a column name occurs twice"),
        ("a.csv", 'text,label\n"x,a\n', r"a.csv, line \d: is not readable as csv"),
        ("a.txt", b"\xff\xfe", r"a.txt: is not UTF-8 text \(byte 0\)"),
        ("a.txt", " \n \n", r"a.txt: is empty"),
        ("a.parquet", b"PAR1 nonsense", r"a.parquet: is not a whole parquet file"),
        ("a.npz", b"PK\x03\x04 nonsense", r"a.npz: (is not a whole npz file|cannot be read)"),
        ("a.xyz", "x", r"a.xyz: the type of this file is unknown.*jsonl"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    path = put(tmp_path / name, data)
    with pytest.raises(BadInput, match=message):
        read_path(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.txt.gz", "a.parquet.gz", "a.npz.gz"])
def test_truncated_gzip(tmp_path, name):
    path = put(tmp_path / name, LINES * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=rf"{name}.*truncated or damaged .*fetch it again"):
        read_path(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(BadInput, match=name):
        read_path(path)


def test_truncated_gzip_names_the_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(3):
            file.write(LINES.encode())
            file.flush()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 12])
    with pytest.raises(BadInput, match=r"line 19: the compressed file is truncated"):
        read_path(path)


def test_a_missing_label_is_named_when_the_scenario_needs_it(tmp_path):
    path = put(tmp_path / "a.jsonl", LINES + '{"text": "x", "intent": "a"}\n')
    with pytest.raises(BadInput, match=r"a.jsonl, line 7: has no field 'label'; found text, intent.*fields: \{label"):
        build_stream({"source": str(path), "experiences": 2})


def test_labels_outside_the_declared_classes(tmp_path):
    path = put(tmp_path / "a.jsonl", LINES + '{"text": "x", "label": "zz"}\n')
    with pytest.raises(BadInput, match=r"train row 6: label 'zz' is outside the declared classes \(a, b\)"):
        build_stream({"source": str(path), "experiences": 2, "classes": ["a", "b"]})


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    path = put(tmp_path / "a.parquet", b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadInput, match=r'pip install "perdure\[data\]"'):
        read_path(path)
    with pytest.raises(BadInput, match=r'pip install "perdure\[data\]"'):
        build_stream({"source": {"hf": "ag_news"}, "experiences": 2})
    folder = tmp_path / "pictures" / "cat"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(b"x")
    row = read_path(tmp_path / "pictures").train[0]
    with pytest.raises(BadInput, match=r'pip install "perdure\[vision\]"'):
        row["image"]


# ---- text
def test_plain_text_units(tmp_path):
    text = "one\ntwo\n\nthree\n\n\n  four\nfive\n"
    path = put(tmp_path / "a.txt", text)
    assert [r["text"] for r in read_rows(path, Reading(unit="lines"))] == ["one", "two", "three", "  four", "five"]
    assert [r["text"] for r in read_rows(path, Reading(unit="paragraphs"))] == ["one\ntwo", "three", "  four\nfive"]
    blocks = [r["text"] for r in read_rows(path, Reading(block_chars=7))]
    assert "".join(blocks) == text and {len(block) for block in blocks[:-1]} == {7}
    assert "".join(r["text"] for r in read_rows(path, Reading(max_chars={"train": 9}))) == text[:9]


def test_a_sequence_of_texts(tmp_path):
    paths = [str(put(tmp_path / f"{name}.txt.gz", name * 400)) for name in ("alpha", "beta")]
    stream = build_stream(
        {"source": paths, "scenario": "domain_incremental", "block_chars": 100, "max_chars": 1000, "test_share": 0.2}
    )
    assert [e.name for e in stream] == ["alpha", "beta"] and stream.classes is None
    assert [(len(e.train), len(e.test), e.classes) for e in stream.seen] == [(8, 2, ()), (8, 2, ())]


# ---- images
def test_npz_arrays(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    y = np.arange(6) % 3
    path = put(
        tmp_path / "a.npz", npz(x_train=x, y_train=y, x_test=x[:3], y_test=y[:3], class_names=np.array(["u", "v", "w"]))
    )
    stream = build_stream({"source": str(path), "experiences": 3})
    assert stream.classes == ("u", "v", "w") and [len(e.test) for e in stream] == [1, 1, 1]
    assert np.array_equal(stream.experience(1).train[1]["image"], x[4].transpose(1, 2, 0))
    grey = put(tmp_path / "grey.npz.gz", npz(pictures=x[:, 0], kind=y))
    data = read_path(grey, test=grey, how=Reading({"image": "pictures", "label": "kind"}))
    assert data.classes == ("0", "1", "2") and data.train[0]["image"].shape == (4, 5, 3) and len(data.test) == 6
    words = put(tmp_path / "words.npz", npz(x=np.array(["p", "q"]), y=np.array([10, 9])))
    assert read_path(words).train == ({"label": "10", "text": "p"}, {"label": "9", "text": "q"})


def test_packed_jpeg_is_decoded_when_read(tmp_path):
    from PIL import Image

    files = [jpeg(0), jpeg(1), b"not a picture"]
    ends = np.cumsum([0, *map(len, files)])
    arrays = {
        "train_jpeg": np.frombuffer(b"".join(files), np.uint8),
        "train_offsets": ends,
        "train_y": np.array([0, 1, 1]),
    }
    path = put(tmp_path / "a.npz", npz(**arrays, class_names=np.array(["u", "v"])))
    data = read_path(path)
    assert [row["label"] for row in data.train] == ["u", "v", "v"]
    expected = np.asarray(Image.open(io.BytesIO(files[1])).convert("RGB"))
    assert np.array_equal(data.train[1]["image"], expected)
    with pytest.raises(BadInput, match=r"a.npz, train row 2: the image cannot be decoded"):
        data.train[2]["image"]
    arrays["train_offsets"] = ends[:-1]
    with pytest.raises(BadInput, match="train_offsets must rise from 0"):
        read_path(put(tmp_path / "b.npz", npz(**arrays)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, r"has no arrays 'x' and 'y'.*found a"),
        ({"x": np.zeros((3, 4, 4), "u1"), "y": np.zeros(2, int)}, r"y has 2 entries, but there are 3 rows"),
        ({"x": np.zeros((3, 4, 4), "f4"), "y": np.zeros(3, int)}, r"type float32, expected uint8"),
        ({"x": np.zeros((3, 4), "u1"), "y": np.zeros(3, int)}, r"x has shape \[3, 4\]"),
        ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, r"without pickle"),
        (
            {"x": np.zeros((1, 4, 4), "u1"), "y": np.array([5]), "class_names": np.array(["u"])},
            r"row 0, y: 5 is outside the 1 declared",
        ),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    with pytest.raises(BadInput, match=message):
        read_path(put(tmp_path / "a.npz", npz(**arrays)))


def test_image_folders(tmp_path):
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for label in ("dog", "cat"):
            for i in range(count):
                folder = tmp_path / "all" / split / label
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i}.png").write_bytes(jpeg(i, "PNG"))
    stream = build_stream({"source": str(tmp_path / "all"), "experiences": 2})
    assert [(e.classes, len(e.train), len(e.valid), len(e.test)) for e in stream] == [
        (("cat",), 3, 1, 2),
        (("dog",), 3, 1, 2),
    ]
    assert stream.experience(0).train[0]["image"].shape == (5, 6, 3)
    before = stream.hash
    plain = read_path(tmp_path / "all" / "train")
    assert [row["label"] for row in plain.train] == ["cat"] * 3 + ["dog"] * 3
    (tmp_path / "all" / "test" / "cat" / "1.png").write_bytes(jpeg(99, "PNG"))
    assert build_stream({"source": str(tmp_path / "all"), "experiences": 2}).hash != before
    (tmp_path / "all" / "train" / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty: holds no image files"):
        read_path(tmp_path / "all")
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="has no subfolders with images"):
        read_path(tmp_path / "none")


# ---- Hugging Face datasets
def test_datasets_by_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "mine"
    folder.mkdir()
    put(folder / "train.csv", "utterance,intent\n" + "a,x\nb,y\nc,x\nd,y\n")
    put(folder / "test.csv", "utterance,intent\n" + "e,x\nf,y\n")
    config = {"source": {"hf": str(folder)}, "fields": {"text": "utterance", "label": "intent"}, "experiences": 2}
    stream = build_stream(config)
    assert [(e.classes, len(e.train), len(e.test)) for e in stream] == [(("x",), 2, 1), (("y",), 2, 1)]
    with pytest.raises(BadInput, match=r"source.hf: .*split 'nothing', cannot be loaded"):
        build_stream({**config, "source": {"hf": str(folder), "test": "nothing"}})
    with pytest.raises(BadInput, match=r"row 0: has no field 'other'"):
        build_stream({**config, "fields": {"text": "utterance", "label": "other"}})


def test_datasets_class_names_and_pictures(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(img=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]))
    records = [{"img": {"bytes": jpeg(i, "PNG"), "path": None}, "kind": i % 2} for i in range(4)]
    table = datasets.Dataset.from_list(records, features=features)
    asked = []

    def load(hf, config, split, revision):
        asked.append((hf, config, split, revision))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream = build_stream(
        {"source": {"hf": "some/pets", "test": None, "revision": "v1"}, "fields": {"image": "img", "label": "kind"},
         "experiences": 2}
    )  # fmt: skip
    assert asked == [("some/pets", None, "train", "v1")] and stream.classes == ("cat", "dog") and stream.name == "pets"
    assert stream.experience(0).train[0]["image"].shape == (5, 6, 3)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'ag_news' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(BadInput, match=r"'ag_news', split 'train', cannot be loaded \(ConnectionError: .*network"):
        build_stream({"source": {"hf": "ag_news"}, "experiences": 2})


# ---- named
@pytest.fixture
def folder(tmp_path, monkeypatch):
    files = []
    for name, data in (("intent/banking77.train.jsonl.gz", LINES), ("intent/banking77.test.jsonl.gz", LINES)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = put(tmp_path / name, data)
        files.append({"path": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"datasets": [{"name": "banking77", "files": files}]}))
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path))
    return tmp_path


def test_named_sources_are_verified(folder):
    stream = build_stream({"source": "banking77", "experiences": 2})
    assert [len(e.train) for e in stream] == [3, 3]
    path = folder / "intent/banking77.test.jsonl.gz"
    assert stream.describe()["files"]["intent/banking77.test.jsonl.gz"] == hashlib.sha256(path.read_bytes()).hexdigest()
    put(path, LINES + LINES)
    with pytest.raises(BadInput, match=r"banking77.test.jsonl.gz: its sha256 is .* the manifest says .*fetch"):
        build_stream({"source": "banking77", "experiences": 2})
    path.unlink()
    with pytest.raises(BadInput, match=r"there is no such file, though the manifest lists it"):
        read_named("banking77")
    with pytest.raises(BadInput, match=r"does not list intent/clinc150"):
        read_named("clinc150")


def test_a_file_is_hashed_once_in_a_process(folder, monkeypatch):
    hashed = []
    real = hashlib.sha256
    monkeypatch.setattr(sources_named.hashlib, "sha256", lambda *a: hashed.append(a) or real(*a))
    for _ in range(3):
        verified("intent/banking77.train.jsonl.gz")
    assert len(hashed) == 1


def test_bad_data_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="has no MANIFEST.json"):
        read_named("clinc150")
    for wrong in (b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "MANIFEST.json").write_bytes(wrong)
        with pytest.raises(BadInput, match="is not a manifest"):
            read_named("clinc150")
    with pytest.raises(BadInput, match="no part 'test9'; known: oos_train"):
        read_named("clinc150", part="test9")


def test_short_names_are_unambiguous():
    assert sources_named.full_name("agnews") == "textcl/agnews"
    assert sources_named.full_name("fomc") is None  # trace/fomc or trace500/fomc
    assert sources_named.full_name("c_stance") == "trace500/c_stance"
    assert len(NAMED) == len(set(NAMED)) and all("train" in entry.files for entry in NAMED.values())
