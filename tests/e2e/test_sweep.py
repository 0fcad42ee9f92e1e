"""The real command line with processes of its own, one of which is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from perdure import yamltext

from .nursery import SOURCE
from .tiny import rows, settings, write_rows

OWN = """
import os
import signal

from perdure.config import MethodConfig
from perdure.methods import Method, register


@register("fragile")
class Fragile(Method):
    '''Ends its process, as a system without memory does.'''

    class Config(MethodConfig):
        bomb: bool = False

    def before_experience(self, experience):
        if self.config.bomb:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_sweep_from_the_command_line_survives_a_killed_process(tmp_path: Path) -> None:
    made = settings(tmp_path)
    made["stream"]["source"]["valid"] = str(
        write_rows(tmp_path / "valid.jsonl", [row for kind in range(6) for row in rows(f"kind{kind}", 2, 2)])
    )
    made["arms"] = {"fragile": {"method": "fragile"}}
    made["method"] = "finetune"
    path = tmp_path / "tiny.yaml"
    path.write_text("# mine\n" + yamltext.dump(made), encoding="utf-8")
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "perdure", "sweep", "tiny.yaml", "--import", "own.py", "--experiences", "1",
         "--grid", "method.fragile.bomb=true,false", "--processes", "2", "--write"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SOURCE}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "runs/tiny/sweep/sweep.json"
    table = json.loads((tmp_path / "runs/tiny/sweep/sweep.json").read_text(encoding="utf-8"))
    bomb, calm = table["fragile"]["trials"]
    assert bomb["failed"] == "the process ended with SIGKILL (out of memory?)" and calm == table["fragile"]["best"]
    assert "fragile: 1 of 2 trials failed" in done.stdout and "[2/2]" in done.stderr
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# mine\n") and yamltext.load(text, "x")["tuning"]["failed"] == {"fragile": 1}
    assert yamltext.load(text, "x")["arms"]["fragile"] == {"method": {"fragile": {"bomb": False}}}
