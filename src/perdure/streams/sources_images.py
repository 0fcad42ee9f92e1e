"""Images: npz arrays, packed JPEG, folders with a subfolder for each class. Imports no torch, Pillow only to decode."""

from __future__ import annotations

import io
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .rows import CheckedRows, ImageRow, as_label, sort_labels, to_hwc
from .scenarios import Splits
from .sources import Reading, read_bytes

if TYPE_CHECKING:
    import numpy as np

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "valid": "valid", "val": "valid"}
_SPLITS = ("train", "valid", "test")


def load_npz(path: Path) -> Mapping[str, Any]:
    """The arrays of an npz file (also .npz.gz), without pickle.

    Raises:
        BadInput: it is missing, truncated, or holds Python objects.
    """
    import numpy as np

    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise BadInput(f"{path}: holds a single array, expected an npz file with x and y")
            return {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError) as error:
        raise BadInput(f"{path}: is not a whole npz file ({error}); fetch it again") from None
    except ValueError as error:
        raise BadInput(f"{path}: cannot be read without pickle ({error}); save plain arrays") from None


def read_npz(path: Path, how: Reading, name: str) -> Splits:
    """Arrays `x` and `y` (or `x_train`, `y_train`, `x_test` ...), or packed `train_jpeg`, `train_offsets`, `train_y`.

    Image i of a packed set is `jpeg[offsets[i]:offsets[i + 1]]`. Optional: `class_names` (index -> label), `domain`
    with `domain_names`. `x` is uint8 [N, H, W], [N, 3, H, W] or [N, H, W, 3], or an array of texts [N]. `fields` may
    rename `x` (image or text) and `y` (label).

    Raises:
        BadInput: keys are missing, lengths differ, or a label is outside `class_names`.
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
    classes = tuple(str(label) for label in arrays.get("class_names", ()))
    if not classes and "label" in splits["train"][0]:
        classes = tuple(sort_labels(row["label"] for row in splits["train"]))
    domains = tuple(str(domain) for domain in arrays.get("domain_names", ()))
    return Splits(name, **splits, classes=classes, domains=domains)


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
    names, domain_names = arrays.get("class_names"), arrays.get("domain_names")
    items = _texts_or_images(arrays, keys, path)
    for kind in ("y", "domain"):
        if kind in keys and len(arrays[keys[kind]]) != len(items):
            raise BadInput(
                f"{path}: {keys[kind]} has {len(arrays[keys[kind]])} entries, but there are {len(items)} rows"
            )
    for i, item in enumerate(items):
        where = f"{path}, {split} row {i}"
        fields: dict[str, Any] = {}
        if "y" in keys:
            fields["label"] = _name_of(arrays[keys["y"]][i], names, f"{where}, {keys['y']}")
        if "domain" in keys:
            fields["domain"] = _name_of(arrays[keys["domain"]][i], domain_names, f"{where}, {keys['domain']}")
        yield {**fields, "text": item} if isinstance(item, str) else ImageRow(fields, item, where)


def _texts_or_images(arrays: Mapping[str, Any], keys: Mapping[str, str], path: Path) -> list[Any]:
    if "x" not in keys:
        packed, offsets = arrays[keys["jpeg"]], arrays[keys["offsets"]]
        ends = [int(offset) for offset in offsets]
        if ends[:1] != [0] or ends[-1] != len(packed) or any(a >= b for a, b in itertools.pairwise(ends)):
            raise BadInput(f"{path}: {keys['offsets']} must rise from 0 to {len(packed)}, the size of {keys['jpeg']}")
        whole = packed.tobytes()
        return [whole[a:b] for a, b in itertools.pairwise(ends)]
    x = arrays[keys["x"]]
    if x.dtype.kind == "U":
        return [str(text) for text in x]
    if x.ndim not in (3, 4):
        raise BadInput(
            f"{path}: {keys['x']} has shape {list(x.shape)}, expected images [N, H, W], [N, 3, H, W] or [N, H, W, 3]"
        )
    if len(x):
        to_hwc(x[0], f"{path}, {keys['x']}")  # type and layout, once
    return list(x)


def _name_of(value: Any, names: np.ndarray | None, where: str) -> str:
    label = as_label(value, where)
    if names is None or not label.isdigit():
        return label
    if int(label) >= len(names):
        raise BadInput(f"{where}: {label} is outside the {len(names)} declared names; correct it or add its name")
    return str(names[int(label)])


def read_folder(path: Path, how: Reading, name: str) -> Splits:
    """A folder with one subfolder of image files for each class, or `train`, `valid` and `test` folders of that form.

    Files are opened when a row's image is read.

    Raises:
        BadInput: there are no images, or a split names a class that the training part lacks.
    """
    if not path.is_dir():
        raise BadInput(f"{path}: is not a folder; an image folder has one subfolder for each class")
    parts = {
        _SPLIT_FOLDERS[p.name.lower()]: p
        for p in sorted(path.iterdir())
        if p.is_dir() and p.name.lower() in _SPLIT_FOLDERS
    }
    roots = parts if "train" in parts else {"train": path}
    splits = {}
    for split, root in roots.items():
        rows = []
        for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
            files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file())
            if not files:
                raise BadInput(
                    f"{folder}: holds no image files ({', '.join(sorted(ENDINGS))}); remove the folder or fill it"
                )
            rows += [ImageRow({"label": folder.name}, file, str(file)) for file in files]
        if not rows:
            raise BadInput(f"{root}: has no subfolders with images; expected one subfolder for each class")
        splits[split] = CheckedRows(rows)
    return Splits(name, **splits, classes=tuple(sort_labels(row["label"] for row in splits["train"])))
