"""All speed benchmarks, one after the other, with fewer pairs each, and a page of what results/speed/ holds.

    python -m benchmarks                     # about 15 minutes on two idle cores
    python -m benchmarks --only atoms step   # some of them
    python -m benchmarks --page              # the page alone, from the files as they are
    python -m benchmarks --smoke --folder /tmp/speed     # tiny settings; the numbers mean nothing

Every benchmark is a process of its own with one thread. Each writes its file when it ends, so what was measured stays;
the command fails at the end if one of them did. A single benchmark with more pairs: `python -m benchmarks.atoms`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from ._page import render

LIMITS = {  # options that keep all of them within a quarter of an hour
    "startup": ["--rounds", "3"],
    "atoms": ["--pairs", "6", "--seconds", "4", "--widths", "768"],
    "patches": ["--pairs", "8", "--seconds", "4"],
    "step": ["--pairs", "5", "--seconds", "8", "--hosts", "minilm"],
    "experts": ["--pairs", "5", "--seconds", "8", "--hosts", "minilm", "--tasks", "1", "4"],
    "prompts": ["--pairs", "5", "--seconds", "6", "--batch", "2"],
    "loop": ["--pairs", "12"],
}
WITH_SMOKE = ("atoms", "patches", "step", "experts", "prompts")


def run(name: str, options: list[str], folder: Path) -> int:
    threads = [] if name == "startup" else ["--threads", "1"]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, *threads, "--output", str(folder / f"{name}.json")]
    start = time.monotonic()
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    print(f"== {name}: {time.monotonic() - start:.0f} s, exit {code}", flush=True)
    return code


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--folder", type=Path, default=Path("results/speed"))
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--smoke", action="store_true", help=f"tiny settings of {', '.join(WITH_SMOKE)}")
    options = parser.parse_args(argv)
    if options.smoke and options.folder == Path("results/speed"):
        parser.error("--smoke: its numbers mean nothing and must not stand in results/speed; name a --folder")
    names = [name for name in options.only if not options.smoke or name in WITH_SMOKE]
    codes = {} if options.page else {
        name: run(name, ["--smoke"] if options.smoke else LIMITS[name], options.folder) for name in names
    }  # fmt: skip
    print(f"written: {render(options.folder)}")
    failed = [name for name, code in codes.items() if code]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
