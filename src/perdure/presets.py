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
    "auto": Preset(
        "Adapter, head and rates that did best on validation rows of streams of the same kind",
        "Chosen from the ledger by objective, modality and scenario, among what the protocol grants; docs/auto.md\n"
        "holds the figures. The first line of a run says what was taken and why.",
        {},
    ),
    "ranpac": Preset(
        "LoRA on the first experience only, then the ridge head on features that keep still",
        "RanPAC (McDonnell et al., NeurIPS 2023): the backbone is adapted to the first experience and frozen, random\n"
        "ReLU features and a closed-form ridge head learn all experiences, no row is stored.\n"
        "Deviations: LoRA where RanPAC takes a bottleneck adapter, SSF or prompts; features of unit norm; 2000 random\n"
        "features where RanPAC has 10,000 (head.ridge.features=10000); λ from 1e-2 to 1e4, walked downhill, judged\n"
        "with the sums of all experiences, where the released code searches 1e-8 to 1e8 with the current one's;\n"
        "the recipe's optimizer, where RanPAC has SGD on a cosine; as many epochs on the first experience as on the\n"
        "others, where RanPAC takes 20.",
        {"method": {"lora": {"first_only": True}}, "head": "ridge"},
    ),
    "simple_cil": Preset(
        "Frozen features and the nearest class mean by cosine",
        "SimpleCIL (Zhou et al. 2023, arXiv 2303.07338): the mean of a class's frozen features is its weight in a\n"
        "cosine classifier. Nothing trains, one pass. Deviation: counts are kept, so that a class may come again.",
        {"method": "linear_probe", "head": {"ncm": {"metric": "cosine"}}},
    ),
    "slda": Preset(
        "Frozen features and streaming linear discriminant analysis",
        "Deep SLDA (Hayes & Kanan 2020, arXiv 1909.01520): class means and one covariance over frozen features, one\n"
        "pass. Deviations: no base phase; the covariance is that of the batch LDA (head.slda.covariance=published has\n"
        "the paper's update).",
        {"method": "linear_probe", "head": "slda"},
    ),
    "slca": Preset(
        "Full fine-tuning at a low rate under a linear head that is aligned after each experience",
        "SLCA (Zhang et al., ICCV 2023, arXiv 2303.05118): the backbone learns a hundred times slower than the head,\n"
        "which is then aligned on features drawn from class Gaussians.\n"
        "Deviations: the rates are ours, for AdamW, and only their ratio is the paper's, which has SGD with momentum\n"
        "at 1e-4 and 0.01, on steps; as many epochs as the recipe says, where SLCA takes 20.",
        {
            "method": "finetune",
            "head": "slca",
            "training": {"learning_rate": 1e-5, "head_learning_rate": 1e-3},
        },
    ),
}
