"""Locks, random number generators, optimizers by name, the environment, the hash of a model."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from perdure.errors import BadInput, CannotWrite, DamagedState
from perdure.state import (
    RunLock,
    StateStore,
    environment,
    environment_differences,
    generator_state,
    load_optimizer_state,
    model_hash,
    optimizer_state,
    rng_state,
    set_generator_state,
    set_rng_state,
)
from perdure.state import lock as lock_module

# lock

HOLDER = """
import os, sys, time
if sys.argv[3] == "slow fork":
    os.register_at_fork(after_in_child=lambda: time.sleep(0.5))  # a child that is not scheduled for a while
sys.modules["torch"] = type(sys)("torch")  # the lock needs none of it
import importlib.util, types
for name in ("perdure", "perdure.state"):
    package = types.ModuleType(name)
    package.__path__ = [os.path.join(sys.argv[1], *name.split("."))]
    sys.modules[name] = package
from pathlib import Path
from perdure.state.lock import RunLock
lock = RunLock(Path(sys.argv[2])).acquire()
child = os.fork() if "fork" in sys.argv[3] else -1
if child == 0:
    sys.stdin.read()  # a data worker that outlives its parent
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def hold(folder: Path, mode: str = "plain") -> subprocess.Popen[str]:
    source = Path(lock_module.__file__).parents[2]
    command = [sys.executable, "-c", HOLDER, str(source), str(folder), mode]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    other = hold(tmp_path)
    try:
        assert other.stdout is not None
        pid = int(other.stdout.readline())
        with pytest.raises(CannotWrite, match=rf"process {pid} on .*output_dir") as caught, RunLock(tmp_path):
            pass
        assert caught.value.exit_code == 73
    finally:
        end(other)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == pid  # killed: it could not clean up
    with RunLock(tmp_path) as mine:
        assert mine.owner()["pid"] == os.getpid()


@pytest.mark.parametrize("mode", ["fork", "slow fork"])
def test_a_worker_that_outlives_its_killed_parent_holds_nothing(tmp_path: Path, mode: str) -> None:
    other = hold(tmp_path, mode)
    try:
        assert other.stdout is not None
        int(other.stdout.readline())
        os.kill(other.pid, 9)
        other.wait()
        with RunLock(tmp_path):  # the worker still lives: it reads from the pipe that this test holds open
            pass
    finally:
        end(other)


def test_one_process_cannot_lock_twice_either(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with lock:
        with pytest.raises(CannotWrite, match=f"process {os.getpid()}"):
            RunLock(tmp_path).acquire()
        with pytest.raises(CannotWrite, match="this very process"):
            lock.acquire()
    lock.release()
    with RunLock(tmp_path), RunLock(tmp_path / "another"):
        pass


def test_a_lock_file_that_was_removed_is_locked_anew(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").unlink()
        with RunLock(tmp_path):
            assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"pid": "x"}'])
def test_a_lock_file_without_sense_stops_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with RunLock(tmp_path) as lock:
        assert lock.owner()["pid"] == os.getpid()


def test_without_kernel_locks_the_recorded_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, mode: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    dead = subprocess.Popen(["true"])
    dead.wait()
    with RunLock(tmp_path) as lock:
        owner = lock.owner()
        with pytest.raises(CannotWrite):
            RunLock(tmp_path).acquire()
    for change, refused in (
        ({"pid": dead.pid}, False),
        ({"pid": os.getppid()}, True),
        ({"host": "elsewhere"}, True),
        ({}, False),  # our own number, left by an earlier life: containers reuse it
    ):
        (tmp_path / ".lock").write_text(json.dumps({**owner, **change}))
        if refused:
            with pytest.raises(CannotWrite, match="remove"):
                RunLock(tmp_path).acquire()
        else:
            RunLock(tmp_path).acquire().release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWrite, match="file"):
        RunLock(tmp_path / "file").acquire()


# random numbers


def seed(number: int) -> None:
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), *numpy.random.rand(2), numpy.random.randn(), *torch.rand(3).tolist()]


@pytest.mark.parametrize("gauss", [False, True])
def test_random_numbers_go_on_where_they_were(tmp_path: Path, gauss: bool) -> None:
    before = rng_state()
    try:
        seed(1)
        if gauss:  # both generators now hold the second half of a pair
            random.gauss(0, 1)
            numpy.random.randn()
        tensors, values = rng_state()
        expected = draw()
        StateStore(tmp_path).save(0, tensors, {"rng": values})
        seed(9)
        state = StateStore(tmp_path).load()
        set_rng_state(state.tensors, state.values["rng"])
        assert draw() == expected
        for name in ("python", "numpy"):
            with pytest.raises(DamagedState, match=name):
                set_rng_state(tensors, {key: value for key, value in values.items() if key != name})
        with pytest.raises(DamagedState, match=r"rng\.torch"):
            set_rng_state({}, values)
    finally:
        set_rng_state(*before)


def test_a_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)
    state = generator_state(generator)
    expected = torch.randn(9, generator=generator)
    other = torch.Generator()
    set_generator_state(other, state)
    assert torch.equal(torch.randn(9, generator=other), expected)
    with pytest.raises(DamagedState, match="3 bytes"):
        set_generator_state(other, torch.zeros(3, dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_random_numbers_go_on_where_they_were() -> None:
    torch.cuda.manual_seed_all(3)
    torch.rand(5, device="cuda")
    tensors, values = rng_state()
    expected = torch.rand(5, device="cuda")
    set_rng_state(tensors, values)
    assert torch.equal(torch.rand(5, device="cuda"), expected)


# optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, betas=(0.8, 0.95)),
    "adamw tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        scheduler.step()


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_rebuilt_optimizer_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](groups(model))
    scheduler = schedule(optimizer)
    train(model, optimizer, scheduler, range(3))
    tensors, values = optimizer_state(optimizer, model.named_parameters())
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    rates = {"last_epoch": scheduler.last_epoch}
    StateStore(tmp_path).save(3, {**weights, **tensors}, {"optimizer": values, "scheduler": rates})
    train(model, optimizer, scheduler, range(3, 6))

    state = StateStore(tmp_path).load()
    other = network()
    other.load_state_dict({name: state.tensors[f"model.{name}"] for name in other.state_dict()})
    rebuilt = OPTIMIZERS[kind](groups(other))
    again = schedule(rebuilt)
    ids = {id(p): name for name, p in other.named_parameters()}
    assert load_optimizer_state(rebuilt, ids, state.tensors, state.values["optimizer"]) == []
    again.last_epoch = state.values["scheduler"]["last_epoch"]
    train(other, rebuilt, again, range(3, 6))
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(old, new)
    for old, new in zip(optimizer.param_groups, rebuilt.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {k: v for k, v in new.items() if k != "params"}
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[old].keys() == rebuilt.state[new].keys()
        for key, value in optimizer.state[old].items():
            if isinstance(value, Tensor):
                assert value.dtype == rebuilt.state[new][key].dtype and torch.equal(value, rebuilt.state[new][key])


def stepped(named: dict[str, nn.Parameter], **options: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([{"params": [p], **options} for p in named.values()])
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_grown_and_new_parameters_start_fresh_and_the_rest_is_kept() -> None:
    old = {
        "keys": nn.Parameter(torch.ones(2, 3)),
        "head": nn.Parameter(torch.ones(4)),
        "gone": nn.Parameter(torch.ones(1)),
    }
    tensors, values = optimizer_state(stepped(old, lr=0.5), old.items())
    new = {
        "added": nn.Parameter(torch.ones(2)),
        "head": nn.Parameter(torch.ones(4)),
        "keys": nn.Parameter(torch.ones(5, 3)),
    }
    optimizer = torch.optim.AdamW([{"params": [new["added"]], "lr": 0.1}, {"params": [new["keys"], new["head"]]}])
    assert load_optimizer_state(optimizer, new.items(), tensors, values) == ["added", "keys"]
    assert set(optimizer.state) == {new["head"]}
    assert torch.equal(optimizer.state[new["head"]]["exp_avg"], tensors["optimizer.head.exp_avg"])
    assert optimizer.state[new["head"]]["exp_avg"] is not tensors["optimizer.head.exp_avg"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_groups_with_names_find_each_other() -> None:
    parameters = {name: nn.Parameter(torch.ones(1)) for name in "ab"}
    a, b = parameters.values()
    named = torch.optim.SGD([{"params": [a], "name": "body", "lr": 1.0}, {"params": [b], "name": "head", "lr": 2.0}])
    tensors, values = optimizer_state(named, parameters.items())
    swapped = torch.optim.SGD([{"params": [a], "name": "head"}, {"params": [b], "name": "body"}], lr=9.0)
    assert load_optimizer_state(swapped, parameters.items(), tensors, values) == []
    assert [group["lr"] for group in swapped.param_groups] == [2.0, 1.0]


def test_state_of_a_parameter_that_never_stepped_is_cleared() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2))}
    tensors, values = optimizer_state(torch.optim.AdamW(parameters.values()), parameters.items())
    used = stepped(parameters)
    assert load_optimizer_state(used, parameters.items(), tensors, values) == []
    assert not used.state


def test_tied_parameters_keep_their_first_name() -> None:
    shared = nn.Parameter(torch.ones(2))
    tensors, _ = optimizer_state(stepped({"in": shared}), [("in", shared), ("out", shared)])
    assert set(tensors) == {"optimizer.in.step", "optimizer.in.exp_avg", "optimizer.in.exp_avg_sq"}


def test_optimizers_that_cannot_be_matched_are_refused_by_name() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = stepped({"a": a, "b": b})
    with pytest.raises(BadInput, match=r"group 1, parameter 0.*\[3\]"):
        optimizer_state(optimizer, {id(a): "a"})
    with pytest.raises(BadInput, match="several parameters are named a"):
        optimizer_state(optimizer, {id(a): "a", id(b): "a"})
    tensors, values = optimizer_state(optimizer, {id(a): "a", id(b): "b"})
    with pytest.raises(BadInput, match="AdamW.*SGD"):
        load_optimizer_state(torch.optim.SGD([a]), {id(a): "a"}, tensors, values)
    with pytest.raises(DamagedState, match=r"optimizer\.a\.step"):
        load_optimizer_state(optimizer, {id(a): "a", id(b): "b"}, {}, values)
    with pytest.raises(BadInput, match="dict is no torch optimizer"):
        optimizer_state({}, {})
    optimizer.state[a]["odd"] = [1]
    with pytest.raises(BadInput, match="'odd' of a is list"):
        optimizer_state(optimizer, {id(a): "a", id(b): "b"})


def test_a_wrapped_optimizer_is_looked_into() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    named = {"a": nn.Parameter(torch.ones(2))}
    tensors, values = optimizer_state(Wrapper(stepped(named)), named.items())
    assert values["optimizer"] == "AdamW" and len(tensors) == 3
    fresh = torch.optim.AdamW(named.values())
    assert load_optimizer_state(Wrapper(fresh), named.items(), tensors, values) == []
    assert torch.equal(fresh.state[named["a"]]["exp_avg"], tensors["optimizer.a.exp_avg"])


# environment


def test_the_environment_is_json_and_differs_in_what_changes() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["cpu"] and found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert environment_differences(found, environment()) == []
    changed = {**found, "torch": "1.0", "threads": 99, "platform": "elsewhere", "unknown": 1}
    assert environment_differences(changed, found) == [
        f"torch: 1.0 -> {torch.__version__}",
        f"threads: 99 -> {torch.get_num_threads()}",
    ]


def test_deterministic_flags_are_seen() -> None:
    old = environment()
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(not before)
        assert environment_differences(old, environment()) == [f"deterministic: {before} -> {not before}"]
    finally:
        torch.use_deterministic_algorithms(before)


def test_importing_the_state_brings_in_nothing_heavy_but_torch() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import perdure.state; perdure.state.environment(); "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"transformers", "accelerate", "peft", "matplotlib", "pydantic", "datasets", "pandas"}
    assert "perdure" in done.stdout.split() and not heavy & set(done.stdout.split())


# hash of a model


def test_the_hash_ignores_order_strides_and_wrapping() -> None:
    model = network()
    expected = model_hash(model.state_dict())
    assert expected == model_hash(reversed(list(model.named_parameters())))
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in model.state_dict().items()}
    assert not all(t.is_contiguous() for t in strided.values())
    assert expected == model_hash(strided)
    assert len(expected) == 64 and model_hash({}) != expected


def test_the_hash_sees_every_bit_name_dtype_and_shape() -> None:
    base = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    others = [
        {**base, "a": base["a"].reshape(2, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {**base, "b": -base["b"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
        {"a": base["b"], "b": base["a"]},
        {**base, "b": torch.zeros(0)},
    ]
    hashes = {model_hash(other) for other in [base, *others]}
    assert len(hashes) == len(others) + 1


def test_the_hash_refuses_what_has_no_bytes_or_no_own_name() -> None:
    with pytest.raises(BadInput, match="a is torch.strided on meta"):
        model_hash({"a": torch.ones(1, device="meta")})
    with pytest.raises(BadInput, match="two tensors are named 'a'"):
        model_hash([("a", torch.ones(1)), ("a", torch.ones(1))])
    one = torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model_hash([("a", one), ("a", one)]) == model_hash({"a": one})
