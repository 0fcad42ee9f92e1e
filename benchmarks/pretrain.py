"""Pretrains the small byte-level language model that the recipe lm/domains starts from: one domain, then it is frozen.

`python -m benchmarks.pretrain` writes runs/models/shakespeare-bytes (weights, tokenizer, facts.json with the
perplexity reached). The data folder is named by PERDURE_DATA. Two CPU cores: a few minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from perdure.learner import Learner
from perdure.models import load_model
from perdure.streams import build_stream

from ._harness import tell

MODEL = {"scratch": {"family": "gpt2", "layers": 4, "width": 128, "heads": 4, "max_length": 256, "seed": 0}}
FOLDER = Path("runs/models/shakespeare-bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--characters", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    stream = build_stream(
        {
            "source": ["shakespeare", "kjv_bible"], "scenario": "domain_incremental", "text_unit": "blocks",
            "block_chars": 255, "max_chars": options.characters,
        },
        0,
    )  # fmt: skip
    model, processor, _ = load_model(MODEL, "causal_lm")
    learner = Learner(
        model, processor, method="finetune", objective={"causal_lm": {"block_size": 256}},
        training={
            "learning_rate": 2e-3, "lr_scheduler": "cosine", "warmup_steps": 50, "epochs": options.epochs,
            "per_device_train_batch_size": 16, "weight_decay": 0.1, "adam_beta2": 0.99,
        },
    )  # fmt: skip
    started = time.perf_counter()

    experience = stream.experience(0)
    learner.learn(experience, on_step=tell)
    facts = {
        "characters": sum(len(row["text"]) for row in experience.train), "epochs": options.epochs,
        "valid_perplexity": learner.evaluate([experience], split="valid")[0],
        "seconds": round(time.perf_counter() - started, 1), "threads": torch.get_num_threads(),
        "pretraining": {"data": "training text of shakespeare, as bytes", "seen": ["shakespeare"]},
    }  # fmt: skip
    options.folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.folder)
    processor.save_pretrained(options.folder)
    (options.folder / "facts.json").write_text(json.dumps(facts, indent=1))
    print(facts)


if __name__ == "__main__":
    main()
