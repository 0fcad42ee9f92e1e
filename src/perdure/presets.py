"""Named pairs of methods and head, chosen wherever a method is: `method=ranpac`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """`settings` are the keys of a recipe's arm; `title` stands in lists, `details` in `perdure methods NAME`."""

    title: str
    details: str
    settings: dict[str, Any]


PRESETS = {
    "ranpac": Preset(
        "LoRA on the first experience only, then the ridge head on features that keep still",
        "RanPAC (McDonnell et al., NeurIPS 2023): the backbone is adapted to the first experience and frozen, random\n"
        "ReLU features and a closed-form ridge head learn all experiences, no row is stored.\n"
        "Deviations: LoRA where RanPAC takes a bottleneck adapter, SSF or prompts; features of unit norm; 2000 random\n"
        "features where RanPAC has 10,000 (head.ridge.features=10000); λ from another grid; as many epochs on the\n"
        "first experience as on the others, where RanPAC takes 20.",
        {"method": {"lora": {"first_only": True}}, "head": "ridge"},
    )
}
