"""A stream, recipes and comparisons of runs that the end-to-end tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perdure import yamltext
from perdure.state import StateStore

WORDS = ["ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew"]
MODEL = {"scratch": {"family": "bert", "layers": 1, "width": 16, "heads": 2, "ffn_width": 32, "max_length": 32}}
MORAM = {"rank": 2, "top_k": 2, "targets": "attention", "dropout": 0.1}
APN = {"patches": 6, "top_k": 2, "rank": 3}
# name -> (method, head); those that end in -lm learn language under a change of domain, those in -clip images by the
# texts of their classes, those in -growing are not told where an experience begins
ARMS: dict[str, tuple[Any, Any]] = {
    "finetune": ("finetune", "cosine"),
    "linear_probe": ("linear_probe", "cosine"),
    "linear_probe+ridge": ("linear_probe", {"ridge": {"features": 32}}),
    "linear_probe+slda": ("linear_probe", "slda"),
    "lora": ({"lora": {"rank": 2, "dropout": 0.1}}, "linear"),
    "lora+ncm": ({"lora": {"rank": 2, "dropout": 0.1}}, {"ncm": {"recentre": {"rows": 8}}}),
    "lora+slca": ({"lora": {"rank": 2, "dropout": 0.1}}, {"slca": {"samples": 8, "recentre": {}}}),
    "lora+er+slda": (
        [{"lora": {"rank": 2}}, {"er": {"budget": 9, "per_step": 3}}],
        {"slda": {"recentre": {}, "refresh": True}},
    ),
    "lora-protected": ({"lora": {"rank": 2, "dropout": 0.1, "protect": {"inputs": 0.5}}}, "cosine"),
    "seta": ({"seta": {"density": 0.1, "gate_layer": 0, "smallest": 2, "draws": 4}}, "cosine"),
    "lora+ewc": ([{"lora": {"rank": 2, "dropout": 0.1}}, {"ewc": {"strength": 10.0, "rows": 6}}], "cosine"),
    "l2_anchor": ({"l2_anchor": {"strength": 0.1, "where": "attention", "head": True}}, "cosine"),
    "lwf": ("lwf", "linear"),
    "lwf-lm": ([{"lora": {"rank": 2}}, "lwf"], None),
    "feat_kd": ([{"lora": {"rank": 2, "dropout": 0.1}}, "feat_kd"], "cosine"),
    "joint": ([{"lora": {"rank": 2}}, "joint"], "cosine"),
    "er": ({"er": {"budget": 9, "per_step": 3}}, "cosine"),
    "agem": ({"agem": {"budget": 9, "per_step": 3}}, "cosine"),
    "derpp": ({"derpp": {"budget": 9, "per_step": 3}}, "linear"),
    "moe_adapters": ({"moe_adapters": {"experts": 4, "rank": 2, "freeze": 1}}, "cosine"),
    "moe_adapters-lm": ({"moe_adapters": {"rank": 2}}, None),
    "pcr": ({"pcr": {"budget": 9, "per_step": 3, "holistic": {}}}, "cosine"),
    "moram": ({"moram": MORAM}, "cosine"),
    "moram-growing": ({"moram": {**MORAM, "grow_every": 4}}, "cosine"),
    "moram-protected+ridge": ({"moram": {**MORAM, "protect": {"inputs": 0.5}}}, {"ridge": {"features": 32}}),
    "moram+er": ([{"moram": MORAM}, {"er": {"budget": 9, "per_step": 3}}], "cosine"),
    "apn": ({"apn": {**APN, "dropout": 0.1}}, "cosine"),
    "apn-lm": ({"apn": {**APN, "place": "replace", "pretrain": {"learning_rate": 5e-3}}}, None),
    "codyra": ({"codyra": {"rank": 3, "threshold": 0.3}}, "cosine"),
    "random_prune": ({"random_prune": {"rank": 3, "kept_rank": 1.5}}, "cosine"),
    "olora": ({"olora": {"rank": 2, "alpha": 4.0, "lambda2": 0.01, "targets": "attention"}}, "cosine"),
    "inflora": ({"inflora": {"rank": 2, "energy": 0.8, "experiences": 3}}, "cosine"),
    "sd_lora": ({"sd_lora": {"rank": 2}}, "cosine"),
    "merge_lora": ({"merge_lora": {"rank": 2, "dropout": 0.1}}, "cosine"),
    "tree_lora": ({"tree_lora": {"rank": 2, "alpha": 4.0}}, "cosine"),
    "rwf": ({"rwf": {"length": 2}}, "cosine"),
    "attention_pooler": ({"attention_pooler": {"length": 2, "units": 2}}, "cosine"),
    "static_prompts-lm": ({"static_prompts": {"length": 2}}, None),
    "single_prompt": ({"single_prompt": {"length": 2}}, "cosine"),
    "l2p": ({"l2p": {"size": 4, "length": 2, "top_n": 2}}, "cosine"),
    "dual_prompt": ({"dual_prompt": {"general_layers": [], "expert_length": 2, "expert_layers": [0]}}, "cosine"),
    "coda_prompt-lm": ({"coda_prompt": {"components": 2, "length": 4, "prompt_tokens": 4}}, None),
    "frozen-lm": ("frozen", None),
    "moram-lm": ({"moram": MORAM}, None),
    "moram-clip": ({"moram": MORAM}, None),
}
PROBED = ("moram+er", "moram-lm")
"""Arms that are scored between the boundaries too."""


def rows(label: str, number: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(f"{label}/{seed}")
    return [
        {"text": " ".join([label[:3], *draw.choices(WORDS, k=4), label[3:]]), "label": label} for _ in range(number)
    ]


def write_rows(path: Path, every: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in every), encoding="utf-8")
    return path


def write_stream(folder: Path, classes: int = 6, train: int = 10, test: int = 4) -> dict[str, Any]:
    """Two files of rows, and the `stream` block that reads them, two classes to an experience."""
    labels = [f"kind{number}" for number in range(classes)]
    for name, number, seed in (("train", train, 0), ("test", test, 1)):
        write_rows(folder / f"{name}.jsonl", [row for label in labels for row in rows(label, number, seed)])
    source = {"path": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    return {"source": source, "experiences": classes // 2}


def settings(folder: Path, method: Any = "moram", head: Any = None, **changes: Any) -> dict[str, Any]:
    """A recipe in which every random draw takes part: dropout, growth, rehearsal, shuffling."""
    made: dict[str, Any] = {
        "name": "tiny",
        "model": {"scratch": {**MODEL["scratch"], "dropout": 0.1}},
        "stream": write_stream(folder),
        "objective": {"classification": {"max_length": 32}},
        "method": method,
        "head": head,
        "training": {
            "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 2,
            "num_threads": 1, "lr_scheduler": "cosine",
        },
        "protocol": {"rehearsal": 9, "evaluate": "seen_and_next"},
    }  # fmt: skip
    for key, value in changes.items():
        made[key] = {**made[key], **value} if key in ("training", "protocol") else value
    return made


def write_recipe(folder: Path, method: Any = "moram", head: Any = None, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yamltext.dump(settings(folder, method, head, **changes)), encoding="utf-8")
    return path


def language(folder: Path) -> dict[str, Any]:
    """Changes to `settings` for language modelling: two domains, each in files of its own."""
    sources = []
    for domain in range(2):
        for name, number in (("train", 18), ("test", 4)):
            every = [{"text": row["text"]} for row in rows(f"domain{domain}", number, len(name))]
            write_rows(folder / f"{name}{domain}.jsonl", every)
        sources.append({"path": str(folder / f"train{domain}.jsonl"), "test": str(folder / f"test{domain}.jsonl")})
    model = {**MODEL["scratch"], "family": "gpt2", "dropout": 0.1}
    return {
        "model": {"scratch": model}, "stream": {"source": sources, "scenario": "domain_incremental"},
        "objective": {"causal_lm": {"block_size": 32}},
    }  # fmt: skip


def images(folder: Path) -> dict[str, Any]:
    """Changes to `settings` for CLIP: coloured pictures of six classes, classified among all that are declared."""
    draw, arrays = np.random.default_rng(0), {}
    for split, number in (("train", 10), ("test", 4)):
        y = np.repeat(np.arange(6), number)
        x = draw.integers(0, 90, (len(y), 8, 8, 3))
        x[np.arange(len(y)), :, :, y % 3] += 60 + 40 * (y[:, None, None] // 3)
        arrays |= {f"x_{split}": x.astype(np.uint8), f"y_{split}": y}
    np.savez(folder / "pictures.npz", class_names=np.array([f"kind{n}" for n in range(6)]), **arrays)
    model = {**MODEL["scratch"], "family": "clip", "dropout": 0.1, "image_size": 8, "patch_size": 4}
    return {
        "model": {"scratch": model}, "stream": {"source": str(folder / "pictures.npz"), "experiences": 3},
        "objective": {"image_text": {"max_length": 32}}, "protocol": {"label_space": "declared", "evaluate": "all"},
    }  # fmt: skip


def write_arm(folder: Path, arm: str) -> Path:
    """The recipe of one of `ARMS`."""
    changes = language(folder) if arm.endswith("-lm") else images(folder) if arm.endswith("-clip") else {}
    if arm.endswith("-growing"):
        changes |= {"protocol": {"boundaries": "none"}, "training": {"lr_scheduler": "constant"}}
    if arm in PROBED:
        changes["protocol"] = {**changes.get("protocol", {}), "probe": {"every": 2, "rows": 3}}
    return write_recipe(folder, *ARMS[arm], **changes)


# ---- what a run left
def without_times(value: Any) -> Any:
    """All but seconds and the environment."""
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if k not in ("environment", "probe_share") and not k.endswith("seconds")
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def newest(run: Path) -> tuple[dict[str, torch.Tensor], Any]:
    state = StateStore(run / "state").load()
    return state.tensors, without_times(state.values)


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not have in common, bit for bit; times and environment do not count."""
    (a, x), (b, y) = newest(one), newest(other)
    found = [f"tensor {name}" for name in sorted(a.keys() ^ b.keys())]
    found += [f"tensor {n}" for n in sorted(a.keys() & b.keys()) if not same_bytes(a[n], b[n])]
    found += [f"value {name}" for name in sorted(x.keys() | y.keys()) if x.get(name) != y.get(name)]
    first, second = without_times(report(one)), without_times(report(other))
    found += [f"report {name}" for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    lines = [(run / "losses.jsonl").read_bytes() if (run / "losses.jsonl").exists() else None for run in (one, other)]
    return found + ([] if lines[0] == lines[1] else ["losses.jsonl"])


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
