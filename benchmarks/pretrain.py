"""Pretrains the small byte-level language models that the recipes of lm/ start from: one corpus, then they adapt.

`python -m benchmarks.pretrain` writes runs/models/shakespeare-bytes (weights, tokenizer, facts.json with the
perplexity reached), with `--apn` runs/models/apn-bytes (a folder of `save_pretrained`, facts.json): the same model with
patches for feed-forwards, trained in the same way. The data folder is named by PERDURE_DATA. Two CPU cores: minutes.
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
FOLDERS = {False: Path("runs/models/shakespeare-bytes"), True: Path("runs/models/apn-bytes")}
APN = {"place": "replace", "patches": 64, "rank": 16, "train": "all", "train_code": True, "row_wise": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--characters", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--apn", action="store_true", help="patches in place of the feed-forwards")
    options = parser.parse_args()
    folder = options.folder or FOLDERS[options.apn]
    stream = build_stream(
        {
            "source": ["shakespeare", "kjv_bible"], "scenario": "domain_incremental", "text_unit": "blocks",
            "block_chars": 255, "max_chars": options.characters,
        },
        0,
    )  # fmt: skip
    model, processor, _ = load_model(MODEL, "causal_lm")
    learner = Learner(
        model, processor, method={"apn": APN} if options.apn else "finetune",
        objective={"causal_lm": {"block_size": 256}},
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
    folder.mkdir(parents=True, exist_ok=True)
    if options.apn:
        learner.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    print(facts)


if __name__ == "__main__":
    main()
