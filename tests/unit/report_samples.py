"""Synthetic but complete reports for the tests of comparison, pages and tables."""

from __future__ import annotations

import random
from typing import Any

from perdure.report.build import build_report

NAMES = [
    "collections",
    "email",
    "asyncio",
    "http and urllib",
    "unittest",
    "xml",
    "ctypes",
    "json",
    "logging",
    "sqlite3",
]


def matrix(count: int, keep: float, learn: float, rng: random.Random) -> list[list[float | None]]:
    rows: list[list[float | None]] = []
    for i in range(count):
        row: list[float | None] = [None] * count
        for j in range(i + 1):
            row[j] = round(min(1.0, max(0.0, learn * keep ** (i - j) + rng.uniform(-0.02, 0.02))), 4)
        rows.append(row)
    return rows


def sample(
    arm: str = "moram", seed: int = 0, count: int = 5, keep: float = 0.97, learn: float = 0.9, **changes: Any
) -> Any:
    """A finished run of `count` experiences; `changes` replace arguments of `build_report`."""
    rng = random.Random(f"{arm}-{seed}")
    router = {
        f"{layer}.{role}": {
            "tokens": 1000.0,
            "new_share": round(rng.uniform(0.1, 0.9), 4),
            "off_rate": round(rng.uniform(0, 0.3), 4),
            "effective_atoms": round(rng.uniform(1, 7), 3),
        }
        for layer in range(6)
        for role in ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
    }
    loss = [[s, s // 40, round(1.2 / (1 + s % 40) ** 0.5 + rng.uniform(0, 0.1), 4)] for s in range(0, 40 * count, 2)]
    values: dict[str, Any] = {
        "name": arm,
        "method": "moram",
        "head": "cosine",
        "model": "minilm",
        "stream": "python-stdlib",
        "objective": "classification",
        "metric": "accuracy",
        "higher_is_better": True,
        "seed": seed,
        "protocol": {"task_id": "none", "boundaries": "train", "rehearsal": 0, "passes": 1, "mask": "current"},
        "training": {"learning_rate": 5e-4, "head_learning_rate": 3e-3, "per_device_train_batch_size": 32, "epochs": 1},
        "details": {
            "method": [
                {
                    "name": "moram",
                    "config": {"rank": 8, "top_k": 8, "tau": 0.03},
                    "title": "MoRAM",
                    "status": "unverified",
                }
            ],
            "head": {"cosine": {"scale": 16.0}},
            "router_history": [{"new_share": round(1 / (i + 1), 3), "off_rate": 0.01 * i} for i in range(count)],
            "model": {"hash": "53aa51172d142c89d9012cce15ae4d6c", "parameters": 22713216, "family": "bert"},
            "stream": {
                "scenario": "class_incremental",
                "hash": f"5f3c-{seed}",
                "experiences": [NAMES[j] if j < len(NAMES) else f"task {j + 1}" for j in range(count)],
                "classes": [[f"class {4 * j + c}" for c in range(4)] for j in range(count)],
            },
        },
        "matrix": matrix(count, keep, learn, rng),
        "baseline": None,
        "plasticity": {"feature_drift": 0.0031, "output_ratio": 0.042, "closed_share": 0.113},
        "cost": {
            "seconds": 61.0 + seed,
            "trainable_parameters": 590_000,
            "total_parameters": 23_300_000,
            "stored_bytes": 9_500_000,
            "steps": 200,
            "extra_passes": 0,
        },
        "curves": {"loss": loss},
        "router": router,
        "environment": {"python": "3.11.2", "torch": "2.13.0", "device": "cpu", "threads": 2},
        "status": "complete",
        "notes": ["Rates come from the first experience's validation rows."],
    }
    return build_report(**{**values, **changes})


def status(name: str, said: str) -> dict[str, Any]:
    details = sample().get("details")
    return {**details, "method": [{"name": name, "config": {}, "title": name, "status": said}]}


def arms(seeds: tuple[int, ...] = (0,), count: int = 5) -> dict[str, list[Any]]:
    """Six arms as in the demo, with an upper bound."""
    table = {
        "frozen + cosine": ("linear_probe", "cosine", 0.96, 0.74, 8_000, 40_000, 9.0, "unverified"),
        "frozen + ridge": ("linear_probe", "ridge", 0.985, 0.8, 0, 128_000_000, 7.0, "unverified"),
        "finetune": ("finetune", "cosine", 0.6, 0.9, 22_700_000, 90_800_000, 120.0, "unverified"),
        "lora": ("lora", "cosine", 0.62, 0.89, 590_000, 2_400_000, 80.0, "unverified"),
        "moram": ("moram", "cosine", 0.93, 0.85, 1_200_000, 9_500_000, 95.0, "unverified"),
        "moram, protected keys + ridge": ("moram", "ridge", 0.99, 0.86, 1_200_000, 138_000_000, 101.0, "unverified"),
        "joint": ("joint", "cosine", 1.0, 0.92, 22_700_000, 90_800_000, 300.0, "upper bound"),
    }
    result: dict[str, list[Any]] = {}
    for arm, (method, head, keep, learn, trainable, stored, seconds, said) in table.items():
        result[arm] = []
        for seed in seeds:
            one = sample(arm, seed, count, keep, learn, method=method, head=head)
            one["details"]["method"] = [{"name": method, "config": {"rank": 8}, "title": method, "status": said}]
            one["cost"].update(trainable_parameters=trainable, stored_bytes=stored, seconds=seconds + 3 * seed)
            result[arm].append(one)
    return result
