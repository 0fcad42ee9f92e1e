"""Other processes: a fresh one that loads what was saved, and two that learn together as one would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import cases
from .two_processes import CASES

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip


def _run(*command: str, limit: int = 600) -> None:
    with tempfile.TemporaryFile("w+") as output:
        running = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output)
        try:
            code = running.wait(timeout=limit)
        finally:
            running.terminate()  # torchrun ends its workers then; killed, it would leave them
            running.wait(timeout=60)
        output.seek(0)
        assert code == 0, output.read()[-4000:]


@pytest.mark.parametrize("host", cases.HOSTS)
def test_ten_experiences_in_a_fresh_process(tmp_path: Path, host: str) -> None:
    expected = {}
    for name, spec in cases.all_specs().items():
        if not cases.runs(name, host):
            continue
        made = cases.experiences(host, 10, rows=6)
        learner = cases.build_learner(host, spec, epochs=1, max_steps=1)
        for experience in made:
            learner.learn(experience)
        assert learner.head is None or len(learner.seen) == 20
        learner.save_pretrained(tmp_path / "kept" / name)
        expected[name] = cases.outputs(learner, made)
    _run("-m", "tests.conformance.fresh_process", host, str(tmp_path / "kept"))
    found = load_file(tmp_path / "kept" / "logits.safetensors")
    assert set(found) == set(expected) and len(expected) > 5
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m"]
    _run("-m", "tests.conformance.two_processes", str(folder / "one"))
    _run(*torchrun, "tests.conformance.two_processes", str(folder / "two"))
    return {name: load_file(folder / name) for name in ("one.0", "two.0", "two.1")}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(learnt: dict[str, dict[str, torch.Tensor]], name: str) -> None:
    one = {what: learnt["one.0"][f"{name}/{what}"] for what in ("losses", "logits", "samples")}
    assert len(one["losses"]) > 0
    for rank in ("two.0", "two.1"):
        for what, expected in one.items():
            assert (learnt[rank][f"{name}/{what}"] - expected).abs().max() < 1e-6, (rank, what)
