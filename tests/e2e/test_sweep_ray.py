"""A sweep on a real Ray cluster of this machine, which another process holds."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perdure import yamltext

from .nursery import SOURCE
from .test_sweep import OWN
from .tiny import rows, settings, write_rows

HOLD = """
import sys, ray
held = ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
                _temp_dir=sys.argv[1])
print(held.address_info["address"], flush=True)
sys.stdin.read()
"""
ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
SLOW = """
import os
import time
from pathlib import Path

from perdure.config import MethodConfig
from perdure.methods import Method, register


@register("slow")
class Slow(Method):
    '''Never comes to an end by itself.'''

    class Config(MethodConfig):
        pass

    def before_experience(self, experience):
        Path("pid.part").write_text(str(os.getpid()))
        os.replace("pid.part", "pid")
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    folder = Path("/tmp") / f"pr{os.getpid()}"  # short: sockets lie in it
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, **ALONE},
    )  # fmt: skip
    assert holder.stdout
    try:
        ready, _, _ = select.select([holder.stdout], [], [], 120)
        address = holder.stdout.readline().strip() if ready else ""
        if not address:
            holder.kill()
            pytest.skip(f"Ray does not start on this machine: {holder.communicate()[1][-300:]}")
        yield address
    finally:
        try:
            holder.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.communicate()
        shutil.rmtree(folder, ignore_errors=True)


COMMAND = (sys.executable, "-m", "perdure", "sweep", "tiny.yaml", "--experiences", "1", "--import", "own.py")
ENVIRONMENT = {**os.environ, **ALONE, "PYTHONPATH": SOURCE}


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    made = settings(tmp_path)
    made["stream"]["source"]["valid"] = str(
        write_rows(tmp_path / "valid.jsonl", [row for kind in range(6) for row in rows(f"kind{kind}", 2, 2)])
    )
    made["method"] = "finetune"
    made["arms"] = {"finetune": {"method": "finetune"}, "fragile": {"method": "fragile"}, "slow": {"method": "slow"}}
    (tmp_path / "tiny.yaml").write_text(yamltext.dump(made), encoding="utf-8")
    (tmp_path / "own.py").write_text(OWN + SLOW, encoding="utf-8")
    return tmp_path


def test_a_sweep_on_a_cluster_finds_what_one_on_this_machine_finds(cluster: str, recipe: Path) -> None:
    grid = ("--arms", "finetune", "--grid", "learning_rate=1e-3,1e-2")
    there = sweep(recipe, *grid, "--ray", cluster, "--out", "there")
    assert there.returncode == 0, there.stderr
    here = sweep(recipe, *grid, "--out", "here")
    assert here.returncode == 0, here.stderr
    tables = [json.loads((recipe / name / "sweep.json").read_text(encoding="utf-8")) for name in ("there", "here")]
    losses = [[(row["learning_rate"], row["loss"]) for row in table["finetune"]["trials"]] for table in tables]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert "[2/2]" in there.stderr
    again = sweep(recipe, *grid, "--ray", cluster, "--out", "there")
    assert "2 of 2 trials ended before" in again.stderr


def test_a_killed_process_of_a_cluster_fails_its_trial_alone(cluster: str, recipe: Path) -> None:
    done = sweep(recipe, "--arms", "fragile", "--grid", "method.fragile.bomb=true,false", "--ray", cluster)
    assert done.returncode == 0, done.stderr
    table = json.loads((recipe / "runs/tiny/sweep/sweep.json").read_text(encoding="utf-8"))
    bomb, calm = table["fragile"]["trials"]
    assert "SIGKILL" in bomb["failed"] and calm == table["fragile"]["best"]


def test_what_a_cluster_cannot_give_is_refused_before_work(cluster: str, recipe: Path) -> None:
    grid = ("--arms", "finetune", "--grid", "learning_rate=1e-3")
    greedy = sweep(recipe, *grid, "--ray", cluster, "--ray-gpus", "1")
    assert greedy.returncode == 64 and "the whole cluster has 0; set --ray-gpus" in greedy.stderr
    nobody = sweep(recipe, *grid, "--ray", "127.0.0.1:1")
    assert nobody.returncode == 64 and "--ray 127.0.0.1:1: no cluster answers" in nobody.stderr
    nowhere = sweep(recipe, *grid, "--ray", "somewhere")
    assert nowhere.returncode == 64 and "'somewhere' is not auto or HOST:PORT" in nowhere.stderr
    alone = sweep(recipe, *grid, "--ray-gpus", "1")
    assert alone.returncode == 64 and "is for --ray" in alone.stderr


def test_a_sweep_that_is_interrupted_leaves_no_process_on_the_cluster(cluster: str, recipe: Path) -> None:
    arguments = ("--arms", "slow", "--grid", "learning_rate=1e-3", "--ray", cluster)
    begun = subprocess.Popen(
        [*COMMAND, *arguments], cwd=recipe, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
        # A shell gives what it starts in the background an ignored SIGINT, and so these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(lambda: (recipe / "pid").exists())
        process = int((recipe / "pid").read_text())
        begun.send_signal(signal.SIGINT)
        assert begun.wait(60) != 0  # the trial itself would take 600
        wait_for(lambda: not alive(process))
    finally:
        begun.kill()
        begun.wait()


def wait_for(true: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
