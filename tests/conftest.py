"""Settings of all tests. Imports no torch: a test that needs none must start fast."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("perdure", deadline=None)  # no test asserts wall time
settings.load_profile("perdure")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
if not os.environ.get("PERDURE_DATA") and (DATA / "MANIFEST.json").is_file():
    os.environ["PERDURE_DATA"] = str(DATA)

# Tiny tensors: a second thread only costs. Set before torch is imported, and for subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when triton is imported, by whoever does it first.
os.environ.setdefault("TRITON_INTERPRET", "1")


def has_data() -> bool:
    folder = os.environ.get("PERDURE_DATA")
    return bool(folder) and (Path(folder or "") / "MANIFEST.json").is_file()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs_data: reads the data sets of PERDURE_DATA; skipped without them, a failure where CI=true"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_data") is None or has_data():
        return
    reason = "NO DATA: set PERDURE_DATA to the folder that holds MANIFEST.json; this test checked nothing"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "NO DATA" in str(r.longrepr)]
    if skipped:
        line = f"{len(skipped)} tests of real data were SKIPPED: set PERDURE_DATA to the folder with MANIFEST.json"
        terminalreporter.write_line(line, red=True, bold=True)
