"""Protected keys and down-projections: exact after every update, whatever the optimizer does, and across a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perdure.config import ProtocolConfig, TrainingConfig
from perdure.errors import BadInput
from perdure.learner import Learner
from perdure.protocol import check_methods
from perdure.registry import METHODS
from tests.conformance import cases

SPECS: dict[str, Any] = {
    "moram": {"moram": {"rank": 2, "top_k": 2, "protect": {"inputs": 0.6}}},
    "lora": {"lora": {"rank": 2, "protect": {"inputs": 0.6}}},
}


def downs(learner: Learner) -> dict[str, torch.Tensor]:
    method: Any = learner.methods[0]
    if method.name == "moram":
        return {name: memory.bank.new_keys.detach() for name, memory in method.memories.items()}
    return {name: weight.detach() for name, weight in method._downs().items()}


def answers(learner: Learner) -> float:
    """Largest component of any new key inside the protected directions, relative to the key's length."""
    method: Any = learner.methods[0]
    sharing, found = method.values["sharing"], 0.0
    for name, keys in downs(learner).items():
        basis = method._protection._bases[sharing[name]].to(keys.dtype)
        found = max(found, float((keys @ basis).norm(dim=1).div(keys.norm(dim=1)).max()))
    return found


@pytest.mark.parametrize("name", SPECS)
def test_keys_stay_in_the_null_space_after_every_update(name: str) -> None:
    made = cases.experiences("bert")
    learner = cases.build_learner("bert", SPECS[name], weight_decay=0.1, epochs=3)
    seen: list[float] = []
    moved: list[bool] = []
    before: dict[str, torch.Tensor] = {}

    def on_step(loop: Any, _: dict[str, float]) -> None:
        if loop.position.experience:
            seen.append(answers(loop))
            moved.append(any(not torch.equal(before.get(n, k), k) for n, k in downs(loop).items()))
            before.update({n: k.clone() for n, k in downs(loop).items()})

    learner.learn(made[0], on_step=on_step)
    method: Any = learner.methods[0]
    assert all(basis.shape[1] > 0 for basis in method._protection._bases.values())
    learner.learn(made[1], on_step=on_step)
    assert len(seen) > 4
    assert any(moved), "keys must move, or their stillness shows nothing"
    assert max(seen) < 1e-5


def test_the_basis_is_that_of_the_inputs_of_past_experiences() -> None:
    made = cases.experiences("bert")
    learner = cases.build_learner("bert", SPECS["moram"])
    learner.learn(made[0])
    method: Any = learner.methods[0]
    site = next(site for site in method._sites if site.role == "ffn_in")
    inputs: list[torch.Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        masks = []
        for batch in learner.batches(made[0].train):
            masks.append(batch.inputs["attention_mask"].bool())
            learner.forward(batch)
    handle.remove()
    rows = torch.cat([x[mask] for x, mask in zip(inputs, masks, strict=True)])
    assert torch.allclose(method.tensors[f"moment/{site.name}"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    shared = method.values["sharing"]
    assert shared["0.key"] == shared["0.value"] == shared["0.query"] != shared["0.ffn_in"]


def test_old_inputs_hardly_answer_new_keys() -> None:
    """Against the same run without protection: features of the first experience move less."""
    made = cases.experiences("bert")
    drift = {}
    for protect in (None, {"inputs": 0.9}):
        learner = cases.build_learner("bert", {"moram": {"rank": 2, "top_k": 2, "protect": protect}}, epochs=4)
        learner.learn(made[0])
        before = learner.features(made[0].train)
        learner.learn(made[1])
        drift[protect is not None] = float((learner.features(made[0].train) - before).norm())
    assert 0 < drift[True] < drift[False]


@pytest.mark.parametrize(
    ("spec", "setting"),
    [
        ({"moram": {"rank": 2, "grow_every": 3, "protect": {"inputs": 0.5}}}, r"method\.moram\.protect"),
        ({"moram": {"rank": 2}}, r"method\.moram\.grow_every"),
        ({"lora": {"rank": 2, "first_only": True}}, r"method\.lora\.first_only"),
        ({"lora": {"rank": 2, "protect": {"inputs": 0.5}}}, r"method\.lora\.protect"),
    ],
)
def test_what_a_stream_without_boundaries_cannot_have_is_refused_before_any_work(spec: Any, setting: str) -> None:
    with pytest.raises(BadInput, match=setting):  # a recipe is checked without a model
        check_methods(METHODS.parse(spec, "method"), ProtocolConfig(boundaries="none"), TrainingConfig())
    model, processor = cases.build_host("bert")
    before = list(dict(model.named_modules()))
    with pytest.raises(BadInput, match=setting):
        Learner(
            model, processor, method=spec, objective={"classification": {"max_length": 32}},
            protocol={"boundaries": "none"},
        )  # fmt: skip
    assert list(dict(model.named_modules())) == before


def test_lora_on_the_first_experience_only_stands_still_afterwards() -> None:
    made = cases.experiences("bert")
    learner = cases.build_learner("bert", {"lora": {"rank": 2, "first_only": True}})
    method: Any = learner.methods[0]
    start = {name: p.detach().clone() for name, p in method._named()}
    learner.learn(made[0])
    first = {name: p.detach().clone() for name, p in method._named()}
    assert any(not torch.equal(first[name], start[name]) for name in start)
    learner.learn(made[1])
    assert all(torch.equal(p, first[name]) for name, p in method._named())
