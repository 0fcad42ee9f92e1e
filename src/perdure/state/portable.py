"""A folder that can be given away: what was learnt, without the base model and without optimizer or random states."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.errors import BadInput, DamagedState
from perdure.state import files
from perdure.state.schema import SCHEMA, check_schema, migrate
from perdure.state.tensors import describe, write_tensors
from perdure.state.values import decode_values, encode_values

DOCUMENT = "perdure.json"


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
    files.atomic_write_text(folder / DOCUMENT, json.dumps(document, ensure_ascii=False, indent=1))
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return folder


def read_portable(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_portable` wrote.

    Raises:
        BadInput: the folder is not one of these.
        DamagedState: checksum or schema do not fit.
    """
    from safetensors.torch import load_file

    path = folder / DOCUMENT
    if not path.is_file():
        raise BadInput(f"{folder}: has no {DOCUMENT}; give a folder written by save_pretrained")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check_schema(document["schema"])
        stored = folder / document["tensors_file"]
        found = hashlib.sha256(stored.read_bytes()).hexdigest()
        expected = document["sha256"]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise DamagedState(f"{folder}: cannot be read ({error}); restore it from a copy") from error
    if found != expected:
        raise DamagedState(f"{stored}: does not match its sha256; restore it from a copy")
    values, tensors = migrate(decode_values(document["values"]), load_file(stored), document["schema"])
    return tensors, values
