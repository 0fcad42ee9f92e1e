"""What a plug-in keeps of the rows that it was shown, looked up in its memory and in its saved state.

The replay buffer is the only place for rows of the past. Everything that hangs on a method, a head or the objective is
walked, and what it holds is compared with the rows just shown: the row objects themselves, their texts and pictures,
their token ids and pixels in tensors and arrays. What was packed or encrypted cannot be recognised and counts as bytes.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel
from torch import Tensor, nn

from .errors import BadInput
from .loading import evenly

if TYPE_CHECKING:
    from .data import Rows
    from .loop import Loop

SAMPLE = 16
"""Rows that are also looked for inside longer texts, and as token ids and pixels."""
SHORTEST = 10
"""Characters of a text, and numbers in a row of token ids, below which a match may be chance."""
VARIED = 4
"""Different values in a run of token ids or pixels below which it may stand anywhere, as ones and zeros do."""
FEW = 4096
"""Numbers of a tensor from which it is told whether all are whole, as token ids are."""
MOST_PIXELS = 2**24
"""Numbers of a tensor in which pixels are looked for."""
_PLAIN = (type(None), bool, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType, Path, BaseModel)
_OURS = ("perdure.", "transformers.", "peft.", "accelerate.", "torch.")
"""Packages whose functions and closures hold no rows of their own."""


class Marks:
    """What a set of rows is recognised by; of their content only a sample is kept.

    Args:
        loop: encodes the sample.
        rows: as methods see them.
        alive: whether the row objects outlive the marks, so that they may be known by their ids.
    """

    def __init__(self, loop: Loop, rows: Rows, alive: bool = False):
        labels = set(loop.labels)
        in_memory = isinstance(rows, (tuple, list))
        self.rows = {id(row) for row in rows} if in_memory and alive else set()
        self.texts = {hash(text) for row in rows for text in _texts(row) if text not in labels} if in_memory else set()
        some = list(evenly(rows, SAMPLE))
        self.sample = [text for row in some for text in _texts(row) if text not in labels]
        self.texts |= {hash(text) for text in self.sample}
        pictures = [np.asarray(row["image"]) for row in some if row.get("image") is not None]
        self.bytes = {picture.tobytes() for picture in pictures}
        self.pictures = [run for picture in pictures if (run := _middle(picture))]
        self.ids, self.pixels = _encoded(loop, some)

    # ---- one value
    def in_text(self, text: str) -> int:
        """Rows that a text holds."""
        if len(text) < SHORTEST:
            return 0
        return int(hash(text) in self.texts) or sum(part in text for part in self.sample)

    def in_bytes(self, data: bytes) -> int:
        if data in self.bytes:
            return 1
        return 0 if len(data) < SHORTEST else sum(part.encode() in data for part in self.sample)

    def in_numbers(self, array: np.ndarray) -> int:
        """Rows whose token ids or pixels stand in an array, whatever its type and shape."""
        kind, flat = array.dtype.kind, np.ascontiguousarray(array).reshape(-1)
        if not flat.size or kind not in "iuf":
            return 0
        if array.dtype == np.uint8 and self.pictures:
            data = flat.tobytes()
            return sum(run in data for run in self.pictures)
        if kind == "f" and self.pixels:
            data = flat.astype(np.float32).tobytes() if len(flat) <= MOST_PIXELS else b""
            return sum(run in data for run in self.pixels)
        with np.errstate(all="ignore"):  # infinite numbers are no token ids either
            few = flat[:: max(1, len(flat) // FEW)]
            if not self.ids or (kind == "f" and (few % 1 != 0).any()):
                return 0
            data = flat.astype(np.int64).tobytes()  # token ids may stand in a tensor of any type
        return sum(_aligned(data, ids) for ids in self.ids)


def _texts(row: Any) -> list[str]:
    found = [value for field in ("text", "prompt") if isinstance(value := row.get(field), str)]
    for turn in row.get("messages") or ():
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str):
            found.append(turn["content"])
    return [text for text in found if len(text) >= SHORTEST]


def _encoded(loop: Loop, rows: Sequence[Any]) -> tuple[list[bytes], list[bytes]]:
    """Token ids, without what opens and closes every text, and pixels of rows as the host reads them."""
    ids, pixels = [], []
    try:
        encoded = loop.objective.encode(rows, loop.processor)
    except (BadInput, ValueError):  # rows of another kind, such as those that a user scores by hand
        return [], []
    for each in encoded:
        tokens = list(each.get("input_ids") or ())[1:-1]
        if len(tokens) >= SHORTEST and len(set(tokens)) >= VARIED:
            ids.append(np.asarray(tokens, np.int64).tobytes())
        if each.get("pixel_values") is not None and (run := _middle(np.asarray(each["pixel_values"], np.float32))):
            pixels.append(run)
    return ids, pixels


def _middle(picture: np.ndarray) -> bytes:
    """A run of values from the middle, where few pictures have a plain border; empty where it is plain all the same."""
    flat = np.ascontiguousarray(picture).reshape(-1)
    run = flat[len(flat) // 2 :][:48]
    return run.tobytes() if len(np.unique(run)) >= VARIED else b""


def _aligned(data: bytes, part: bytes) -> bool:
    at = data.find(part)
    while at >= 0 and at % 8:
        at = data.find(part, at + 1)
    return at >= 0


# ---- the walk
def walk(root: Any, host: set[int], seen: set[int]) -> Iterator[Any]:
    """Texts, bytes, arrays, tensors and rows that hang on an object.

    Args:
        root: where to begin.
        host: ids of the user's own modules and parameters, and of what leads out of a plug-in: not entered.
        seen: ids that were met; grows.
    """
    todo = [root]
    while todo:
        value = todo.pop()
        if isinstance(value, _PLAIN) or id(value) in host or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, (str, bytes, bytearray, Tensor, np.ndarray)):
            continue
        todo += _inside(value)


def _inside(value: Any) -> list[Any]:
    """What an object holds: attributes, items, what a function closes over."""
    if type(value).__module__.startswith("torch.distributed."):  # its books of a split host, weights that come and go
        return []
    if isinstance(value, types.FunctionType):
        if (value.__module__ or "").startswith(_OURS):
            return []
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *vars(value).values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    fields = list(_fields(value))
    if isinstance(value, (dict, types.MappingProxyType)):
        return [*fields, *value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return [*fields, *value]
    return fields


def _fields(value: Any) -> Iterator[Any]:
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield getattr(value, name)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


# ---- what hangs on a loop
def roots(loop: Loop, saved: bool) -> Iterator[tuple[str, Any]]:
    """(who, where to begin): each plug-in, its class, what it saves if asked, and wherever else it may put things."""
    owners = [(f"method {method.name}", method) for method in loop.methods]
    owners += [(f"head {head.name}", head) for head in (loop.head, loop.auxiliary_head) if head is not None]
    owners += [(f"objective {loop.objective.name}", loop.objective)]
    for who, owner in owners:
        # A hook that was put on it from outside closes over the caller's own scope, where the rows are anyway.
        yield who, {n: v for n, v in vars(owner).items() if not (callable(v) and hasattr(type(owner), n))}
        for kind in type(owner).__mro__:
            if kind.__module__.startswith("perdure."):
                break
            yield who, [value for value in vars(kind).values() if not callable(value)]
        state = getattr(owner, "state_dict", None)  # an objective has none
        if saved and state is not None:
            yield f"the saved state of {who}", list(state())
    names = " and ".join(who for who, _ in owners)
    ours = ("_loop", "router_log", "_previous", "_previous_head", "_previous_learnt")
    yield f"a service of {names}", {name: value for name, value in vars(loop.services).items() if name not in ours}
    yield f"the model of {names}", _foreign(loop)


def _foreign(loop: Loop) -> list[Any]:
    """Plain data and buffers on the host's modules, where no plug-in has anything to keep."""
    kinds = (list, tuple, dict, set, str, bytes, Tensor, np.ndarray)
    found = []
    for module in loop.model.modules():
        found += [v for n, v in vars(module).items() if isinstance(v, kinds) and n not in _OF_TORCH]
        found += [buffer for buffer in module._buffers.values() if buffer is not None]
    return found


_OF_TORCH = frozenset(vars(nn.Module()))


def _ways_out(loop: Loop) -> set[int]:
    """Ids of what a walk does not enter: the loop, its books, and the user's model with all that stands in it."""
    mine = {id(part) for method in loop.methods for module in method.modules.values() for part in _parts(module)}
    theirs = {id(part) for part in _parts(loop.model)} - mine
    ours = [*loop.methods, loop.head, loop.auxiliary_head, loop.objective]  # each is a root of its own
    ours += [loop, loop.services, loop.host, loop.replay, loop.accelerator, loop.processor, loop.generator, loop.system]
    return theirs | {id(each) for each in (*ours, loop.services.router_log, loop.labels)}


def _parts(module: nn.Module) -> Iterator[Any]:
    yield from module.modules()
    yield from module.parameters()


def kept_rows(loop: Loop, marks: Marks, saved: bool) -> tuple[str, int] | None:
    """Who keeps rows that the marks know, and at least how many; None where nobody does.

    `saved`: look at what a saved state holds too, which is made anew for it.
    """
    out = _ways_out(loop)
    for who, root in roots(loop, saved):
        count = sum(_rows_in(value, marks) for value in walk(root, out, set()))
        if count:
            return who, count
    return None


def _rows_in(value: Any, marks: Marks) -> int:
    if id(value) in marks.rows and isinstance(value, Mapping):
        return 1
    if isinstance(value, str):
        return marks.in_text(value)
    if isinstance(value, (bytes, bytearray)):
        return marks.in_bytes(bytes(value))
    if isinstance(value, (list, tuple)) and len(value) >= SHORTEST and all(type(each) is int for each in value):
        return marks.in_numbers(np.asarray(value, np.float64))
    if isinstance(value, np.ndarray):
        return 1 if value.dtype == np.uint8 and value.tobytes() in marks.bytes else marks.in_numbers(value)
    if isinstance(value, Tensor) and value.numel() and not value.is_meta:
        return _rows_in_tensor(value.detach(), marks)
    return 0


def _rows_in_tensor(tensor: Tensor, marks: Marks) -> int:
    if tensor.is_floating_point():
        few = tensor.reshape(-1)[:: max(1, tensor.numel() // FEW)].double()
        pixels = marks.pixels and tensor.numel() <= MOST_PIXELS
        if not pixels and bool((few % 1 != 0).any()):  # no token ids: known before it leaves its device
            return 0
        tensor = tensor.float()
    return marks.in_numbers(tensor.cpu().numpy()) if not tensor.is_complex() else 0


def unsaved_bytes(loop: Loop) -> int:
    """Bytes of texts, bytes and arrays that hang on methods and heads and are in no saved state.

    Tensors are left out: what a method computes from its state anew, such as a basis, is none of the state.
    """
    out, total = _ways_out(loop), 0
    for owner in (*loop.methods, *(head for head in (loop.head, loop.auxiliary_head) if head is not None)):
        seen: set[int] = set()
        for part in owner.state_dict():
            for _ in walk(part, set(), seen):
                pass
        for value in walk(vars(owner), out, seen):
            if isinstance(value, str):
                total += len(value.encode("utf-8", "surrogatepass"))
            elif isinstance(value, (bytes, bytearray)):
                total += len(value)
            elif isinstance(value, np.ndarray):
                total += value.nbytes
    return total
