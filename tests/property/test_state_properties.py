"""Any tensors and any JSON values come back equal; any change of a byte is noticed."""

from __future__ import annotations

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perdure.errors import BadInput
from perdure.state import StateStore, StateWarning, decode_values, encode_values, model_hash
from perdure.state.tensors import DTYPES
from perdure.state.values import dump

FEW = settings(max_examples=40, deadline=None)

numbers = st.integers(-(2**200), 2**200) | st.floats()
keys = st.text(max_size=5) | st.sampled_from(["$float", "$dict", "$"])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)
documents = st.dictionaries(keys, json_values, max_size=5)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any dtype, whole, transposed, strided, expanded or a view into a larger one."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    width = torch.empty((), dtype=dtype).element_size()
    data = draw(st.binary(min_size=math.prod(shape) * width, max_size=math.prod(shape) * width))
    bits = torch.tensor(list(data), dtype=torch.uint8)
    whole = ((bits % 2).bool() if dtype == torch.bool else bits.view(dtype)).reshape(shape)
    form = draw(st.sampled_from(["whole", "transposed", "strided", "expanded", "view"]))
    if form == "transposed" and whole.dim() >= 2:
        return whole.transpose(0, -1)
    if form == "strided" and whole.dim() >= 1:
        return whole[::2]
    if form == "expanded":
        return whole.unsqueeze(0).expand(2, *whole.shape)
    if form == "view" and whole.dim() >= 1:
        return whole[1:]
    return whole


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return tensor.dtype, tensor.shape, fresh.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type, order of keys and value; NaN equals NaN and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b) if isinstance(a, float) else a == b


@FEW
@given(st.dictionaries(st.text(max_size=4), tensors(), max_size=4), documents, st.booleans())
def test_what_is_saved_comes_back(named: dict[str, Tensor], values: dict[str, Any], share: bool) -> None:
    if share:
        named |= {f"again {name}": tensor for name, tensor in named.items()}
    with tempfile.TemporaryDirectory() as folder:
        StateStore(Path(folder)).save(1, named, values)
        state = StateStore(Path(folder)).load()
    assert {name: bits(t) for name, t in state.tensors.items()} == {name: bits(t) for name, t in named.items()}
    assert same(state.values, values)
    assert model_hash(state.tensors) == model_hash(named)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_values_survive_strict_json(value: Any) -> None:
    import json

    text = dump({"values": encode_values(value)})
    assert same(decode_values(json.loads(text)["values"]), value)


@settings(max_examples=100, deadline=None)
@given(documents, st.sampled_from([(), {1}, b"", object, 1j]), st.booleans())
def test_one_value_that_is_not_json_is_found_by_its_path(values: dict[str, Any], odd: Any, deep: bool) -> None:
    values["place"] = {"list": [0, {"x": odd}]} if deep else odd
    with pytest.raises(BadInput, match=r"values\.place\.list\[1\]\.x: " if deep else r"values\.place: "):
        encode_values(values)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for step in (1, 2):
        named = {"a": torch.arange(5) * step, "b": torch.ones(2, 2)}
        StateStore(folder).save(step, named, {"x": [1.25, None, "t"], "y": {"z": step}})
    return folder


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_and_every_cut_is_noticed(two: Path, data: st.DataObject) -> None:
    store = StateStore(two)
    entry = store.entries()[-1]
    path = entry.path / data.draw(st.sampled_from(["state.json", "tensors.safetensors"]))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    if data.draw(st.booleans()):
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del changed[place:]
    path.write_bytes(changed)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = store.load()
        assert [w.category for w in caught] == [StateWarning] and str(entry.path) in str(caught[0].message)
        assert state.step == 1 and torch.equal(state.tensors["a"], torch.arange(5))
    finally:
        aside = two / f"damaged-{entry.path.name}"
        if aside.exists():
            aside.rename(entry.path)
        path.write_bytes(whole)
    assert store.load().step == 2
