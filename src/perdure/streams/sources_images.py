"""Images: npz arrays, packed JPEG, folders with a subfolder for each class. Imports no torch, Pillow only to decode."""

from __future__ import annotations

import io
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .rows import CheckedRows, ImageRow, as_label, check_text, sort_labels, to_hwc
from .scenarios import Splits
from .sources import Reading, read_bytes

if TYPE_CHECKING:
    import numpy as np

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "valid": "valid", "val": "valid"}
_SPLITS = ("train", "valid", "test")
# What NumPy and zipfile raise on damaged files; a header is Python source, and a flipped bit reads as encryption.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, SyntaxError, TokenError, RuntimeError)


def load_npz(path: Path) -> Mapping[str, Any]:
    """The arrays of an npz file (also .npz.gz), without pickle.

    Raises:
        BadInput: it is missing, truncated, or holds Python objects.
    """
    import numpy as np

    try:
        file = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        if not hasattr(file, "files"):
            raise BadInput(f"{path}: holds a single array, expected an npz file with x and y; save it with savez")
        with file:
            arrays = {key: file[key] for key in file.files}
            return {key: _decoded(array) for key, array in arrays.items() if hasattr(array, "dtype")}
    except BadInput:
        raise
    except _DAMAGED as error:
        raise BadInput(f"{path}: is not a whole npz file ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: has text that is not UTF-8 ({error}); save it as str") from None
    except ValueError as error:
        if "pickle" in str(error):
            raise BadInput(f"{path}: cannot be read without pickle ({error}); save plain arrays") from None
        raise BadInput(f"{path}: is not a whole npz file ({error}); fetch it again") from None


def _decoded(array: np.ndarray) -> np.ndarray:
    """Text that was stored as bytes, as UTF-8."""
    import numpy as np

    return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array


def read_npz(path: Path, how: Reading, name: str) -> Splits:
    """Arrays `x` and `y` (or `x_train`, `y_train`, `x_test` ...), or packed `train_jpeg`, `train_offsets`, `train_y`.

    Image i of a packed set is `jpeg[offsets[i]:offsets[i + 1]]`. Optional: `class_names` (index -> label), `domain`
    with `domain_names`. `x` is uint8 [N, H, W], [N, 3, H, W] or [N, H, W, 3], or an array of texts [N]. `fields` may
    rename `x` (image or text) and `y` (label).

    Raises:
        BadInput: keys are missing, there are no rows, lengths differ, or `class_names` is given and a label is neither
            an index into it nor one of it.
    """
    arrays = load_npz(path)
    x = how.fields.get("image", how.fields.get("text", "x"))
    y = how.fields.get("label", "y")
    splits = {}
    for split in _SPLITS:
        keys = _find_keys(arrays, split, x, y)
        if keys is not None:
            splits[split] = CheckedRows(_npz_rows(arrays, keys, path, split))
    if "train" not in splits:
        raise BadInput(
            f"{path}: has no arrays {x!r} and {y!r}, {x}_train and {y}_train, or train_jpeg and train_offsets; "
            f"found {', '.join(arrays)}; name them: fields: {{image: ..., label: ...}}"
        )
    if not splits["train"]:
        raise BadInput(f"{path}: has no training rows; it needs at least one")
    classes = _names(arrays, "class_names", path)
    if not classes and "label" in splits["train"][0]:
        classes = tuple(sort_labels(row["label"] for row in splits["train"]))
    return Splits(name, **splits, classes=classes, domains=_names(arrays, "domain_names", path))


def _names(arrays: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = arrays.get(key)
    if names is None:
        return ()
    if names.ndim != 1:
        raise BadInput(f"{path}: {key} has shape {list(names.shape)}, expected one name for each index")
    return tuple(as_label(name, f"{path}, {key}") for name in names)


def _find_keys(arrays: Mapping[str, Any], split: str, x: str, y: str) -> dict[str, str] | None:
    for prefix, suffix in ((f"{split}_", ""), ("", f"_{split}"), ("", "")):
        if not prefix and not suffix and split != "train":
            continue
        keys = {kind: f"{prefix}{own}{suffix}" for kind, own in
                (("x", x), ("y", y), ("jpeg", "jpeg"), ("offsets", "offsets"), ("domain", "domain"))}  # fmt: skip
        if keys["x"] in arrays or (keys["jpeg"] in arrays and keys["offsets"] in arrays):
            return {kind: key for kind, key in keys.items() if key in arrays}
    return None


def _npz_rows(arrays: Mapping[str, Any], keys: Mapping[str, str], path: Path, split: str) -> Iterator[Any]:
    names, domain_names = _names(arrays, "class_names", path), _names(arrays, "domain_names", path)
    items = _texts_or_images(arrays, keys, path)
    for kind in ("y", "domain"):
        shape = arrays[keys[kind]].shape if kind in keys else (len(items),)
        if shape[:1] != (len(items),):
            found = f"{shape[0]} entries" if shape else "a single value"
            raise BadInput(f"{path}: {keys[kind]} has {found}, but there are {len(items)} rows; give one for each")
    for i, item in enumerate(items):
        where = f"{path}, {split} row {i}"
        fields: dict[str, Any] = {}
        if "y" in keys:
            fields["label"] = _name_of(arrays[keys["y"]][i], names, f"{where}, {keys['y']}")
        if "domain" in keys:
            fields["domain"] = _name_of(arrays[keys["domain"]][i], domain_names, f"{where}, {keys['domain']}")
        if isinstance(item, str):
            check_text(item, keys["x"], where)
            yield {**fields, "text": item}
        else:
            yield ImageRow(fields, item, where)


def _texts_or_images(arrays: Mapping[str, Any], keys: Mapping[str, str], path: Path) -> list[Any]:
    if "x" not in keys:
        packed, offsets = arrays[keys["jpeg"]], arrays[keys["offsets"]]
        if packed.dtype.kind != "u" or packed.itemsize > 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
            raise BadInput(f"{path}: expected {keys['jpeg']} as uint8 and {keys['offsets']} as a list of whole numbers")
        ends = [int(offset) for offset in offsets]
        if ends[:1] != [0] or ends[-1] != len(packed) or any(a >= b for a, b in itertools.pairwise(ends)):
            raise BadInput(f"{path}: {keys['offsets']} must rise from 0 to {len(packed)}, the size of {keys['jpeg']}")
        whole = packed.tobytes()
        return [whole[a:b] for a, b in itertools.pairwise(ends)]
    x = arrays[keys["x"]]
    if x.dtype.kind == "U" and x.ndim == 1:
        return [str(text) for text in x]
    if x.ndim not in (3, 4):
        raise BadInput(
            f"{path}: {keys['x']} has shape {list(x.shape)}, expected images [N, H, W], [N, 3, H, W] or "
            "[N, H, W, 3], or texts [N]"
        )
    if len(x):
        to_hwc(x[0], f"{path}, {keys['x']}")  # type and layout, once
    return list(x)


def _name_of(value: Any, names: Sequence[str], where: str) -> str:
    label = as_label(value, where)
    if not names or (isinstance(value, str) and label in names):
        return label
    if label.isdecimal() and len(label) < 10 and int(label) < len(names):
        return names[int(label)]
    raise BadInput(
        f"{where}: {label} is outside the {len(names)} declared names (neither one of them nor an index from 0 to "
        f"{len(names) - 1}); correct it or add its name"
    )


def _is_image(file: Path, folder: Path) -> bool:
    """By its ending; hidden files and what lies in hidden folders are notes of the system or an editor."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in ENDINGS and not hidden and file.is_file()


def read_folder(path: Path, how: Reading, name: str) -> Splits:
    """A folder with one subfolder of image files for each class, or `train`, `valid` and `test` folders of that form.

    Files are opened when a row's image is read. Hidden files and folders are passed over.

    Raises:
        BadInput: there are no images, or a split names a class that the training part lacks.
    """
    if not path.is_dir():
        raise BadInput(f"{path}: is not a folder; an image folder has one subfolder for each class")
    parts: dict[str, Path] = {}
    for part in sorted(p for p in path.iterdir() if p.is_dir() and p.name.lower() in _SPLIT_FOLDERS):
        split = _SPLIT_FOLDERS[part.name.lower()]
        if split in parts:
            raise BadInput(f"{path}: has the folders {parts[split].name} and {part.name} for one split; keep one")
        parts[split] = part
    roots = parts if "train" in parts else {"train": path}
    splits = {}
    for split, root in roots.items():
        rows = []
        for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
            check_text(folder.name, "label", str(folder))
            files = sorted(f for f in folder.rglob("*") if _is_image(f, folder))
            if not files:
                raise BadInput(
                    f"{folder}: holds no image files ({', '.join(sorted(ENDINGS))}); remove the folder or fill it"
                )
            rows += [ImageRow({"label": folder.name}, file, str(file)) for file in files]
        if not rows:
            raise BadInput(f"{root}: has no subfolders with images; expected one subfolder for each class")
        splits[split] = CheckedRows(rows)
    return Splits(name, **splits, classes=tuple(sort_labels(row["label"] for row in splits["train"])))
