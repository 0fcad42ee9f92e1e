"""A folder that can be given away: what was learnt, without the base model and without optimizer or random states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.errors import BadInput, DamagedState
from perdure.state import files
from perdure.state.schema import SCHEMA, check_schema, migrate
from perdure.state.tensors import describe, write_tensors
from perdure.state.values import decode_values, encode_values, seal, unseal

DOCUMENT = "perdure.json"
_FORM: dict[str, type] = {
    "settings": dict, "settings.objective": dict, "settings.training": dict, "base": dict, "base.hash": str,
    "base.name": str, "names": list, "methods": list, "labels": list, "history": list, "writes": list,
}  # fmt: skip


def write_portable(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> Path:
    """Writes `perdure.json` and one safetensors file; a reader sees the old content or the new, never a mixture.

    Raises:
        CannotWrite: full disk or no permission; what was there stays.
        BadInput: a tensor or value that cannot be stored, by name.
    """
    encoded = encode_values(values)
    with files.writing(folder):
        files.make_folder(folder, exist_ok=True)
        temporary = folder / ".tensors.tmp"
        temporary.unlink(missing_ok=True)
        try:
            written = write_tensors(temporary, tensors)
            name = f"adapter-{written.sha256[:12]}.safetensors"
            files.rename(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    document = {
        "schema": SCHEMA, "tensors_file": name, "sha256": written.sha256, "bytes": written.bytes,
        "tensors": describe(tensors), "values": encoded,
    }  # fmt: skip
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, indent=1)
    files.atomic_write_text(folder / DOCUMENT, seal(text.encode("ascii")).decode("ascii"))
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return folder


def read_portable(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_portable` wrote.

    Raises:
        BadInput: the folder is not one of these, or may not be read.
        DamagedState: a checksum, the schema or the form of the content does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / DOCUMENT
    if not path.is_file():
        raise BadInput(f"{folder}: has no {DOCUMENT}; give a folder written by save_pretrained")
    try:
        document = _document(path)
        stored = folder / document["tensors_file"]
        if hashlib.sha256(stored.read_bytes()).hexdigest() != document["sha256"]:
            raise DamagedState(f"{stored}: does not match its sha256; restore it from a copy")
        tensors = load_file(stored)
    except (FileNotFoundError, SafetensorError) as error:
        raise DamagedState(f"{folder}: cannot be read ({error}); restore it from a copy") from error
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error}); check its permissions") from error
    values, tensors = migrate(decode_values(document["values"]), tensors, document["schema"])
    return tensors, values


def _document(path: Path) -> dict[str, Any]:
    try:
        document = unseal(path.read_bytes())
    except ValueError as error:
        raise DamagedState(f"{path}: {error}; restore it from a copy") from None
    check_schema(document.get("schema"))
    if not isinstance(document.get("tensors_file"), str) or not isinstance(document.get("values"), dict):
        raise DamagedState(f"{path}: is no document of save_pretrained; restore it from a copy")
    return document


def check_form(values: dict[str, Any], names: Iterable[str], folder: str | Path) -> None:
    """Refuses values that lack what a learner is made of.

    Args:
        values: what `read_portable` gave.
        names: arguments that a learner takes.
        folder: for the message.

    Raises:
        BadInput: it has a head that no Learner has.
        DamagedState: names the first entry that is missing or of another kind.
    """
    for key, kind in _FORM.items():
        found: Any = values
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, kind) or found == {}:
            raise DamagedState(f"{folder}: {DOCUMENT} has no valid {key!r}; restore it from a copy")
    if values.get("host_head"):
        raise BadInput(
            f"{folder}: was learnt under the Hugging Face Trainer with the model's own classification head, which no "
            "Learner has; read it with `PerdureCallback.load_pretrained`"
        )
    unknown = sorted(set(values["settings"]) - set(names))
    if unknown:
        raise DamagedState(f"{folder}: {DOCUMENT} has unknown settings {', '.join(unknown)}; restore it from a copy")


def point_to(settings: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """The settings with every method's `weights`, the folder it once began with, replaced by `folder`.

    What is in `folder` began there and went on; the other one need not exist any more.
    """
    methods = [
        {name: config | ({"weights": str(folder)} if config.get("weights") else {}) for name, config in each.items()}
        for each in settings["method"]
    ]
    return settings | {"method": methods}
