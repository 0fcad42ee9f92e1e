"""Strict JSON for the part of a state that is not tensors: what is loaded equals what was saved, or saving fails."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from perdure.errors import BadInput

_FLOAT, _ESCAPED = "$float", "$dict"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DEEPEST = 200
_CHECKSUM = b',"checksum":"'
_MOST_BITS = 10_000  # Python prints integers up to 4,300 digits


def encode_values(value: Any, path: str = "values") -> Any:
    """Copies `value` into plain JSON. NaN and infinities become `{"$float": "nan"}`.

    Raises:
        BadInput: naming the path of a value that JSON cannot give back equal (tuple, set, tensor, object, key that is
            no text).
    """
    return _encode(value, path, 0)


def _encode(value: Any, path: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise BadInput(f"{path}: nested deeper than {_DEEPEST} levels (or holding itself); flatten it")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise BadInput(f"{path}: an integer of {value.bit_length()} bits; store it as text")
        return int.__int__(value)
    if isinstance(value, float):
        number = float.__float__(value)
        if math.isfinite(number):
            return number
        return {_FLOAT: "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"}
    if isinstance(value, list):
        return [_encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return _encode_dict(value, path, depth)
    remedy = {"tuple": "use a list", "set": "use a sorted list", "Tensor": "put it among the tensors"}
    kind = type(value).__name__
    raise BadInput(f"{path}: {kind} is no JSON value; {remedy.get(kind, 'use text, numbers, lists and dicts')}")


def _encode_dict(value: dict[Any, Any], path: str, depth: int) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise BadInput(f"{path}: key {key!r} is {type(key).__name__}; JSON keys are text")
        plain[str.__str__(key)] = _encode(item, f"{path}.{key}", depth + 1)
    # a dict of the user's that looks like one of our marks is wrapped
    return {_ESCAPED: plain} if any(key.startswith("$") for key in plain) else plain


def decode_values(value: Any) -> Any:
    """The inverse of `encode_values`."""
    if isinstance(value, list):
        return [decode_values(item) for item in value]
    if isinstance(value, dict):
        if _FLOAT in value:
            return _SPECIAL[value[_FLOAT]]
        return {key: decode_values(item) for key, item in value.get(_ESCAPED, value).items()}
    return value


def dump(document: dict[str, Any]) -> bytes:
    """One line of ASCII JSON; key order is kept."""
    return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def seal(text: bytes) -> bytes:
    """A JSON object with a last entry more: the checksum over every byte before it."""
    body = text.rstrip()[:-1].rstrip()
    return body + _seal_of(body)


def unseal(raw: bytes) -> dict[str, Any]:
    """The object that `seal` has closed.

    Raises:
        ValueError: why it cannot be trusted, to be put behind the file's name.
    """
    body, mark, _ = raw.rpartition(_CHECKSUM)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("is cut short or no JSON") from None
    if not mark or raw[len(body) :] != _seal_of(body) or not isinstance(document, dict):
        raise ValueError("does not match its checksum: it was changed after it was written")
    return document


def _seal_of(body: bytes) -> bytes:
    return _CHECKSUM + hashlib.sha256(body).hexdigest().encode("ascii") + b'"}\n'
