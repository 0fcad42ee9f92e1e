"""Tensors as bytes: a safetensors writer that hashes while it writes, and the hash of a model.

The format is that of the safetensors library, which reads these files back; its own writer refuses shared memory and
would make the file be read again for the checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from perdure.errors import BadInput
from perdure.state import files

DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_METADATA = "__metadata__"


class Written(NamedTuple):
    """What stands on the disk: sha256 in hex and length in bytes."""

    sha256: str
    bytes: int


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuses, by name, what safetensors cannot hold, before anything is written."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == _METADATA:
            raise BadInput(f"tensors: name {name!r} cannot be stored; use other text")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(f"tensors: name {name!r} is no valid Unicode; use other text") from error
        if not isinstance(tensor, Tensor):
            raise BadInput(f"tensors.{name}: found {type(tensor).__name__}; put it among the values")
        _check_tensor(name, tensor)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise BadInput(f"tensors.{name}: a {tensor.layout} or quantised tensor; store its parts or a dense copy")
    if tensor.device.type == "meta":
        raise BadInput(f"tensors.{name}: on the meta device, without data; materialise it first")
    if tensor.dtype not in DTYPES:
        raise BadInput(f"tensors.{name}: dtype {tensor.dtype} cannot be stored; view it as one of {sorted_dtypes()}")


def sorted_dtypes() -> str:
    """The dtypes that can be stored, for messages."""
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order as bytes; a copy is made only where memory is not so already."""
    plain = tensor.detach().resolve_neg().cpu().contiguous().reshape(-1)
    plain = plain.as_strided((plain.numel(),), (1,))  # 0 or 1 elements count as contiguous with any stride
    return plain.view(torch.uint8).numpy().data


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Name -> dtype (safetensors' name) and shape."""
    return {name: {"dtype": DTYPES[t.dtype], "shape": list(t.shape)} for name, t in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes a new safetensors file, one tensor in memory at a time, and returns its checksum and size.

    Raises:
        BadInput: a tensor that cannot be stored.
        OSError: the disk refused.
    """
    check_tensors(tensors)
    # widest elements first, so that every tensor is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, entry in describe({name: tensors[name] for name in names}).items():
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with files.new_file(path) as descriptor:
        _emit(descriptor, digest, len(text).to_bytes(8, "little") + text)
        for name in names:
            _emit(descriptor, digest, tensor_bytes(tensors[name]))
    return Written(digest.hexdigest(), 8 + len(text) + end)


def _emit(descriptor: int, digest: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    for start in range(0, len(view), files.CHUNK):
        chunk = view[start : start + files.CHUNK]
        digest.update(chunk)
        files.write_all(descriptor, chunk)


def model_hash(named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """sha256 in hex over names, dtypes, shapes and bytes, whatever the order of registration.

    Takes a mapping such as `state_dict()` or pairs such as `named_parameters()`. Two views with equal content count as
    equal; strides and devices do not matter.

    Raises:
        BadInput: a name that comes twice with different content, or a tensor without plain bytes.
    """
    pairs = (
        list(cast(Mapping[str, Tensor], named_tensors).items())
        if isinstance(named_tensors, Mapping)
        else list(named_tensors)
    )
    digest = hashlib.sha256()
    seen: dict[str, Tensor] = {}
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]):
        if name in seen:
            if seen[name] is tensor:
                continue
            raise BadInput(f"model_hash: two tensors are named {name!r}; names must be unique")
        seen[name] = tensor
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise BadInput(f"model_hash: {name} is {tensor.layout} on {tensor.device}, without plain bytes to hash")
        # the header says how many bytes follow, so that no two models share a stream of bytes
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode("ascii") + b"\n")
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
