"""The recipes of online learning on images: settings against our notes, and runs on tiny models with real rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perdure.recipe import load_recipe
from perdure.streams.sources_named import data_folder

# Typed from the notes on RwF: settings of a re-implementation and of public code for online prompts, not the paper's.
NOTED = {
    "length": 10, "layers": [0, 1, 2], "heads": 1, "beta": None, "train": ["P", "W_Q", "W_O"],
    "optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0, "per_device_train_batch_size": 64, "epochs": 1,
    "learning_rate": 1e-3, "augment": "resized_crop",
}  # fmt: skip
EXPERIENCES = {"online-cifar100": 10, "online-imagenet-r": 10, "online-imagenet-sketch": 20}
TINY = [
    "model={scratch: {family: vit, layers: 4, width: 16, heads: 2, image_size: 32, patch_size: 8}}",
    "stream.experiences=2", "training.per_device_train_batch_size=4", "training.num_threads=1", "output_dir=out",
    "--no-progress",
]  # fmt: skip


@pytest.mark.parametrize("name", list(EXPERIENCES))
def test_the_recipes_hold_the_noted_settings(name):
    recipe = load_recipe(f"papers/{name}", arm="rwf")
    ((method, settings),) = recipe.method[0].items()
    found = {**settings, **recipe.training.model_dump(), **recipe.objective["classification"]}
    assert method == "rwf" and {key: found[key] for key in NOTED} == NOTED
    assert recipe.stream.experiences == EXPERIENCES[name]
    protocol = recipe.protocol
    assert (protocol.task_id, protocol.boundaries, protocol.passes, protocol.mask) == ("none", "none", 1, "seen")
    for arm in ("static_prompts", "rwf-query"):  # prompts alone take the rate of the prompt methods
        assert load_recipe(f"papers/{name}", arm=arm).training.learning_rate == 5e-3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A few real images in folders by class: their own JPEG files."""
    made = tmp_path_factory.mktemp("pictures")
    with np.load(data_folder() / "vision" / "pacs_96px.npz") as arrays:
        data, starts, labels = arrays["train_jpeg"], arrays["train_offsets"], arrays["train_y"]
        names = arrays["class_names"]
    for label in range(4):
        (made / str(names[label])).mkdir()
        for number in np.flatnonzero(labels == label)[:10]:
            file = made / str(names[label]) / f"{number}.jpg"
            file.write_bytes(data[starts[number] : starts[number + 1]].tobytes())
    return made


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "arm"),
    [("online-imagenet-r", "rwf"), ("online-imagenet-r", "frozen+ridge"), ("online-imagenet-sketch", "lora")],
)
def test_they_run_on_real_images_and_a_tiny_model(name, arm, pictures, tmp_path, nursery):
    done = nursery.run(
        tmp_path, "run", name, f"method={arm}", f"stream.source={{path: {pictures}, type: images}}", *TINY
    )
    assert done.code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert len(report["matrix"]) == 2 and report["matrix"][1][1] is not None
    assert report["cost"]["samples"] == 32 if arm != "frozen+ridge" else report["cost"]["trainable_parameters"] == 0


@pytest.mark.needs_data
def test_cifar_online_runs_on_the_shared_cut(tmp_path, nursery):
    done = nursery.run(
        tmp_path, "run", "online-cifar100", "stream.source=cifar100", "stream.fields={}", "stream.rows_per_class=2",
        "stream.test_rows_per_class=1", *TINY,
    )  # fmt: skip
    assert done.code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["cost"]["samples"] == 200 and len(report["matrix"]) == 2
