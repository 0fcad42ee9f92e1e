"""Named public data sets in a folder that the user names by the environment variable PERDURE_DATA. Imports no torch.

The folder's MANIFEST.json gives each file's sha256, which is checked once in a process. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ..data import Rows
from ..errors import BadInput
from .rows import CheckedRows, ImageRow
from .scenarios import Splits
from .sources import Reading, read_rows

VARIABLE = "PERDURE_DATA"


@dataclass(frozen=True)
class Named:
    """Where a named source lies.

    Attributes:
        files: split -> path below the data folder.
        kind: text (labelled), lm, pairs (prompt and answer) or images.
        fields: canonical name -> the file's own.
        extra: further parts that may be asked for instead of a split, e.g. `oos_test` of CLINC150.
        same_lines: lines at the head of each text that are the same in every row, which are left out.
    """

    files: Mapping[str, str]
    kind: str = "text"
    fields: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    same_lines: int = 0


def _jsonl(folder: str, name: str, splits: str = "train test", kind: str = "text", **options: Any) -> Named:
    parts = [part.partition("=") for part in splits.split()]
    files = {split: f"{folder}/{name}.{part or split}.jsonl.gz" for split, _, part in parts}
    return Named(files, kind, **options)


# The order of O-LoRA's order 4 (arXiv 2310.14152), without Yahoo.
TEXTCL = [
    "mnli",
    "cb",
    "wic",
    "copa",
    "qqp",
    "boolqa",
    "rte",
    "imdb",
    "yelp",
    "amazon",
    "sst2",
    "dbpedia",
    "agnews",
    "multirc",
]
# The order of TRACE (arXiv 2310.06762), without MeetingBank; Yahoo topics last.
TRACE500 = ["c_stance", "fomc", "py150", "scienceqa", "numglue_cm", "numglue_ds", "20minuten", "yahoo"]
LM = ["shakespeare", "kjv_bible", "wikitext2_eval", "python_stdlib", "c_source_lua", "don_quijote_es"]

NAMED: dict[str, Named] = {
    "clinc150": _jsonl(
        "intent",
        "clinc150",
        "train valid test",
        extra={part: f"intent/clinc150.{part}.jsonl.gz" for part in ("oos_train", "oos_valid", "oos_test")},
    ),
    "banking77": _jsonl("intent", "banking77"),
    **{f"textcl/{name}": _jsonl("textcl", name) for name in TEXTCL},
    # The same rows as trace500/yahoo, as text with a label; O-LoRA's sequences need it among the classification tasks.
    "textcl/yahoo_topics": replace(
        _jsonl("trace500", "yahoo", "train valid=eval test", fields={"text": "prompt", "label": "answer"}),
        same_lines=2,  # what to do, and the ten options
    ),
    "trace/fomc": _jsonl("trace", "fomc"),
    "trace/c_stance_a": _jsonl("trace", "c_stance_a"),
    **{f"trace500/{name}": _jsonl("trace500", name, "train valid=eval test", "pairs") for name in TRACE500},
    **{
        f"lm/{name}": Named({split: f"lm/{name}.{split}.txt.gz" for split in ("train", "valid", "test")}, "lm")
        for name in LM
    },
    "facts/counterfact": _jsonl(
        "facts",
        "counterfact",
        "train=edit2000 valid=val500",
        "pairs",
        fields={"prompt": "prompt", "answer": "target_new"},
    ),
    "facts/zsre": _jsonl("facts", "zsre", "train=1k", "pairs", fields={"prompt": "src", "answer": "alt"}),
    **{
        f"facts/tofu_{part}": _jsonl(
            "facts", "tofu", f"train={part}", "pairs", fields={"prompt": "question", "answer": "answer"}
        )
        for part in ("forget10", "retain90", "retain_perturbed", "real_authors", "world_facts")
    },
    "cifar100": Named({"train": "vision/cifar100_train20k.npz", "test": "vision/cifar100_test.npz"}, "images"),
    "tiny_imagenet_100c": Named({"train": "vision/tiny_imagenet_100c.npz"}, "images"),
    "pacs": Named({"train": "vision/pacs_96px.npz"}, "images"),
    "mnist_12k": Named({"train": "vision/mnist_12k.npz"}, "images"),
    "omniglot_small": Named({"train": "vision/omniglot_small.npz"}, "images"),
}
GROUPS = {"textcl": [f"textcl/{n}" for n in TEXTCL], "trace500": [f"trace500/{n}" for n in TRACE500]}


def _short_names() -> dict[str, str]:
    """Names without their folder, where only one source has it."""
    shorts: dict[str, list[str]] = {}
    for name in NAMED:
        shorts.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    return {short: names[0] for short, names in shorts.items() if len(names) == 1}


SHORT = _short_names()
DOMAIN_FIELDS = {"pacs": "domain", "clinc150": "domain"}


def full_name(name: str) -> str | None:
    """The name under which a source is listed, or None: `agnews` -> `textcl/agnews`."""
    return name if name in NAMED else SHORT.get(name)


# ---- files
def data_folder() -> Path:
    """The folder that PERDURE_DATA names.

    Raises:
        BadInput: the variable is not set, or the folder has no MANIFEST.json.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        raise BadInput(
            f"source: named data sets lie in a folder of your own; set {VARIABLE} to it (it holds MANIFEST.json), "
            "or give files by path"
        )
    folder = Path(value)
    if not (folder / "MANIFEST.json").is_file():
        raise BadInput(f"{VARIABLE}: {folder} has no MANIFEST.json; set it to the folder of the data sets")
    return folder


@lru_cache(maxsize=8)
def _manifest(path: Path, changed: int) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {file["path"]: file for entry in manifest["datasets"] for file in entry["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is not a manifest of data sets ({error!r}); restore the file") from None


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def verified(relative: str) -> Path:
    """A file of the data folder after its sha256 was compared with the manifest's; hashed once in a process.

    Raises:
        BadInput: the file is missing, not in the manifest, or differs from it.
    """
    folder = data_folder()
    manifest_path = folder / "MANIFEST.json"
    listed = _manifest(manifest_path, manifest_path.stat().st_mtime_ns).get(relative)
    if listed is None:
        raise BadInput(f"{manifest_path}: does not list {relative}; {VARIABLE} must name the folder of the data sets")
    path = folder / relative
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file, though the manifest lists it; fetch it again")
    status = path.stat()
    found = _sha256(path, status.st_size, status.st_mtime_ns)
    if found != listed["sha256"]:
        raise BadInput(
            f"{path}: its sha256 is {found[:16]}..., the manifest says {listed['sha256'][:16]}...; fetch the file again"
        )
    return path


# ---- reading
def read_named(name: str, how: Reading | None = None, part: str | None = None) -> Splits:
    """Rows of a named source.

    Args:
        name: as in `NAMED`, or its last part where that is unique.
        how: text settings and required fields; `fields` come from the table.
        part: a further part that stands for the training rows, e.g. `oos_train`.

    Validation rows that are test rows too (all of trace500/yahoo, 16 of trace500/fomc) are left out.

    Raises:
        BadInput: the name is unknown, PERDURE_DATA is not set, or a file differs from the manifest.
    """
    full = full_name(name)
    if full is None:
        raise BadInput(f"source: {name!r} is unknown; known: {', '.join(NAMED)}")
    entry = NAMED[full]
    files = dict(entry.files)
    if part is not None:
        if part not in entry.extra:
            raise BadInput(f"source.part: {full} has no part {part!r}; known: {', '.join(entry.extra) or 'none'}")
        files = {"train": entry.extra[part]}
    short = full.rsplit("/", 1)[-1]
    paths = {split: verified(relative) for split, relative in files.items()}
    how = replace(how or Reading(), fields=dict(entry.fields))
    if entry.kind == "images":
        data = _read_images(full, paths, how)
    else:
        rows = {split: _without_head(read_rows(path, how, split), entry.same_lines) for split, path in paths.items()}
        test: Rows = rows.get("test", ())
        data = Splits(short, rows["train"], test, _untested(rows.get("valid", ()), test))
    digests = {relative: verified_digest(relative) for relative in files.values()}
    return replace(data, name=short, details={"files": digests})


def _without_head(rows: Rows, lines: int) -> Rows:
    """The rows without the first lines of their texts."""
    if not lines:
        return rows
    return CheckedRows([{**row, "text": row["text"].split("\n", lines)[lines]} for row in rows])


def _untested(valid: Rows, test: Rows) -> Rows:
    """Validation rows without those that are test rows too: who tunes on such a row tunes on the test."""
    tested = {tuple(sorted(row.items())) for row in test}
    kept = [row for row in valid if tuple(sorted(row.items())) not in tested]
    return valid if len(kept) == len(valid) else CheckedRows(kept)


def verified_digest(relative: str) -> str:
    path = data_folder() / "MANIFEST.json"
    return _manifest(path, path.stat().st_mtime_ns)[relative]["sha256"]


def _read_images(full: str, paths: Mapping[str, Path], how: Reading) -> Splits:
    from .sources_images import load_npz, read_npz

    if full == "omniglot_small":
        return _omniglot(load_npz(paths["train"]), str(paths["train"]))
    data = read_npz(paths["train"], how, full)
    if "test" in paths:
        data = replace(data, test=read_npz(paths["test"], how, full).train)
    return data


def _omniglot(arrays: Mapping[str, Any], where: str) -> Splits:
    """Drawers 1 to 15 train, 16 to 20 test; ink becomes 255; the alphabet is the domain."""
    names = [str(name) for name in arrays["class_names"]]
    alphabets = [str(name) for name in arrays["alphabets"]]

    def rows(chosen: Iterable[int]) -> Rows:
        made = []
        for i in chosen:
            label = int(arrays["y"][i])
            fields = {"label": names[label], "domain": alphabets[int(arrays["alphabet_of_class"][label])]}
            made.append(ImageRow(fields, arrays["x"][i] * 255, f"{where}, row {i}"))
        return CheckedRows(made)

    train = [i for i, drawer in enumerate(arrays["drawer"]) if drawer <= 15]
    test = [i for i, drawer in enumerate(arrays["drawer"]) if drawer > 15]
    return Splits("omniglot_small", rows(train), rows(test), classes=tuple(names), domains=tuple(alphabets))
