"""Do perdure's metrics agree with independent implementations? Random predictions, both sides, one file.

python -m benchmarks.agreement [--environment FOLDER] [--out results/agreement.json]

Makes a virtual environment of its own with avalanche-lib, scikit-learn and SciPy, has them compute the figures there,
and compares. `tests/golden/test_agreement.py` holds perdure against the file that is written.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from perdure.evaluation import metrics
from perdure.evaluation.classes import class_table, count_classes
from perdure.evaluation.compare import interval, paired_difference

INSTALL = (
    ["torch==2.13.0", "numpy", "scipy", "scikit-learn", "tqdm", "dill", "packaging", "pillow"],
    ["--no-deps", "avalanche-lib==0.6.0"],
)
PEERS = Path(__file__).with_name("agreement_peers.py")
TOLERANCE = 1e-9


def inputs(seed: int = 0) -> dict[str, Any]:
    """Streams of 2 to 7 experiences of three classes with their predictions after each experience, and paired seeds."""
    draw = random.Random(seed)
    streams = []
    for count in (2, 3, 5, 7):
        labels = [[draw.choice(range(3 * j, 3 * j + 3)) for _ in range(20)] for j in range(count)]

        def predicted(skill: float, labels: list[list[int]] = labels, count: int = count) -> list[list[int]]:
            return [[y if draw.random() < skill else draw.randrange(3 * count) for y in each] for each in labels]

        after = [predicted(draw.uniform(0.2, 0.9)) for _ in range(count)]
        streams.append({"labels": labels, "predicted": after, "untrained": predicted(0.0)})
    pairs = [
        {side: [round(draw.gauss(0.7, 0.05), 6) for _ in range(n)] for side in ("arm", "reference")} for n in (3, 5, 10)
    ]
    return {"seed": seed, "streams": streams, "pairs": pairs}


def differences(given: dict[str, Any], peers: dict[str, Any]) -> dict[str, float]:
    """Figure -> the largest distance between perdure and a peer over all inputs."""
    found: dict[str, float] = {}

    def note(name: str, ours: float | None, theirs: float) -> None:
        distance = math.inf if ours is None else abs(ours - theirs)
        found[name] = max(found.get(name, 0.0), distance)

    for stream, avalanche, sklearn in zip(given["streams"], peers["avalanche"], peers["sklearn"], strict=True):
        _matrix(stream, avalanche, sklearn, note)
        _classes(stream, avalanche, sklearn, note)
    for pair, scipy in zip(given["pairs"], peers["scipy"], strict=True):
        alone = interval(pair["arm"])
        both = paired_difference(dict(enumerate(pair["arm"])), dict(enumerate(pair["reference"]))) or {}
        for end, one, other in zip(("low", "high"), scipy["interval"], scipy["paired"], strict=True):
            note("scipy: interval", alone[end], one)
            note("scipy: interval of the paired difference", both.get(end), other)
    return found


def _matrix(stream: dict[str, Any], avalanche: dict[str, Any], sklearn: dict[str, Any], note: Any) -> None:
    labels = stream["labels"]
    R = [[_share(after[j], labels[j]) for j in range(len(labels))] for after in stream["predicted"]]
    for name, cells in (("avalanche: cells of R", avalanche["R"]), ("scikit-learn: cells of R", sklearn["R"])):
        for i, j in ((i, j) for i in range(len(R)) for j in range(len(R))):
            note(name, R[i][j], cells[i][j])
    figures = metrics.summary(R, baseline=[_share(p, y) for p, y in zip(stream["untrained"], labels, strict=True)])
    for name in ("average_accuracy", "backward_transfer", "forward_transfer"):
        note(f"avalanche: {name}", figures[name], avalanche[name])
    # What avalanche calls forgetting is counted from the score just learnt: backward transfer with the other sign.
    note(
        "avalanche: forgetting since learnt", -(figures["backward_transfer"] or 0), avalanche["forgetting_since_learnt"]
    )
    names = (
        "forgetting",
        "average_incremental_accuracy",
        "learning_accuracy",
        "worst_experience",
        "transfer",
        "average",
    )
    for name in names:
        note(f"NumPy: {name}", figures[name], sklearn[name])


def _classes(stream: dict[str, Any], avalanche: dict[str, Any], sklearn: dict[str, Any], note: Any) -> None:
    history = []
    for i, after in enumerate(stream["predicted"]):
        counts: dict[str, list[int]] = {}
        for guess, truth in zip(after[: i + 1], stream["labels"], strict=False):
            count_classes(counts, [{"label": y} for y in truth], [p == y for p, y in zip(guess, truth, strict=True)])
        history.append(counts)
    for row in class_table(history):
        theirs = [found.get(row["name"]) for found in sklearn["by_class"]]
        for ours, other in zip(row["scores"], theirs, strict=True):
            if other is not None or ours is not None:
                note("scikit-learn: accuracy by class", ours, math.inf if other is None else other)
        known = [score for score in theirs if score is not None]
        if len(known) > 1:
            note("scikit-learn: forgetting by class", row["forgetting"], max(known[:-1]) - known[-1])
        note("avalanche: last accuracy by class", row["scores"][-1], avalanche["last_by_class"][row["name"]])


def _share(guess: list[int], truth: list[int]) -> float:
    return sum(p == y for p, y in zip(guess, truth, strict=True)) / len(truth)


def environment(folder: Path) -> Path:
    """The python of a virtual environment with the peers; made where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for packages in INSTALL:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, help="folder of the environment, kept; a temporary one when absent")
    parser.add_argument("--out", type=Path, default=Path("results/agreement.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        python = environment(options.environment or Path(spare) / "environment")
        given, read, write = inputs(), Path(spare) / "inputs.json", Path(spare) / "outputs.json"
        read.write_text(json.dumps(given), encoding="utf-8")
        subprocess.run([str(python), str(PEERS), str(read), str(write)], check=True)
        peers = json.loads(write.read_text(encoding="utf-8"))
    found = differences(given, peers)
    for name, distance in found.items():
        print(f"{'ok' if distance <= TOLERANCE else 'DIFFERS'}  {distance:.1e}  {name}")
    kept = {"versions": peers.pop("versions"), "largest_difference": found, "inputs": given, "peers": peers}
    options.out.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
    return 0 if max(found.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
