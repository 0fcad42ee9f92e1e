"""Files as the world makes them: what is unusual is honoured, what cannot be is refused with its place and a remedy."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import io
import json
import os
import sys
import zipfile

import numpy as np
import pytest
from stream_files import CSV, LINES, ROWS, jpeg, npz, parquet, put

from perdure.errors import BadInput
from perdure.streams import build_stream
from perdure.streams.sources import Reading, read_path, read_rows


def classes_of(path, **options):
    return build_stream({"source": str(path), "experiences": 2, **options}).classes


# ---- types and cells
def test_the_declared_type_wins_over_the_ending(tmp_path):
    tabs = put(tmp_path / "a.dat", "text\tlabel\nx, y\ta\nz\tb\n")
    [row, _] = build_stream({"source": {"path": str(tabs), "type": "tsv"}, "experiences": 1}).experience(0).train
    assert row == {"text": "x, y", "label": "a"}
    assert read_path(put(tmp_path / "a.csv", tabs.read_bytes()), kind="tsv").train[0] == row
    assert [dict(row) for row in read_path(put(tmp_path / "a.tsv", CSV), kind="csv").train] == ROWS
    assert read_path(put(tmp_path / "b.tsv.gz", tabs.read_bytes())).train[0] == row


def test_a_cell_may_be_a_whole_document(tmp_path):
    path = put(tmp_path / "a.csv", f"text,label\n{'x' * 200_000},a\n")
    [row] = read_rows(path, Reading())
    assert len(row["text"]) == 200_000


def test_blank_lines_and_line_ends_of_tables(tmp_path):
    path = put(tmp_path / "a.csv", '\r\n\r\ntext,label\r\n\r\n"one\r\ntwo",a\r\n')
    assert read_rows(path, Reading()) == ({"text": "one\r\ntwo", "label": "a"},)
    path = put(tmp_path / "a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n"))
    assert [dict(row) for row in read_rows(path, Reading())] == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_gzip_is_known_by_its_content(tmp_path, kind):
    data = {"jsonl": LINES, "csv": CSV, "txt": "some text"}[kind].encode()
    packed = put(tmp_path / f"packed.{kind}", gzip.compress(data))
    assert read_rows(packed, Reading()) == read_rows(put(tmp_path / f"plain.{kind}", data), Reading())


# ---- labels and text
@pytest.mark.parametrize(("label", "line"), [("", "bar,"), ("  ", '"bar","  "'), ("\t", "bar,\t")])
def test_a_blank_label_is_no_class(tmp_path, label, line):
    table = put(tmp_path / "a.csv", f"text,label\nfoo,a\n{line}\nbaz,b\n")
    with pytest.raises(BadInput, match=r"a.csv, line 3: field 'label' is '.*', which is no value; give one or leave"):
        classes_of(table)
    with pytest.raises(BadInput, match=r"a.csv, line 3: field 'label' is '.*'; give the row a label or leave"):
        read_rows(table, Reading())
    rows = put(tmp_path / "a.jsonl", LINES + json.dumps({"text": "bar", "label": label}))
    with pytest.raises(BadInput, match=r"a.jsonl, line 7: field 'label' is '.*', which is no value"):
        classes_of(rows)


@pytest.mark.parametrize("month", ["", None, float("nan")])
def test_a_domain_without_value_is_no_domain(tmp_path, month):
    rows = [{"text": "x", "month": "may"}, {"text": "y", "month": month}]
    path = put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match=rf"a.jsonl, line 2: field 'month' is {month!r}, which is no value; give one"):
        build_stream({"source": str(path), "scenario": "domain_incremental", "domain_field": "month"})


@pytest.mark.parametrize("field", ["text", "label", "prompt", "answer"])
def test_half_a_character_is_refused(tmp_path, field):
    row = {"text": "ä", "label": "a", field: "oak \ud83d!"}
    path = put(tmp_path / "a.jsonl", LINES + json.dumps(row))
    with pytest.raises(BadInput, match=rf"a.jsonl, line 7: field '{field}' holds .* \\ud83d at position 4\); write"):
        read_rows(path, Reading())
    whole = put(tmp_path / "b.jsonl", json.dumps({**row, field: "oak \U0001f333"}))  # written as two surrogates
    assert read_rows(whole, Reading())[0][field] == "oak \U0001f333"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label": NaN}', "field 'label' is nan, which is no value"),
        ('{"text": "x", "label": Infinity}', "field 'label' is inf"),
        ('{"text": "x", "label": ' + "1" * 5000 + "}", "a number has too many digits; write it as text"),
        ('{"text": "x", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "are nested too deeply; flatten them"),
        ('{"text": "x", "label": null}', "field 'label' is None, which is no value"),
        ('{"image": null, "label": "a"}', "field 'image' is None; give the row a picture"),
    ],
    ids=["NaN", "infinity", "digits", "depth", "null", "no picture"],
)
def test_json_that_is_no_row(tmp_path, line, message):
    with pytest.raises(BadInput, match=rf"a.jsonl, line 7: .*{message}"):
        classes_of(put(tmp_path / "a.jsonl", LINES + line + "\n"))


def test_half_a_character_in_a_domain(tmp_path):
    path = put(tmp_path / "a.jsonl", json.dumps({"text": "x", "month": "\ud83d"}))
    with pytest.raises(BadInput, match=r"a.jsonl, line 1: field 'month' holds half a character"):
        build_stream({"source": str(path), "scenario": "domain_incremental", "domain_field": "month"})


# ---- parquet
DAY = dt.date(2024, 2, 29)
NOON = dt.datetime(2024, 2, 29, 12)


def test_parquet_columns_that_nothing_uses_do_not_matter(tmp_path):
    odd = {"when": NOON, "price": decimal.Decimal("1.50"), "days": [DAY], "kept": 3}
    path = put(tmp_path / "a.parquet", parquet([{**row, **odd} for row in ROWS]))
    assert classes_of(path) == ("a", "b")
    assert [dict(row) for row in read_rows(path, Reading())] == [{**row, "kept": 3} for row in ROWS]


def test_parquet_dates_and_decimals_that_are_used_become_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "x", "label": decimal.Decimal("1.50"), "day": DAY, "when": NOON, "none": None} for _ in range(2)]
    path = put(tmp_path / "a.parquet", parquet(rows))
    stream = build_stream({"source": str(path), "scenario": "domain_incremental", "domain_field": "day"})
    assert [e.name for e in stream] == ["2024-02-29"] and stream.classes == ("1.50",)
    [row, _] = read_rows(path, Reading({"text": "when"}))
    assert row["text"] == "2024-02-29T12:00:00"
    fine = pa.table({"text": ["x"], "label": pa.array([1], pa.timestamp("ns"))})  # finer than Python's own dates
    pq.write_table(fine, tmp_path / "b.parquet")
    assert read_rows(tmp_path / "b.parquet", Reading())[0]["label"] == "1970-01-01T00:00:00"


def test_parquet_columns_that_cannot_be_used_are_named(tmp_path):
    path = put(tmp_path / "a.parquet", parquet([{"text": "x", "label": [DAY]}]))
    with pytest.raises(BadInput, match=r"a.parquet, field 'label': has type list<.*>, expected text.*store it as text"):
        read_rows(path, Reading())
    null = put(tmp_path / "b.parquet", parquet([*ROWS, {"text": "x", "label": None}]))
    with pytest.raises(BadInput, match=r"b.parquet, row 6: field 'label' is None"):
        classes_of(null)


def test_parquet_text_that_is_no_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    wrong = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": wrong, "label": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a.parquet: holds text that is not UTF-8"):
        read_rows(tmp_path / "a.parquet", Reading())
    twice = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(BadInput, match=r"b.parquet: a column name occurs twice in \['text', 'text'\]; rename one"):
        read_rows(tmp_path / "b.parquet", Reading())


@pytest.mark.parametrize("name", ["image", "img"])
def test_parquet_pictures_as_datasets_stores_them(tmp_path, name):
    file = tmp_path / "1.png"
    file.write_bytes(jpeg(1, "PNG"))
    pictures = [{"bytes": jpeg(0, "PNG"), "path": "0.png"}, {"bytes": None, "path": str(file)}]
    path = put(tmp_path / "a.parquet", parquet([{name: p, "fine_label": 7} for p in pictures]))
    rows = read_rows(path, Reading({"image": name, "label": "fine_label"}))
    assert [row["image"].shape for row in rows] == [(5, 6, 3)] * 2 and rows[0]["label"] == "7"


def test_datasets_columns_that_nothing_uses_do_not_matter(monkeypatch):
    datasets = pytest.importorskip("datasets")
    records = [{**row, "when": NOON, "pictures": [{"bytes": jpeg(0), "path": None}]} for row in ROWS]
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.Value("string"),
        when=datasets.Value("timestamp[s]"),
        pictures=datasets.List(datasets.Image()),
    )
    table = datasets.Dataset.from_list(records, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    stream = build_stream({"source": {"hf": "some/rows", "test": None}, "experiences": 2})
    assert stream.classes == ("a", "b") and set(stream.experience(0).train[0]) == {"text", "label", "pictures"}


# ---- npz
PICTURES = np.zeros((4, 3, 3), np.uint8)
NAMES = np.array(["cat", "dog"])


def test_an_npz_in_gzip(tmp_path):
    arrays = {"x": np.arange(36, dtype=np.uint8).reshape(4, 3, 3), "y": np.array([0, 1, 1, 0]), "class_names": NAMES}
    rows = read_path(put(tmp_path / "a.npz.gz", npz(**arrays))).train
    assert [row["label"] for row in rows] == ["cat", "dog", "dog", "cat"]
    assert np.array_equal(rows[3]["image"][..., 0], arrays["x"][3])


@pytest.mark.parametrize("wrong", [-1, 2, "bird"])
def test_labels_of_an_npz_are_indices_or_names(tmp_path, wrong):
    names = ["dog", "cat", "dog"] if isinstance(wrong, str) else [1, 0, 1]
    options = {"class_names": NAMES, "domain": np.array(["p", "p", "q", "q"])}
    config = {"scenario": "domain_incremental", "domain_field": "domain"}
    good = put(tmp_path / "a.npz", npz(x=PICTURES, y=np.array([*names, names[0]]), **options))
    assert build_stream({"source": str(good), **config}).classes == ("cat", "dog")
    bad = put(tmp_path / "b.npz", npz(x=PICTURES, y=np.array([*names, wrong]), **options))
    with pytest.raises(BadInput, match=rf"b.npz, train row 3, y: {wrong} is outside the 2 declared names .*correct it"):
        build_stream({"source": str(bad), **config})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": PICTURES, "y": np.array([0, np.nan, 1, 1])}, r"train row 1, y: field 'label' is nan, expected text"),
        ({"x": PICTURES, "y": np.eye(4)}, r"train row 0, y: field 'label' holds several values"),
        ({"x": PICTURES, "y": np.array(3)}, r"y has a single value, but there are 4 rows; give one for each"),
        ({"x": PICTURES[:0], "y": np.zeros(0, int)}, r"a.npz: has no training rows"),
        ({"x": np.array("one"), "y": np.array([0])}, r"x has shape \[\], expected images .*or texts \[N\]"),
        ({"x": PICTURES, "y": np.zeros(4, int), "class_names": np.array("cat")}, r"class_names has shape \[\]"),
        ({"x": PICTURES, "y": np.array(["a", "", "b", "b"])}, r"train row 1, y: field 'label' is ''"),
        ({"x": np.array(["a", "\ud83d"]), "y": np.array([0, 1])}, r"train row 1: field 'x' holds half a character"),
        ({"x": PICTURES, "y": np.array(["1" * 5000] * 4), "class_names": NAMES}, r"train row 0, y: 1* is outside"),
        ({"x": np.array([b"caf\xe9"]), "y": np.array([0])}, r"a.npz: has text that is not UTF-8"),
        ({"train_jpeg": np.zeros(3), "train_offsets": np.array([0, 3])}, r"expected train_jpeg as uint8"),
        ({"train_jpeg": np.zeros(3, "u1"), "train_offsets": np.array(3)}, r"train_offsets as a list of whole numbers"),
        ({"train_jpeg": np.zeros(0, "u1"), "train_offsets": np.zeros(0, int)}, r"train_offsets must rise from 0"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_rows(tmp_path, arrays, message):
    with pytest.raises(BadInput, match=message):
        read_path(put(tmp_path / "a.npz", npz(**arrays)))


def test_texts_that_an_npz_holds_as_bytes(tmp_path):
    texts = np.array(["café".encode(), b"tea"])
    data = read_path(put(tmp_path / "a.npz", npz(x=texts, y=np.array([1, 0]), class_names=np.array([b"cold", b"hot"]))))
    assert data.train == ({"label": "hot", "text": "café"}, {"label": "cold", "text": "tea"})


def test_an_npz_that_is_cut_off_or_a_single_array(tmp_path):
    path = put(tmp_path / "a.npz.gz", npz(x=PICTURES))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        BadInput, match=r"a.npz.gz: the compressed file is truncated or damaged \(.*\); fetch it again$"
    ):
        read_path(path)
    np.save(tmp_path / "b.npy", PICTURES)
    with pytest.raises(
        BadInput, match=r"b.npy: holds a single array, expected an npz file with x and y; save it with savez$"
    ):
        read_path(tmp_path / "b.npy", kind="npz")


def test_other_files_in_an_npz_and_damaged_headers(tmp_path):
    def packed(header):
        buffer = io.BytesIO(npz(x=PICTURES))
        with zipfile.ZipFile(buffer, "a") as file:
            file.writestr("readme.txt", "not an array")
            file.writestr("y.npy", header)
        return put(tmp_path / "a.npz", buffer.getvalue())

    stored = io.BytesIO()
    np.save(stored, np.array([0, 1, 1, 0]))
    assert [row["label"] for row in read_path(packed(stored.getvalue())).train] == list("0110")
    for damage in ((b"{", b"("), (b"}", b" "), (b"<i8", b"\xffi8")):
        with pytest.raises(BadInput, match=r"a.npz: is not a whole npz file .*fetch it again"):
            read_path(packed(stored.getvalue().replace(*damage)))


# ---- pictures
def picture(array, ending="PNG"):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, ending)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight(tmp_path, ending):
    from PIL import Image

    from perdure.streams.rows import as_row, decode_image

    deep = np.array([[0, 256, 257], [0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    expected = [[0, 1, 1], [127, 128, 255]]
    assert decode_image(picture(deep, ending), "here")[..., 0].tolist() == expected
    assert as_row({"image": Image.fromarray(deep)}, "here")["image"][..., 2].tolist() == expected


def test_pixels_of_32_bits_are_not_clipped():
    from perdure.streams.rows import decode_image

    fits = np.array([[0, 255]], np.int32)
    assert decode_image(picture(fits, "TIFF"), "here")[..., 0].tolist() == [[0, 255]]
    with pytest.raises(BadInput, match=r"here: the image has F pixels \(32 bits\) from -1.0 to 0.5, expected 0 to 255"):
        decode_image(picture(np.array([[-1, 0.5]], np.float32), "TIFF"), "here")


def test_a_picture_too_large_for_memory_is_refused():
    from perdure.streams.rows import decode_image

    data = bytearray(picture(np.zeros((2, 2, 3), np.uint8), "BMP"))
    data[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(BadInput, match=r"here: the image cannot be decoded \(Image size"):
        decode_image(bytes(data), "here")


def test_image_folders_as_systems_leave_them(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "all" / label / "old" / ".cache").mkdir(parents=True)
        for name in ("1.png", "old/2.PNG", "._1.png", ".hidden.jpg", "old/.cache/1.png", "Thumbs.db"):
            (tmp_path / "all" / label / name).write_bytes(jpeg(1, "PNG") if name[0] != "." else b"\0\5\26\7")
        (tmp_path / "all" / label / "loop").symlink_to(tmp_path / "all")
        (tmp_path / "all" / label / "self.png").symlink_to("self.png")
    (tmp_path / "all" / "loop").symlink_to("loop")
    rows = read_path(tmp_path / "all").train
    assert [(row["label"], row.source.name) for row in rows] == [
        (label, name) for label in ("cat", "dog") for name in ("1.png", "2.PNG")
    ]
    assert {row["image"].shape for row in rows} == {(5, 6, 3)}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems make no such names")
def test_a_class_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "1.png").write_bytes(jpeg(1, "PNG"))
    with pytest.raises(BadInput, match=r"field 'label' holds half a character .*\\udce9"):
        read_path(tmp_path)


def test_two_folders_for_one_split(tmp_path):
    for split in ("train", "val", "valid"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_bytes(jpeg(1, "PNG"))
    with pytest.raises(BadInput, match=r"has the folders val and valid for one split; keep one"):
        read_path(tmp_path)


def test_paths_that_are_none():
    from perdure.streams.rows import as_row

    with pytest.raises(BadInput, match=r"row 3: 'a\\x00.png' is no path .*; correct it"):
        as_row({"image": "a\0.png"}, "row 3")["image"]
