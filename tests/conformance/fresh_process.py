"""Loads what another process saved and writes its logits: `python -m tests.conformance.fresh_process FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from perdure.learner import Learner

from . import cases


def main() -> None:
    found = {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        host = folder.name.split("@")[1]
        learner = Learner.from_pretrained(folder, *cases.build_host(host))
        found[folder.name] = cases.outputs(learner, cases.experiences(host, 10, rows=6))
    save_file(found, Path(sys.argv[1]) / "logits.safetensors")


if __name__ == "__main__":
    main()
