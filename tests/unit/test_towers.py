"""Models of two towers, and rows of a kind that a model does not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from perdure.errors import BadInput
from perdure.hosts import Host
from perdure.learner import Learner
from perdure.models import PairProcessor
from perdure.processors import ByteTokenizer, ImageProcessor
from tests.conformance import cases

IMAGES, TEXTS = ImageProcessor((8, 8)), ByteTokenizer()
BOTH = PairProcessor(TEXTS, IMAGES)
METHODS = ["linear_probe", {"lora": {"rank": 2}}, {"moram": {"rank": 2, "top_k": 2}}]


def clip() -> Any:
    import transformers as t

    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 8}
    text = {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 257, "eos_token_id": 258}
    config = t.CLIPConfig(
        text_config={"hidden_size": 16, **size, **text},
        vision_config={"hidden_size": 32, "image_size": 8, "patch_size": 4, **size},
        projection_dim=8,
    )
    return t.CLIPModel(config).eval()


def classify(tower: str | None, **more: Any) -> dict[str, Any]:
    return {"classification": {"max_length": 32, "tower": tower, **more}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tower", "processor", "kind"),
    [("vision", IMAGES, "vit"), ("vision", BOTH, "vit"), ("text", TEXTS, "bert"), ("text", BOTH, "bert")],
)
def test_each_tower_of_clip_learns(method: Any, tower: str, processor: Any, kind: str) -> None:
    model, made = clip(), cases.experiences(kind, 2, rows=16)
    training = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "epochs": 8}
    learner = Learner(model, processor, method=method, objective=classify(tower), training=training)
    assert learner.features(made[0].test).shape[1] == {"vision": 32, "text": 16}[tower]
    assert learner.pooling == {"vision": "cls", "text": "last"}[tower]
    other = getattr(model, {"vision": "text_model", "text": "vision_model"}[tower])
    assert all("perdure" not in name and "lora" not in name for name, _ in other.named_modules())
    learner.learn(made[0])
    assert learner.evaluate(made[:1])[0] > 0.7  # chance is one half
    assert learner.settings()["objective"]["classification"]["tower"] == tower
    with pytest.raises(BadInput, match=f"tower: is {tower}, but the rows are|need a"):
        learner.learn(cases.experiences({"vit": "bert", "bert": "vit"}[kind], 2)[1])


@pytest.mark.parametrize("processor", [IMAGES, TEXTS, BOTH])
def test_a_tower_must_be_named_where_there_are_two(processor: Any) -> None:
    for more in ({}, {"pooling": "cls"}):
        with pytest.raises(BadInput, match=r"objective\.classification\.tower: is not set, but CLIPModel has two"):
            Learner(clip(), processor, method="linear_probe", objective=classify(None, **more))


def test_a_tower_that_is_not_there() -> None:
    model, processor = cases.build_host("bert")
    with pytest.raises(BadInput, match="tower: 'text' is unknown; BertModel has none that has a name; leave it out"):
        Learner(model, processor, method="linear_probe", objective=classify("text"))
    with pytest.raises(BadInput, match="processor: CLIPTextModel takes input_ids, which ImageProcessor does not make"):
        Learner(clip(), IMAGES, method="linear_probe", objective=classify("text"))


def test_a_host_of_one_tower() -> None:
    model = clip()
    host = Host(model, "text")
    assert (host.width, host.depth, host.pool_default()) == (16, 2, "last")
    assert {site.tower for site in host.sites()} == {"text"} == {block.tower for block in host.blocks()}
    assert {site.tower for site in host.sites(tower="vision")} == {"vision"}


@pytest.mark.parametrize(("kind", "processor"), [("bert", IMAGES), ("vit", TEXTS)])
def test_a_processor_of_the_other_kind_is_refused(kind: str, processor: Any) -> None:
    model, _ = cases.build_host(kind)
    with pytest.raises(BadInput, match=f"processor: .* takes .*, which {type(processor).__name__} does not make"):
        Learner(model, processor, method="linear_probe", objective=classify(None))


def test_rows_of_the_other_kind_are_refused_and_leave_no_trace() -> None:
    rows = [{"image": np.zeros((8, 8, 3), np.uint8), "label": name} for name in ("a", "b")]
    for method in METHODS:
        learner = Learner(cases.build_host("bert")[0], BOTH, method=method, objective=classify(None))
        with pytest.raises(BadInput, match="rows: give pixel_values, but BertModel takes input_ids"):
            learner.partial_fit(rows)
        assert learner.seen == [] and learner.position.phase == "boundary"
        learner.partial_fit([{"text": "aa", "label": "a"}, {"text": "bb", "label": "b"}])
