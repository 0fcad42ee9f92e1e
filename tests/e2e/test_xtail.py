"""The recipe of X-TAIL: its settings against the published ones, and a run of it on a tiny model of the same kind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perdure.evaluation import metrics
from perdure.recipe import load_recipe

# What MoRAM's released script and code set for X-TAIL, typed from the notes on the release.
PUBLISHED = {
    "model": "openai/clip-vit-base-patch16",
    "rank": 16, "top_k": 16, "temperature": 0.01, "threshold": 0.2, "scale": 1.0, "dropout": 0.0, "eps": 1e-12,
    "min_k": 2, "targets": "all",
    "optimizer": "adamw", "learning_rate": 5e-4, "adam_beta1": 0.9, "adam_beta2": 0.9999, "weight_decay": 0.0,
    "lr_scheduler": "cosine", "warmup_steps": 0, "max_steps": 500, "per_device_train_batch_size": 64,
    "max_grad_norm": None, "gradient_accumulation_steps": 1,
    "shots": 16, "seed": 42,
}  # fmt: skip
ORDER = ["aircraft", "caltech101", "dtd", "eurosat", "oxford_flowers", "food101", "mnist", "oxford_pets",
         "stanford_cars", "sun397"]  # fmt: skip
CLASSES = {"eurosat": 10, "mnist": 10}  # the smallest domains decide whether 500 steps are reached

SMALL = [
    "model={scratch: {family: clip, layers: 2, width: 32, heads: 2, max_length: 64, image_size: 32, patch_size: 8}}",
    "stream.source=[mnist_12k, pacs]", "stream.rows_per_class=2", "stream.test_rows_per_class=1",
    "objective.image_text.max_length=64", "objective.image_text.templates={mnist_12k: 'the number {}.', pacs: '{}.'}",
    "training.max_steps=4", "training.per_device_train_batch_size=8", "training.num_threads=1",
]  # fmt: skip


@pytest.mark.parametrize("arm", [None, "moram"])
def test_the_recipe_holds_the_published_settings(arm):
    recipe = load_recipe("papers/xtail", arm=arm)
    ((method, settings),) = recipe.method[0].items()
    found: dict[str, Any] = {
        **settings, **recipe.training.model_dump(), "model": recipe.model, "shots": recipe.stream.rows_per_class,
        "seed": recipe.seed,
    }  # fmt: skip
    assert method == "moram" and {name: found[name] for name in PUBLISHED} == PUBLISHED
    assert [source.path.rpartition("/")[2] for source in recipe.stream.sources] == ORDER  # type: ignore[union-attr]
    assert list(recipe.objective["image_text"]["templates"]) == ORDER
    protocol = recipe.protocol
    assert (protocol.label_space, protocol.evaluate, protocol.mask) == ("declared", "all", "current")
    assert (protocol.task_id, protocol.rehearsal) == ("none", 0) and list(recipe.head) == ["class_text"]
    # 500 steps in every domain, however few rows it has.
    for classes in CLASSES.values():
        steps = -(-classes * 16 // recipe.training.per_device_train_batch_size)
        assert steps * recipe.training.epochs >= 500


@pytest.mark.parametrize("arm", ["zero_shot", "moram"])
@pytest.mark.needs_data
def test_it_runs_on_real_rows_and_a_tiny_model(arm, tmp_path, nursery):
    done = nursery.run(tmp_path, "run", "xtail", f"method={arm}", *SMALL, "output_dir=out", "--no-progress")
    assert done.code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    matrix = report["matrix"]
    assert all(cell is not None for row in matrix for cell in row) and len(matrix) == 2
    assert report["head"] == "class_text" and report["objective"] == "image_text"
    found = {name: report["metrics"][name] for name in ("transfer", "average", "last")}
    assert found == {
        "transfer": matrix[0][1],
        "average": pytest.approx(sum(map(sum, matrix)) / 4),
        "last": pytest.approx(sum(matrix[1]) / 2),
    }
    assert found["transfer"] == metrics.transfer(matrix)
    assert report["cost"]["trainable_parameters"] == (0 if arm == "zero_shot" else 16 * 2304)
    if arm == "zero_shot":
        assert matrix[0] == matrix[1] == report["baseline"]  # what the model can before it learns
