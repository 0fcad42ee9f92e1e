"""All speed benchmarks, one after the other, with few pairs each, and one page of what they wrote.

    python -m benchmarks                     # 10.5 minutes on two idle cores, into runs/speed
    python -m benchmarks --only atoms step   # some of them
    python -m benchmarks --page --folder results/speed   # the page alone, from the files as they are
    python -m benchmarks --smoke --folder /tmp/speed     # tiny settings; the numbers mean nothing

Every benchmark is a process of its own, with one thread but for `startup`, and writes its file when it ends; the
command fails at the end if one of them did. The files that the documentation cites stand in results/speed and have more
pairs: they come from the single benchmarks, `python -m benchmarks.atoms`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from ._page import render

LIMITS = {  # options with which all of them stay well below a quarter of an hour
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
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"))
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--smoke", action="store_true", help=f"tiny settings of {', '.join(WITH_SMOKE)}")
    options = parser.parse_args(argv)
    if options.smoke and options.folder.parts[:1] == ("results",):
        parser.error("--smoke: its numbers mean nothing and must not stand in results/; name a --folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in options.only if not options.smoke or name in WITH_SMOKE]
    if not names:
        parser.error(f"--smoke: {', '.join(options.only)} has no tiny setting; those with one: {', '.join(WITH_SMOKE)}")
    codes = {} if options.page else {
        name: run(name, ["--smoke"] if options.smoke else LIMITS[name], options.folder) for name in names
    }  # fmt: skip
    failed = [name for name, code in codes.items() if code]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr, flush=True)
    print(f"written: {render(options.folder)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
