"""Lists of methods of different kinds: what cannot stand together is refused before the model is touched for good."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perdure.errors import BadInput
from perdure.protocol import check_list
from perdure.registry import METHODS
from tests.conformance import cases


def spec(*names: str) -> list[Any]:
    return [cases.SETTINGS.get(name, name) for name in names]


@pytest.mark.parametrize("prompts", ["l2p", "dual_prompt", "coda_prompt"])
@pytest.mark.parametrize("other", ["olora", "merge_lora", "moe_adapters", "single_prompt", "finetune"])
def test_a_query_of_the_frozen_host_suffers_no_other_adapter(prompts: str, other: str) -> None:
    for names in ((prompts, other), (other, prompts)):
        built = [METHODS.get(name)(METHODS.get(name).Config()) for name in names]
        with pytest.raises(BadInput, match=rf"method: {prompts} takes its query .* and {other} would adapt it"):
            check_list(built)  # what a comparison asks before its first arm runs


def test_a_query_of_the_frozen_host_stands_beside_methods_that_adapt_nothing() -> None:
    for other in ("ewc", "l2_anchor", "lwf", "feat_kd", "er", "derpp", "agem", "pcr"):
        cases.build_learner("bert", spec("l2p", other)).detach()


@pytest.mark.parametrize(("one", "other", "site"), [("moram", "seta", r"1\.\w+"), ("apn", "moe_adapters", r"0\.ffn")])
def test_two_methods_that_route_at_one_site_are_refused(one: str, other: str, site: str) -> None:
    for names in ((one, other), (other, one)):
        told = rf"method: {names[0]} and {names[1]} both route at {site}, .* other targets"
        with pytest.raises(BadInput, match=told):
            cases.build_learner("bert", spec(*names))


@pytest.mark.parametrize("given", ["slca", ["ranpac", "er"]])
def test_a_preset_where_only_methods_may_stand_is_told_as_one(given: Any) -> None:
    with pytest.raises(BadInput, match="is a preset, which stands alone and in recipes only; .* method .*, head "):
        cases.build_learner("bert", given)


@pytest.mark.parametrize("names", [("lora", "finetune"), ("finetune", "lora")])
def test_full_training_leaves_another_methods_adapter_to_it(names: tuple[str, str]) -> None:
    model, _ = cases.build_host("bert")
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner, made = cases.build_learner("bert", spec(*names), epochs=1), cases.experiences("bert", 2)
    for experience in made:
        learner.learn(experience)
    trained = [id(parameter) for _, parameter in learner.named_trainable()]
    assert len(set(trained)) == len(trained)
    restored = learner.detach().state_dict()
    assert list(restored) == list(original)
    assert all(torch.equal(restored[name], original[name]) for name in original)
