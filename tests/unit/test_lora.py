"""LoRA beside what the user's model brings: adapters of its own, fused projections, frozen parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from perdure.attachment import attach, detach
from perdure.errors import BadInput
from tests.conformance import cases


def with_own_adapter() -> Any:
    """A BERT to which the user has added and trained a PEFT adapter on every query."""
    model: Any = cases.build_host("bert")[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return model.eval()


@pytest.mark.parametrize("targets", ["query", "value"])
def test_a_model_with_the_users_own_adapter_is_refused_and_left_as_it_was(targets: str) -> None:
    model, tokens = with_own_adapter(), torch.tensor([[5, 6, 7]])
    output, state, note = model(tokens)[0], {k: t.clone() for k, t in model.state_dict().items()}, model.peft_config
    with pytest.raises(BadInput, match=r"PEFT adapter already \(at encoder.layer.0.attention.self.query\).*remove it"):
        attach(model, {"lora": {"rank": 2, "targets": targets}})
    assert model.peft_config is note and list(note) == ["default"]
    assert model.encoder.layer[0].attention.self.query.active_adapters == ["default"]
    assert torch.equal(model(tokens)[0], output) and list(model.state_dict()) == list(state)
    attach(model, {"moram": {"rank": 2}})  # adds to outputs alone
    assert torch.equal(model(tokens)[0], output)


def test_detach_gives_back_what_trains_and_what_peft_noted() -> None:
    model: Any = cases.build_host("bert")[0]
    model.peft_config = note = {"mine": "kept"}
    model.embeddings.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    attach(model, {"lora": {"rank": 2}})
    assert model.peft_config is note
    detach(model)
    assert model.peft_config == {"mine": "kept"}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert any(trained.values()) and not all(trained.values())


def test_a_part_of_a_fused_projection_is_refused() -> None:
    model = cases.build_host("gpt2")[0]
    for targets, left in (("query", "key and value"), (["query", "value", "ffn"], "key")):
        with pytest.raises(BadInput, match=rf"method\.lora\.targets: \S+c_attn is query.*choose {left} too"):
            attach(model, {"lora": {"rank": 2, "targets": targets}})
    for whole in (["value", "key", "query"], "attention", "re:.*c_attn$", "ffn"):
        attach(model, {"lora": {"rank": 2, "targets": whole}})
        detach(model)
