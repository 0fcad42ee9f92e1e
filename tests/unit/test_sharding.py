"""training.shard: what is refused before work starts; that it learns as one process does stands in the battery."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.assembly import complete_methods
from perdure.config import TrainingConfig
from perdure.errors import BadInput
from perdure.sharding import check_sharding, in_parts
from tests.conformance import cases


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("finetune", "finetune trains, overwrites or takes gradients"),
        ({"er": {"budget": 4}}, "finetune trains"),  # no method adapts, so the whole model would train
        ("codyra", "codyra trains, overwrites"),
        ("merge_lora", "merge_lora trains, overwrites"),
        ("l2_anchor", "finetune trains"),
        ("seta", "seta trains, overwrites or takes gradients"),
        ({"apn": {"train": "all"}}, "apn trains"),
        ({"lora": {"pretrain": {}}}, "lora with pretrain trains the whole host"),
        (["moram", "lwf"], "lwf keeps a copy of the model"),
    ],
)
def test_what_wants_the_whole_host_is_refused(method: Any, reason: str) -> None:
    methods = complete_methods(method)
    check_sharding(methods, TrainingConfig())
    with pytest.raises(BadInput, match=f"training.shard: is host, but {reason}.*set it to none"):
        check_sharding(methods, TrainingConfig(shard="host"))


def test_banks_are_split_only_where_there_are_some() -> None:
    check_sharding(complete_methods(["moram", {"er": {"budget": 4}}]), TrainingConfig(shard="banks"))
    check_sharding(complete_methods("finetune"), TrainingConfig())
    for shard in ("banks", "both"):
        with pytest.raises(BadInput, match=f"training.shard: is {shard}, but lora keeps no bank"):
            check_sharding(complete_methods("lora"), TrainingConfig(shard=shard))
        with pytest.raises(BadInput, match=f"training.shard: is {shard}, but lwf keeps a copy"):
            check_sharding(complete_methods(["moram", "lwf"]), TrainingConfig(shard=shard))


def test_the_model_is_untouched_by_a_refusal() -> None:
    model, processor = cases.build_host("bert")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    from perdure.learner import Learner

    with pytest.raises(BadInput, match=r"training\.shard"):
        Learner(model, processor, method="finetune", training={"shard": "host"})
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_one_process_holds_everything() -> None:
    learner = cases.build_learner("bert", cases.all_specs()["moram"], shard="host")
    assert in_parts(learner.model) == []
    assert learner.base_hash() == cases.build_learner("bert", "linear_probe").base_hash()
