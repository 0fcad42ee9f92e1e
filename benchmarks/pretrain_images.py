"""Pretrains the small ViT that the recipe vision/rwf-cifar100 starts from, on 100 classes of Tiny ImageNet at 32 x 32.

`python -m benchmarks.pretrain_images` writes runs/models/vit-tiny-imagenet (weights, preprocessor_config.json,
facts.json). The data folder is named by PERDURE_DATA. `--probe` trains nothing: it measures what the frozen features
are worth on CIFAR-100, all classes at once, with the closed-form head, against the floor that was fixed before any arm
was run.
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

FOLDER = Path("runs/models/vit-tiny-imagenet")
FLOOR = 0.30
"""Accuracy of the joint probe on CIFAR-100 below which a backbone is called weak."""
SAME = {
    "aquarium_fish": "goldfish", "bear": "brown bear", "beetle": "ladybug", "bottle": "pop bottle",
    "bridge": "steel arch bridge, suspension bridge", "bus": "school bus", "butterfly": "monarch",
    "camel": "Arabian camel", "chair": "rocking chair", "cockroach": "cockroach", "keyboard": "computer keyboard",
    "lobster": "American lobster", "orange": "orange", "snake": "boa constrictor", "spider": "black widow",
    "table": "dining table",
}  # fmt: skip
"""Classes of CIFAR-100 of which Tiny ImageNet's 100 hold the same thing or a kind of it."""


def stream_of(source: str, **settings: object):
    """The whole data set as one experience."""
    return build_stream({"source": source, "scenario": "class_incremental", "experiences": 1, **settings}, 0)


def pretrain(options: argparse.Namespace) -> dict[str, object]:
    vit = {"family": "vit", "layers": options.layers, "width": options.width, "heads": 4, "image_size": 32}
    model, processor, _ = load_model({"scratch": {**vit, "patch_size": 4, "seed": 0}}, "classification")
    learner = Learner(
        model, processor, method="finetune", head="linear",
        objective={"classification": {"augment": "flip_crop"}},
        training={
            "learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_steps": 200, "epochs": options.epochs,
            "per_device_train_batch_size": 64, "weight_decay": 0.05,
        },
    )  # fmt: skip
    experience = stream_of("tiny_imagenet_100c").experience(0)
    started = time.perf_counter()

    learner.learn(experience, on_step=tell)
    facts = {
        "images": len(experience.train), "epochs": options.epochs, "layers": options.layers, "width": options.width,
        "test_accuracy": learner.evaluate([experience])[0], "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    learner.detach()
    options.folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.folder)
    processor.save_pretrained(options.folder)
    return facts


def probe(folder: Path) -> dict[str, object]:
    """Frozen features and the ridge head on all of CIFAR-100 at once."""
    model, processor, _ = load_model(str(folder), "classification")
    learner = Learner(model, processor, method="linear_probe", head="ridge", objective="classification")
    experience = stream_of("cifar100", test_rows_per_class=20).experience(0)
    learner.learn(experience)
    found = learner.evaluate([experience])[0]
    assert found is not None
    return {"cifar100_joint_probe": found, "floor": FLOOR, "weak": found < FLOOR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--probe", action="store_true", help="measure the saved model only")
    options = parser.parse_args()
    path = options.folder / "facts.json"
    facts = json.loads(path.read_text()) if options.probe else pretrain(options)
    facts |= probe(options.folder) | {"shared_classes": SAME}
    facts["pretraining"] = {"data": "100 classes of Tiny ImageNet, training images", "seen": list(SAME)}
    path.write_text(json.dumps(facts, indent=1))
    print(facts)


if __name__ == "__main__":
    main()
