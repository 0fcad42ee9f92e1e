"""Readers of a user's own files: every row is checked, errors name file, row and remedy. Imports no torch."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from ..data import Row, Rows
from ..errors import BadInput
from .arrow import arrow_records
from .rows import CheckedRows, as_row, check_text
from .scenarios import Splits

TYPES = ("jsonl", "csv", "tsv", "parquet", "npz", "txt", "images")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".npz": "npz"}
_SUFFIXES |= {".txt": "txt", ".text": "txt", ".md": "txt"}
_LARGEST = 2**31 - 1  # of a cell: what the C long of every platform holds
TextUnit = Literal["blocks", "lines", "paragraphs"]


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        fields: canonical name (text, image, label, prompt, answer) -> the file's own name.
        required: canonical or other fields that every row must have.
        unit: what one row of a plain text is: a block of `block_chars` characters, a line or a paragraph.
        block_chars: characters of a block.
        max_chars: characters of a plain text that are used, for each split; all where absent.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    unit: TextUnit = "blocks"
    block_chars: int = 1000
    max_chars: Mapping[str, int] = field(default_factory=dict)


def file_type(path: Path, declared: str | None = None) -> str:
    """The type of a file by its ending (before .gz) or of a folder; `declared` wins.

    Raises:
        BadInput: the type is unknown.
    """
    if declared is not None:
        if declared not in TYPES:
            raise BadInput(f"type: {declared!r} is unknown; use one of {', '.join(TYPES)}")
        return declared
    if path.is_dir():
        return "images"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = _SUFFIXES.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise BadInput(f"{path}: the type of this file is unknown; name it: type: one of {', '.join(TYPES)}")
    return kind


def open_file(path: Path) -> IO[bytes]:
    """Opens a file that may be compressed with gzip, whatever its name.

    Raises:
        BadInput: it does not exist or cannot be opened.
    """
    try:
        if path.suffix.lower() != ".gz":
            file = path.open("rb")
            if file.peek(2)[:2] != b"\x1f\x8b":  # neither UTF-8 nor parquet nor npz begins so
                return file
            file.close()
        return gzip.open(path, "rb")  # type: ignore[return-value]
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; correct the path") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be opened ({error.strerror}); correct the path or its permissions") from None


def read_bytes(path: Path) -> bytes:
    """The whole content, decompressed.

    Raises:
        BadInput: the file is missing, or its compressed data is truncated or damaged.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadInput(f"{path}: the compressed file is truncated or damaged ({error}); fetch it again") from None


def read_text(path: Path) -> str:
    """The content as UTF-8 text, line ends kept; a byte-order mark is dropped."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: is not UTF-8 text (byte {error.start}); convert it: iconv -t UTF-8") from None


# ---- rows
def to_row(record: Mapping[str, Any], how: Reading, where: str) -> Row:
    """Renames fields to their canonical names and checks that the required ones are there."""
    if how.fields:
        for name, own in how.fields.items():
            if own not in record:
                raise BadInput(
                    f"{where}: has no field {own!r}, which `fields` names for {name!r}; found {_names(record)}"
                )
        used = set(how.fields.values())
        rest = {key: value for key, value in record.items() if key not in used and key not in how.fields}
        record = {**{name: record[own] for name, own in how.fields.items()}, **rest}
    for name in how.required:
        if name not in record:
            raise BadInput(
                f"{where}: has no field {name!r}; found {_names(record)}; "
                f"say which one it is: fields: {{{name}: <name in the file>}}"
            )
        value = record[name]
        if value is None or (isinstance(value, float) and value != value) or not str(value).strip():
            raise BadInput(f"{where}: field {name!r} is {value!r}, which is no value; give one or leave the row out")
        if isinstance(value, str):
            check_text(value, name, where)
    if not any(name in record for name in ("text", "image", "prompt")):
        raise BadInput(
            f"{where}: has none of the fields text, image, prompt; found {_names(record)}; "
            "say which one it is: fields: {text: <name in the file>}"
        )
    for name in ("text", "prompt", "answer"):
        if name in record and not isinstance(record[name], str):
            raise BadInput(f"{where}: field {name!r} is {record[name]!r}, expected text")
    return as_row(record, where)


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "no fields"


def read_rows(path: Path, how: Reading, split: str = "train", kind: str | None = None) -> Rows:
    """Rows of one file (not npz or image folders, which hold several splits).

    Raises:
        BadInput: the file is missing, empty, truncated or of an unknown type, or a row lacks a field.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path}: there is no such file; correct the path")
    kind = file_type(path, kind)
    if kind == "txt":
        rows: Rows = text_rows(read_text(path), how, split, str(path))
    elif kind in ("jsonl", "csv", "tsv", "parquet"):
        rows = CheckedRows(to_row(record, how, f"{path}, {place}") for place, record in _records(path, kind, how))
    else:
        raise BadInput(f"{path}: a file of type {kind} cannot stand here; give jsonl, csv, parquet or txt")
    if not len(rows):
        raise BadInput(f"{path}: is empty; it needs at least one row")
    return rows


def _records(path: Path, kind: str, how: Reading) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if kind == "jsonl":
        return _jsonl(path)
    return _parquet(path, how) if kind == "parquet" else _csv(path, "\t" if kind == "tsv" else ",")


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    with open_file(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _json_record(line, path, number)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadInput(
                f"{path}, line {number + 1}: the compressed file is truncated or damaged ({error}); fetch it again"
            ) from None


def _json_record(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise BadInput(f"{path}, line {number}: is not UTF-8 text; convert the file: iconv -t UTF-8") from None
    except json.JSONDecodeError as error:
        torn = "" if line.endswith(b"\n") else "; the file seems cut off here"
        raise BadInput(f"{path}, line {number}: is not JSON ({error.msg}, column {error.colno}){torn}") from None
    except RecursionError:
        raise BadInput(f"{path}, line {number}: lists or objects are nested too deeply; flatten them") from None
    except ValueError:  # Python reads no more than some thousand digits
        raise BadInput(f"{path}, line {number}: a number has too many digits; write it as text") from None
    if not isinstance(record, dict):
        raise BadInput(f"{path}, line {number}: expected an object {{...}}, found {type(record).__name__}")
    return record


def _csv(path: Path, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), min(len(text), _LARGEST)))  # a cell may be a whole document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(filter(None, reader), None)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise BadInput(f"{path}, line {reader.line_num}: a column name occurs twice in {header}; rename one")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise BadInput(
                    f"{path}, line {reader.line_num}: has {len(cells)} cells, the header has {len(header)} "
                    f"({', '.join(header)}); quote cells that hold a separator"
                )
            yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BadInput(
            f"{path}, line {reader.line_num}: is not readable as csv ({error}); close quotes, and double those inside"
        ) from None


def _parquet(path: Path, how: Reading) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f'{path}: reading parquet needs pyarrow; run: pip install "perdure[data]"') from None
    try:
        table = parquet.ParquetFile(io.BytesIO(read_bytes(path))).read()
        yield from arrow_records(table, how.fields, how.required, str(path))
    except UnicodeDecodeError as error:  # parquet does not check what it is given as text
        raise BadInput(f"{path}: holds text that is not UTF-8 ({error}); convert it or fetch the file again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path}: is not a whole parquet file ({str(error).splitlines()[0]}); fetch it again") from None


# ---- plain text
def text_rows(text: str, how: Reading, split: str, where: str) -> Rows:
    """Plain text -> rows {"text": ...}. Blocks join to the text again (blank ones join a neighbour); blank lines and
    paragraphs are left out.

    Raises:
        BadInput: there is nothing but blanks.
    """
    limit = how.max_chars.get(split)
    text = text if limit is None else text[:limit]
    if how.unit == "lines":
        parts = text.splitlines()
    elif how.unit == "paragraphs":
        parts = [part.strip("\r\n") for part in re.split(r"\r?\n(?:[ \t]*\r?\n)+", text)]
    else:
        parts = []
        for block in (text[i : i + how.block_chars] for i in range(0, len(text), how.block_chars)):
            if parts and not (block.strip() and parts[-1].strip()):
                parts[-1] += block
            else:
                parts.append(block)
    rows = CheckedRows({"text": part} for part in parts if part.strip())
    if not rows:
        raise BadInput(f"{where}: is empty; it needs some text")
    return rows


# ---- one source by path
def read_path(
    path: str | Path,
    *,
    test: str | Path | None = None,
    valid: str | Path | None = None,
    kind: str | None = None,
    how: Reading | None = None,
) -> Splits:
    """Reads a file, or a folder of images by class, with files of the other splits beside it.

    Args:
        path: training rows; an npz file or an image folder may hold the other splits too.
        test, valid: files of the same kind.
        kind: one of `TYPES`; wins over the ending.
        how: fields and text settings.

    Raises:
        BadInput: see `read_rows`.
    """
    from .sources_images import read_folder, read_npz

    path, how = Path(path), how or Reading()
    if not path.exists():
        raise BadInput(f"source: {path}: there is no such file or folder; correct the path")
    name = re.sub(r"\.(gz|jsonl|ndjson|csv|tsv|parquet|npz|txt|text|md)\b", "", path.name) or path.name
    found = file_type(path, kind)
    if found in ("npz", "images"):
        read = read_npz if found == "npz" else read_folder
        data = read(path, how, name)
        if test is not None:
            data = replace(data, test=read(Path(test), how, name).train)
        if valid is not None:
            data = replace(data, valid=read(Path(valid), how, name).train)
        return data
    return Splits(
        name,
        read_rows(path, how, "train", kind),
        () if test is None else read_rows(Path(test), how, "test", kind),
        () if valid is None else read_rows(Path(valid), how, "valid", kind),
    )
