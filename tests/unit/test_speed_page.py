"""The page of the speed files, and the time limit of a comparison."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks._page import render
from perdure.timing import LEAST, compare


def speed_file(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    ratio = {"against": "lora", "median": 1.25, "low": 1.2, "high": 1.31, "a_ms": 5.0, "b_ms": 4.0, "pairs": 8}
    data = {
        "schema": 1, "name": name, "machine": {"cpu": "one <fast> & cheap", "cores": 2}, "settings": {"rank": 8},
        "rows": [{**row, **ratio} for row in rows], "notes": ["a note"],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("sizes", [[10, 100], [10]])
def test_plots_and_every_row(tmp_path: Path, sizes: list[int]) -> None:
    speed_file(tmp_path, "step", [{"host": "minilm", "experiences": n, "what": "step"} for n in sizes])
    speed_file(tmp_path, "loop", [{"method": "lora", "per_step": {"reads": 1}}])
    page = render(tmp_path).read_text(encoding="utf-8")
    charts = re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert len(charts) == 1 and ElementTree.fromstring(charts[0]) is not None
    assert page.count("<tr>") == 2 + len(sizes) + 1 and page.count("<td>1.25</td>") == len(sizes) + 1
    assert "one &lt;fast&gt; &amp; cheap" in page and "per_step" not in page


def test_smoke_numbers_stay_out_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--smoke", "--folder", "results/speed"])
    assert "name a --folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--smoke", "--only", "startup", "loop"])
    assert "startup, loop has no tiny setting" in capsys.readouterr().err


def test_a_failed_benchmark_fails_the_command_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(command, "run", lambda name, *_: ran.append(name) or int(name == "atoms"))
    speed_file(tmp_path, "step", [{"host": "minilm", "what": "an odd row"}])
    with pytest.raises(SystemExit) as found:
        command.main(["--folder", str(tmp_path), "--only", "atoms", "patches"])
    assert found.value.code == 1 and "failed: atoms" in capsys.readouterr().err
    assert ran == ["atoms", "patches"] and (tmp_path / "index.html").exists()


def test_a_limit_of_time_keeps_a_median() -> None:
    slow = lambda: time.sleep(0.002)  # noqa: E731
    assert compare(slow, slow, pairs=50, seconds=0.0).pairs == LEAST
    assert compare(slow, slow, pairs=2, seconds=0.0).pairs == 2
    assert compare(slow, slow, pairs=5).pairs == 5


def test_the_page_in_the_results_is_that_of_its_files(tmp_path: Path) -> None:
    kept = Path(__file__).parents[2] / "results" / "speed"
    for file in kept.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fresh = render(tmp_path).read_text(encoding="utf-8")
    assert fresh == (kept / "index.html").read_text(encoding="utf-8"), "python -m benchmarks --page"
