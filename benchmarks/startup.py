"""Processor time of starting: `perdure --help` and `perdure methods` against importing pydantic and typer.

    python -m benchmarks.startup             # 30 interleaved rounds
    python -m benchmarks.startup --rounds 3  # seconds; the numbers mean little

Every command is a fresh process; its user and system seconds are added. Bytecode is cached as in an installed package,
in a folder of its own that a first round fills. Ratios are command / `python -c 'import pydantic, typer'`, round by
round. The bar is 2, and none of torch, transformers and accelerate may be loaded.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ._harness import Ratio, bootstrap_median, row, write

HEAVY = ("torch", "transformers", "accelerate")
BAR = 2.0
BASE = "import pydantic, typer"
COMMANDS = {"perdure --help": ["--help"], "perdure methods": ["methods"]}
LOADED = """
import sys
from perdure.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
print(*[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def seconds(arguments: list[str], variables: dict[str, str]) -> float:
    """User and system seconds of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, env=variables)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def heavy(arguments: list[str]) -> list[str]:
    """Which of the heavy libraries the command has loaded at its end."""
    code = LOADED.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.split()


def measure(rounds: int) -> list[dict[str, Any]]:
    entry = "from perdure.cli import main; main()"
    programs = {"base": ["-c", BASE]} | {name: ["-c", entry, *given] for name, given in COMMANDS.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        variables["PYTHONPYCACHEPREFIX"] = folder
        for number in range(rounds + 1):
            for name, arguments in programs.items():
                spent = seconds(arguments, variables)
                if number:  # the first round fills the bytecode cache
                    times[name].append(spent)
    rows = []
    for name, given in COMMANDS.items():
        ratios = [a / b for a, b in zip(times[name], times["base"], strict=True)]
        low, high = bootstrap_median(ratios)
        a, b = (1e3 * statistics.median(times[key]) for key in (name, "base"))
        found = row({"command": name}, BASE, Ratio(statistics.median(ratios), low, high, a, b, rounds))
        rows.append({**found, "heavy": heavy(given)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results/speed/startup.json"))
    options = parser.parse_args()
    rows = measure(options.rounds)
    print(f"{'command':<18} {'ratio':>6}  {'95 % interval':<16} {'ms':>7} {'base ms':>8}  heavy libraries")
    for found in rows:
        print(
            f"{found['command']:<18} {found['median']:>6.2f}  {found['low']:.2f} to {found['high']:<8.2f} "
            f"{found['a_ms']:>7.0f} {found['b_ms']:>8.0f}  {', '.join(found['heavy']) or 'none'}"
        )
    notes = ["milliseconds of processor time, user and system, not of the clock"]
    write(options.out, "startup", {"rounds": options.rounds, "base": BASE, "bar": BAR}, rows, notes)


if __name__ == "__main__":
    main()
