"""The checkpoint store: round trip, damage, full disks, pruning, old schemas, and a fixture of the present schema."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from perdure.errors import BadInput, DamagedState
from perdure.state import State, StateStore, StateWarning, files, migrate, schema
from perdure.state.tensors import DTYPES

FIXTURE = Path(__file__).parents[1] / "fixtures" / "state_v1"


def content(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3) * step, "n": torch.tensor(step)}
    return tensors, {"cursor": {"experience": step, "row": 3}, "loss": [0.1 * step, math.nan]}


def save(store: StateStore, step: int, boundary: int | None = None) -> Path:
    return store.save(step, *content(step), boundary=boundary)


def assert_holds(state: State, step: int) -> None:
    tensors, values = content(step)
    assert state.step == step
    assert state.tensors.keys() == tensors.keys()
    assert all(torch.equal(state.tensors[name], tensors[name]) for name in tensors)
    assert repr(state.values) == repr(values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# round trip


def awkward_tensors() -> dict[str, Tensor]:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    odd = torch.tensor([0x7FC00001, -0x7FFFFF, 0, -(2**31)], dtype=torch.int32).view(torch.float32)
    return {
        "view": base[1:3, ::2],
        "transposed": base.T,
        "base": base,
        "alias": base,
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0, 3),
        "one of a stride": base[0, ::7],
        "none of a stride": base[0, 6::2],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bool": torch.tensor([[True], [False]]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "bf16": torch.randn(3, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "nan payloads and signed zero": odd,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "": torch.zeros(1, dtype=torch.int16),
        "name.with/slash\n\u00e9": torch.tensor([1, -1]),
    }


def raw(tensor: Tensor) -> bytes:
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return fresh.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def test_awkward_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = awkward_tensors()
    path = StateStore(tmp_path).save(1, tensors, {})
    assert_same_bits(StateStore(tmp_path).load().tensors, tensors)
    assert_same_bits(load_file(path / "tensors.safetensors"), tensors)  # the library agrees on the format


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(64, dtype=torch.uint8)
    tensor = (bits % 2).bool() if dtype == torch.bool else bits.view(dtype)
    StateStore(tmp_path).save(1, {"t": tensor}, {})
    assert_same_bits(StateStore(tmp_path).load().tensors, {"t": tensor})


def test_the_checksum_taken_while_writing_is_the_files(tmp_path: Path) -> None:
    import hashlib

    path = save(StateStore(tmp_path), 1)
    document = json.loads((path / "state.json").read_bytes())
    data = (path / "tensors.safetensors").read_bytes()
    assert document["files"]["tensors.safetensors"] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert document["tensors"]["w"] == {"dtype": "F32", "shape": [2, 3]}
    assert document["schema"] == 1 and document["perdure"]
    assert StateStore(tmp_path).load().size == sum(p.stat().st_size for p in path.iterdir())


def test_a_loaded_state_does_not_hang_on_its_file(tmp_path: Path) -> None:
    path = save(StateStore(tmp_path), 3)
    state = StateStore(tmp_path).load()
    (path / "tensors.safetensors").write_bytes(b"")
    assert_holds(state, 3)


@pytest.mark.parametrize(
    ("tensors", "values", "message"),
    [
        ({}, {"a": {"b": [1, (2,)]}}, r"values\.a\.b\[1\]: tuple"),
        ({}, {"a": {1: 2}}, r"values\.a: key 1 is int"),
        ({}, {"a": torch.ones(1)}, r"values\.a: Tensor .*among the tensors"),
        ({}, {"a": b"x"}, r"values\.a: bytes"),
        ({}, {"a": 1 << 20_000}, r"values\.a: an integer"),
        ({"t": [1.0]}, {}, r"tensors\.t: found list"),
        ({"t": torch.ones(2, dtype=torch.complex64)}, {}, r"tensors\.t: dtype torch.complex64"),
        ({"t": torch.ones(2, device="meta")}, {}, r"tensors\.t: on the meta device"),
        ({"t": torch.eye(2).to_sparse()}, {}, r"tensors\.t: a torch.sparse_coo"),
        ({"__metadata__": torch.ones(1)}, {}, r"__metadata__"),
        ({"\ud800": torch.ones(1)}, {}, r"Unicode"),
    ],
)
def test_what_cannot_be_stored_is_named_before_anything_is_written(
    tmp_path: Path, tensors: Any, values: Any, message: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(BadInput, match=message):
        StateStore(folder).save(1, tensors, values)
    assert not folder.exists()


def test_a_value_that_holds_itself_is_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    values["self"] = values
    with pytest.raises(BadInput, match="nested deeper"):
        StateStore(tmp_path).save(1, {}, values)


@pytest.mark.parametrize("arguments", [{"step": -1}, {"step": True}, {"step": 1.0}, {"step": 1, "boundary": -1}])
def test_steps_and_boundaries_are_whole_numbers(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="whole number"):
        StateStore(tmp_path).save(tensors={}, values={}, **arguments)


def test_limits_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="save_total_limit is 1"):
        StateStore(tmp_path, limit=1)
    with pytest.raises(BadInput, match="keep_boundaries is -1"):
        StateStore(tmp_path, keep_boundaries=-1)


# choice and pruning


def test_newest_is_loaded_and_names_sort_by_step(tmp_path: Path) -> None:
    store = StateStore(tmp_path, limit=20)
    steps = [0, 1, 9, 10, 100, 1000]
    for step in steps:
        save(store, step)
    assert [int(name.split("-")[1]) for name in names(tmp_path)] == steps
    assert_holds(StateStore(tmp_path).load(), 1000)
    assert_holds(StateStore(tmp_path).load(step=9), 9)
    with pytest.raises(BadInput, match="no checkpoint with step 7"):
        store.load(step=7)


def test_saves_without_steps_between_them_keep_their_order(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for boundary in range(3):  # a method that takes no optimizer step stays at step 0
        store.save(0, {}, {"learnt": boundary}, boundary=boundary)
    store.save(0, {}, {"learnt": "part"})
    assert store.load().values == {"learnt": "part"}
    assert store.load(boundary=1).values == {"learnt": 1}
    assert store.boundaries() == [0, 1, 2]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(None, [(0, 0), (2, 1), (4, 2), (6, None), (7, None)]), (1, [(4, 2), (6, None), (7, None)]),
     (0, [(6, None), (7, None)])],
)  # fmt: skip
def test_pruning_keeps_the_newest_and_the_boundaries(
    tmp_path: Path, keep: int | None, expected: list[tuple[int, int | None]]
) -> None:
    store = StateStore(tmp_path, limit=2, keep_boundaries=keep)
    for step in range(8):
        save(store, step, boundary=step // 2 if step in (0, 2, 4) else None)
    assert [(entry.step, entry.boundary) for entry in store.entries()] == expected
    assert len(store) == len(expected)


def test_without_kept_boundaries_the_last_two_states_still_stand(tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep_boundaries=0)
    for k in range(4):
        save(store, k, boundary=k)
    assert store.boundaries() == [2, 3]


def test_a_boundary_saved_again_replaces_the_first(tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep_boundaries=2)
    save(store, 1, boundary=1)
    save(store, 2, boundary=2)
    save(store, 3, boundary=2)
    save(store, 4)
    save(store, 5)
    assert [(e.step, e.boundary) for e in store.entries()] == [(1, 1), (3, 2), (4, None), (5, None)]
    assert_holds(store.load(boundary=2), 3)


def test_rollback_forgets_what_came_later(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for step in range(6):
        save(store, step, boundary=step // 2 if step % 2 == 0 else None)
    assert_holds(store.rollback(boundary=1), 2)
    assert [entry.step for entry in store.entries()] == [0, 2]
    save(store, 3)
    assert_holds(StateStore(tmp_path).load(), 3)


def test_a_prune_that_fails_warns_and_the_save_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path)
    for step in (1, 2):
        save(store, step)
    real = files.rename

    def rename(old: Path, new: Path) -> None:
        if new.name.startswith(".removing-"):
            raise PermissionError(errno.EPERM, "no")
        real(old, new)

    monkeypatch.setattr(files, "rename", rename)
    with pytest.warns(StateWarning, match="could not be removed"):
        save(store, 3)
    assert_holds(store.load(), 3)


# damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


DAMAGES = {
    "flipped tensors": (lambda p: flip(p / "tensors.safetensors"), "sha256"),
    "flipped values": (lambda p: flip(p / "state.json"), "state.json"),
    "cut tensors": (lambda p: os.truncate(p / "tensors.safetensors", 40), "40 bytes"),
    "cut values": (lambda p: os.truncate(p / "state.json", 40), "cut short or no JSON"),
    "longer tensors": (lambda p: lengthen(p / "tensors.safetensors"), "were written"),
    "longer values": (lambda p: lengthen(p / "state.json"), "checksum"),
    "empty values": (lambda p: (p / "state.json").write_bytes(b""), "cut short or no JSON"),
    "edited values": (
        lambda p: (p / "state.json").write_bytes((p / "state.json").read_bytes().replace(b'"row":3', b'"row":4')),
        "changed after it was written",
    ),
    "no tensors": (lambda p: (p / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    "no values": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "empty folder": (lambda p: [f.unlink() for f in p.iterdir()], "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    harm, reason = DAMAGES[damage]
    store = StateStore(tmp_path)
    save(store, 1)
    newest = save(store, 2)
    harm(newest)
    with pytest.warns(StateWarning, match=reason) as caught:
        state = StateStore(tmp_path).load()
    assert str(newest) in str(caught[0].message) and caught[0].filename == __file__
    assert_holds(state, 1)
    assert names(tmp_path) == [f"damaged-{newest.name}", state.path.name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(StateStore(tmp_path).load(), 1)  # told once


def test_a_checkpoint_under_another_name_is_damaged(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    first = save(store, 1)
    shutil.copytree(first, tmp_path / "step-0000000009-000009")
    with pytest.warns(StateWarning, match="belongs to step 1"):
        assert_holds(store.load(), 1)


def test_no_whole_checkpoint_is_an_error_that_names_them(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for step in (1, 2):
        flip(save(store, step) / "tensors.safetensors")
    with pytest.warns(StateWarning), pytest.raises(DamagedState, match=r"step-0000000002.*; step-0000000001"):
        store.load()
    assert all(name.startswith("damaged-") for name in names(tmp_path))
    with pytest.raises(DamagedState, match="holds none"):
        store.load()
    save(store, 2)  # a second damaged one of the same name gets its own place
    flip(store.entries()[-1].path / "state.json")
    with pytest.warns(StateWarning), pytest.raises(DamagedState):
        store.load()


def test_asking_for_a_damaged_step_does_not_give_another(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    save(store, 1)
    flip(save(store, 2) / "state.json")
    with pytest.warns(StateWarning), pytest.raises(DamagedState, match="with step 2"):
        store.load(step=2)
    assert_holds(store.load(), 1)


def test_an_unreadable_checkpoint_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path)
    save(store, 1)

    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadInput, match="permissions"):
        store.load()
    assert len(store) == 1


def test_leftovers_of_a_killed_process_go_at_opening_but_not_a_living_ones(tmp_path: Path) -> None:
    save(StateStore(tmp_path), 1)
    for leftover in (".saving-step-0000000002-000002", ".removing-step-0000000000-000000"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "tensors.safetensors").write_bytes(b"half")
    held = files.hold_folder(tmp_path / ".saving-step-0000000002-000002")
    StateStore(tmp_path)
    assert names(tmp_path)[0] == ".saving-step-0000000002-000002" and len(names(tmp_path)) == 2
    os.close(held)
    assert_holds(StateStore(tmp_path).load(), 1)
    assert len(names(tmp_path)) == 1


# schemas


def test_migrations_run_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(StateStore(tmp_path), 5)
    monkeypatch.setattr(schema, "SCHEMA", 3)
    monkeypatch.setitem(schema.MIGRATIONS, 1, lambda v, t: ({**v, "trail": [1]}, {**t, "added": torch.zeros(2)}))
    monkeypatch.setitem(schema.MIGRATIONS, 2, lambda v, t: ({**v, "trail": [*v["trail"], 2]}, t))
    state = StateStore(tmp_path).load()
    assert state.values["trail"] == [1, 2] and state.values["cursor"] == content(5)[1]["cursor"]
    assert state.tensors.keys() == {"w", "n", "added"}
    monkeypatch.delitem(schema.MIGRATIONS, 2)
    with pytest.raises(DamagedState, match="knows no way"):
        StateStore(tmp_path).load()


def test_a_newer_schema_is_refused_by_both_numbers_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(StateStore(tmp_path), 1)
    with monkeypatch.context() as patched:
        patched.setattr(schema, "SCHEMA", 7)
        newest = save(StateStore(tmp_path), 2)
    with pytest.raises(DamagedState, match=r"schema 7.*up to 1.*Upgrade"):
        StateStore(tmp_path).load()
    assert newest.exists()
    with pytest.raises(DamagedState, match="schema 2"):
        migrate({}, {}, 2)
    with pytest.raises(DamagedState, match="'1'"):
        migrate({}, {}, "1")  # type: ignore[arg-type]
    assert migrate({"a": 1}, {}) == ({"a": 1}, {})


def fixture_content() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the fixture was saved from, at step 12 and boundary 3."""
    tensors = {
        "bank.3.query.frozen_keys": torch.linspace(-1, 1, 8).reshape(2, 4),
        "bank.3.query.owners": torch.tensor([0, 0, 1]),
        "bank.3.query.usage": torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64),
        "head.mask": torch.tensor([True, False, True]),
        "half": torch.tensor([1.5, -2.0]).bfloat16(),
        "empty": torch.empty(0, 4),
        "step": torch.tensor(12.0),
    }
    values = {
        "cursor": {"experience": 3, "row": 0, "epoch": 0},
        "matrix": [[0.9, None], [0.8, 0.95]],
        "odd": [math.nan, math.inf, -math.inf, -0.0, 5e-324, 2**70],
        "marks": {"$float": "nan", "$dict": {}},
        "text": "na\u00efve \u2713 \ud800",
    }
    return tensors, values


def test_the_fixture_of_schema_1_loads(tmp_path: Path) -> None:
    folder = tmp_path / "state_v1"
    shutil.copytree(FIXTURE, folder)
    state = StateStore(folder).load()
    tensors, values = fixture_content()
    assert (state.step, state.boundary) == (12, 3)
    assert_same_bits(state.tensors, tensors)
    assert repr(state.values) == repr(values)
