"""Loads what another process saved and writes its logits: `python -m tests.conformance.fresh_process HOST FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from perdure.learner import Learner

from . import cases


def main() -> None:
    host, folder = sys.argv[1], Path(sys.argv[2])
    found, made = {}, cases.experiences(host, 10, rows=6)
    for kept in sorted(folder.iterdir()):
        learner = Learner.from_pretrained(kept, *cases.build_host(host))
        found[kept.name] = cases.outputs(learner, made)
    save_file(found, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
