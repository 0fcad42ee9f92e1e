"""Rows as the rest of the house reads them: labels are text, images are decoded when they are read. Imports no torch.

Shapes: an image is [H, W, 3], uint8, RGB.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import Row, Rows
from ..errors import BadInput

if TYPE_CHECKING:
    import numpy as np

CANONICAL = ("text", "image", "label", "prompt", "answer")


class CheckedRows(tuple):
    """Rows that went through `as_rows`; checked once only."""

    __slots__ = ()
    checked = True


class ImageRow(Mapping[str, Any]):
    """A row whose `image` is decoded each time it is read, so that a large set stays small in memory.

    Args:
        fields: everything but the image.
        source: encoded bytes (JPEG, PNG ...), a path to an image file, or a uint8 array [H, W], [H, W, 1 or 3] or
            [1 or 3, H, W].
        where: how an error names this row.
    """

    __slots__ = ("fields", "source", "where")

    def __init__(self, fields: Mapping[str, Any], source: Any, where: str = "image"):
        self.fields = {key: value for key, value in fields.items() if key != "image"}
        self.source = source
        self.where = where

    def __getitem__(self, key: str) -> Any:
        return self.image if key == "image" else self.fields[key]

    def __iter__(self) -> Iterator[str]:
        yield from self.fields
        yield "image"

    def __len__(self) -> int:
        return len(self.fields) + 1

    def __contains__(self, key: object) -> bool:
        return key == "image" or key in self.fields

    def __repr__(self) -> str:
        return f"ImageRow({self.fields!r}, image={type(self.source).__name__})"

    @property
    def image(self) -> np.ndarray:
        """The picture, [H, W, 3] uint8."""
        if isinstance(self.source, (bytes, Path)):
            return decode_image(self.encoded(), self.where)
        return to_hwc(self.source, self.where)

    def encoded(self) -> bytes | None:
        """The file's own bytes, or None where the row holds an array."""
        if isinstance(self.source, Path):
            try:
                return self.source.read_bytes()
            except OSError as error:
                raise BadInput(f"{self.where}: cannot read {self.source}: {error.strerror}; restore the file") from None
            except ValueError as error:  # a NUL or half a character in the path
                raise BadInput(f"{self.where}: {str(self.source)!r} is no path ({error}); correct it") from None
        return self.source if isinstance(self.source, bytes) else None


def decode_image(data: bytes | None, where: str) -> np.ndarray:
    """Encoded bytes -> [H, W, 3] uint8.

    Raises:
        BadInput: Pillow is missing, or the bytes are not a picture.
    """
    try:
        from PIL import Image
    except ImportError:
        raise BadInput(f'{where}: reading images needs Pillow; run: pip install "perdure[vision]"') from None
    try:
        with Image.open(io.BytesIO(data or b"")) as picture:
            return from_pillow(picture, where)
    except BadInput:
        raise
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"{where}: the image cannot be decoded ({error}); replace or remove the file") from None


def from_pillow(picture: Any, where: str) -> np.ndarray:
    """A Pillow picture -> [H, W, 3] uint8; of 16 bits the upper 8 are kept, where Pillow would clip to white.

    Raises:
        BadInput: pixels of 32 bits are outside 0..255.
    """
    import numpy as np

    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return to_hwc((np.asarray(picture) >> 8).astype(np.uint8), where)
    if picture.mode in ("I", "F"):
        low, high = picture.getextrema()
        if not (low >= 0 and high <= 255):
            raise BadInput(
                f"{where}: the image has {picture.mode} pixels (32 bits) from {low} to {high}, expected 0 to 255; "
                "scale it and save it with 8 bits"
            )
    return np.asarray(picture.convert("RGB"))


def to_hwc(array: Any, where: str) -> np.ndarray:
    """A uint8 array in one of the usual layouts -> [H, W, 3]; grey is repeated.

    Raises:
        BadInput: another type or shape.
    """
    import numpy as np

    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise BadInput(
            f"{where}: field 'image' has type {array.dtype}, expected uint8 in 0..255; "
            "scale it and convert with .astype('uint8')"
        )
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise BadInput(f"{where}: field 'image' has shape {list(array.shape)}, expected [H, W], [H, W, 3] or [3, H, W]")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def check_text(text: str, field: str, where: str) -> None:
    """Text must be writable as UTF-8, which half a surrogate pair (JSON can hold one) is not.

    Raises:
        BadInput: `text` holds half a surrogate pair.
    """
    if text.isascii():  # known without a look at the characters
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{where}: field {field!r} holds half a character (the lone surrogate \\u{ord(text[error.start]):04x} at "
            f"position {error.start}); write the whole character or remove it"
        ) from None


def as_label(value: Any, where: str) -> str:
    """Labels are text: 3 becomes "3".

    Raises:
        BadInput: the label is missing or blank, or is not a single value.
    """
    if isinstance(value, str):
        if not value.strip():
            raise BadInput(f"{where}: field 'label' is {str(value)!r}; give the row a label or leave the row out")
        check_text(value, "label", where)
        return str(value)
    if callable(getattr(value, "item", None)):  # a NumPy or torch scalar
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            raise BadInput(f"{where}: field 'label' holds several values, expected one") from None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return as_label(value, where)
    if isinstance(value, int):
        try:
            return str(value)
        except ValueError:  # Python writes no more than some thousand digits
            raise BadInput(f"{where}: field 'label' is a number of too many digits; give it as text") from None
    raise BadInput(f"{where}: field 'label' is {value!r}, expected text or a whole number")


def relabel(row: Row, label: str) -> Row:
    """A copy of `row` with another label."""
    if isinstance(row, ImageRow):
        return ImageRow({**row.fields, "label": label}, row.source, row.where)
    return {**row, "label": label}


def as_row(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise BadInput(f"{where}: expected a mapping such as {{'text': ..., 'label': ...}}, found {type(row).__name__}")
    for name in ("text", "prompt", "answer"):
        if isinstance(value := row.get(name), str):
            check_text(value, name, where)
    if "label" in row:
        label = as_label(row["label"], where)
        row = row if label is row["label"] else relabel(row, label)
    if isinstance(row, ImageRow) or "image" not in row:
        return row
    image = row["image"]
    if image is None:
        raise BadInput(f"{where}: field 'image' is None; give the row a picture, or leave the field or the row out")
    if isinstance(image, str):
        image = Path(image)
    elif hasattr(image, "convert") and hasattr(image, "tobytes"):  # a Pillow picture
        image = from_pillow(image, where)
    elif not isinstance(image, (bytes, Path)):
        image = to_hwc(image, where)
    return ImageRow(row, image, where)


def as_rows(rows: Any, where: str) -> Rows:
    """Checks rows and brings them to the canonical form.

    Raises:
        BadInput: rows can be read only once, or one of them is no mapping.
    """
    if getattr(rows, "checked", False):
        return rows
    if hasattr(rows, "__next__"):
        raise BadInput(
            f"{where}: the rows are an iterator, which cannot be read again after a crash; "
            "pass a list, or use Stream.from_generator(items, folder)"
        )
    if isinstance(rows, (str, bytes, Mapping)) or not (isinstance(rows, Iterable) or hasattr(rows, "__getitem__")):
        raise BadInput(f"{where}: expected a sequence of rows, found {type(rows).__name__}")
    return CheckedRows(as_row(row, f"{where}, row {i}") for i, row in enumerate(rows))


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Alphabetical, or by value where every label is a whole number."""
    unique = set(labels)
    numbers = all(label.isascii() and label.isdigit() for label in unique)
    if not numbers:
        return sorted(unique)

    def value(label: str) -> tuple[int, str, str]:  # of any length, where int() ends at some thousand digits
        digits = label.lstrip("0")
        return len(digits), digits, label

    return sorted(unique, key=value)


def labels_of(rows: Rows) -> list[str]:
    """Labels that occur in `rows`, in canonical order; empty for rows without labels."""
    if hasattr(rows, "labels"):
        return list(rows.labels)  # type: ignore[attr-defined]
    return sort_labels(row["label"] for row in rows if "label" in row)


# ---- content hash
def _feed(digest: Any, tag: bytes, data: bytes) -> None:
    digest.update(tag + struct.pack("<Q", len(data)))
    digest.update(data)


def _feed_value(digest: Any, value: Any, where: str) -> None:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if value is None:
        _feed(digest, b"n", b"")
    elif isinstance(value, str):
        _feed(digest, b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bool, int)):
        _feed(digest, b"b" if isinstance(value, bool) else b"i", str(int(value)).encode())
    elif isinstance(value, float):
        _feed(digest, b"f", struct.pack("<d", value))
    elif isinstance(value, (bytes, bytearray)):
        _feed(digest, b"y", bytes(value))
    elif hasattr(value, "dtype") and hasattr(value, "tobytes") and value.dtype.kind != "O":  # those are addresses
        _feed(digest, b"a", f"{value.dtype.str}{list(value.shape)}".encode())
        _feed(digest, b"y", value.tobytes())
    elif isinstance(value, Mapping):
        _feed(digest, b"d", str(len(value)).encode())
        for key in sorted(value, key=str):
            _feed(digest, b"k", str(key).encode("utf-8", "surrogatepass"))
            _feed_value(digest, value[key], f"{where}, field {key!r}")
    elif isinstance(value, (list, tuple)):
        _feed(digest, b"l", str(len(value)).encode())
        for item in value:
            _feed_value(digest, item, where)
    else:
        raise BadInput(
            f"{where}: a value of type {type(value).__name__} cannot be stored; "
            "use text, numbers, bytes, NumPy arrays, lists or mappings"
        )


def feed_row(digest: Any, row: Row, where: str = "row") -> None:
    """Adds one row to a running hash: every field by name and value, images by their bytes.

    Raises:
        BadInput: a field holds what cannot be stored.
    """
    if isinstance(row, ImageRow):
        encoded = row.encoded()
        row = {**row.fields, "image": row.image if encoded is None else encoded}
    try:
        _feed_value(digest, row, where)
    except BadInput:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        raise BadInput(f"{where}: holds a value that cannot be stored ({error}); leave the field out") from None


def hash_rows(train: Rows, valid: Rows, test: Rows, where: str = "") -> str:
    """sha256 (hex) over the rows in order, split by split; `where` is how errors name the rows."""
    digest = hashlib.sha256()
    for split, rows in (("train", train), ("valid", valid), ("test", test)):
        _feed(digest, b"S", f"{split}{len(rows)}".encode())
        for i, row in enumerate(rows):
            feed_row(digest, row, f"{where}{split} row {i}")
    return digest.hexdigest()


def row_key(row: Row) -> int:
    """A number that is equal for rows of equal content."""
    if isinstance(row, ImageRow):
        encoded = row.encoded()
        picture = row.image.tobytes() if encoded is None else encoded
        return hash((picture, *sorted((key, repr(value)) for key, value in row.fields.items())))
    return hash(tuple((key, _content(row[key])) for key in sorted(row)))


def _content(value: Any) -> int:
    return hash(value.tobytes() if hasattr(value, "tobytes") else repr(value))
