"""Processes side by side: how many, what is told of their ends, and that none outlives an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perdure import processes
from perdure.processes import Job, Processes


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "PAUSE", 0.01)


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, ("-S", "-c", code), folder / "logs" / f"{name}.log")


def test_every_job_runs_and_its_end_is_told(tmp_path):
    jobs = [job(tmp_path, f"exit-{code}", f"print('here'); raise SystemExit({code})") for code in (0, 3)]
    jobs.append(job(tmp_path, "killed", f"import os; os.kill(os.getpid(), {signal.SIGKILL.value})"))
    more = job(tmp_path, "more", "import os, sys; print(os.environ['OMP_NUM_THREADS'], file=sys.stderr)")
    told: dict[str, int] = {}

    def finished(each: Job, code: int) -> list[Job]:
        told[each.name] = code
        return [more] if each.name == "killed" else []

    ticks: list[int] = []
    Processes(2).run(jobs, finished, lambda: ticks.append(1))
    assert told == {"exit-0": 0, "exit-3": 3, "killed": -signal.SIGKILL, "more": 0} and ticks
    assert jobs[0].log.read_text() == "here\n" and more.log.read_text() == "1\n"


def test_no_more_run_at_a_time_than_are_allowed(tmp_path):
    """Each job counts those that are there while it is."""
    code = (
        "import os, time\n"
        f"mine = os.path.join({str(tmp_path)!r}, f'here-{{os.getpid()}}')\n"
        "open(mine, 'w').close()\ntime.sleep(0.1)\n"
        f"print(sum(name.startswith('here-') for name in os.listdir({str(tmp_path)!r})))\n"
        "os.unlink(mine)\n"
    )
    jobs = [job(tmp_path, str(number), code) for number in range(6)]
    Processes(2).run(jobs, lambda each, code: [])
    assert {int(each.log.read_text()) for each in jobs} <= {1, 2}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(path: Path) -> int:
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.01)
    return int(path.read_text())


LISTENS = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""What a shell starts in the background ignores Ctrl-C, and so do its children."""
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def test_an_error_ends_what_runs(tmp_path):
    sleeper = job(tmp_path, "sleeper", SLEEPS)
    other = job(tmp_path, "other", "")

    def finished(each: Job, code: int) -> list[Job]:
        wait_for(sleeper.log)
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        Processes(2).run([sleeper, other], finished)
    assert not alive(wait_for(sleeper.log))


def test_ctrl_c_reaches_a_process_once_so_that_it_can_save(tmp_path):
    saves = (
        f"{LISTENS}import os, sys, time\nseen = 0\nprint(os.getpid(), flush=True)\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n"
        f"    time.sleep(0.2); open({str(tmp_path / 'saved')!r}, 'w').close()\n"
    )
    saver = job(tmp_path, "saver", saves)
    code = (
        f"{LISTENS}from pathlib import Path\nfrom perdure.processes import Job, Processes\n"
        f"Processes(1).run([Job('saver', {saver.arguments!r}, Path({str(saver.log)!r}))], lambda job, code: [])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, process_group=0)
    pid = wait_for(saver.log)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    parent.communicate(timeout=120)
    assert parent.returncode and (tmp_path / "saved").exists() and not alive(pid)
