"""Writes docs/hosts.md from matrix.json: which method runs on which host, and why not where it does not.

`python -m tests.conformance.matrix_page docs/hosts.md`; `make docs` calls it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MATRIX = Path(__file__).with_name("matrix.json")
HOSTS = {
    "bert": "BERT, classification", "vit": "ViT, classification", "gpt2": "GPT-2, language modelling",
    "llama": "Llama, language modelling", "clip": "CLIP, image-text contrast",
}  # fmt: skip
HEAD = """# Methods on hosts

Made from `tests/conformance/matrix.json` by `make docs`; do not edit by hand. Every cell is a test: where a method
runs, the conformance battery passes on a tiny model of that architecture; where it is refused, the command stops with
the reason below before work starts. A name that is not a method's own is a variant of its settings
(`tests/conformance/cases.py`). The refusals of `rwf`, `attention_pooler`, `derpp`, `pcr` and `feat_kd` are those of
language modelling: under a classification head they run on GPT-2 and Llama too.
"""


def page(matrix: dict[str, dict[str, str]]) -> str:
    """The page as Markdown; reasons are numbered, equal ones once."""
    reasons: list[str] = []
    lines = ["| method | " + " | ".join(HOSTS.values()) + " |", "|---" * (len(HOSTS) + 1) + "|"]
    for name, found in sorted(matrix.items()):
        cells = []
        for host in HOSTS:
            what = found[host]
            if what == "runs":
                cells.append("runs")
                continue
            reason = what.removeprefix("refused: ")
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"no ({reasons.index(reason) + 1})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", "Reasons, as the error message gives them:", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return HEAD + "\n" + "\n".join(lines) + "\n"


def read_matrix() -> dict[str, dict[str, str]]:
    return json.loads(MATRIX.read_text(encoding="utf-8"))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(read_matrix()), encoding="utf-8")
