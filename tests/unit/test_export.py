"""What is exported gives the learner's own outputs when another program reads it, and says what it does not keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import perdure
from perdure.cli import app
from perdure.errors import BadInput
from perdure.memory import reference
from perdure.streams import Experience
from tests.conformance import cases
from tests.unit import trainers

DOMAINS = ("ab", "cd")


def learnt(method: Any, host: str = "llama") -> perdure.Learner:
    model, tokenizer = cases.build_host(host)
    language = cases.OBJECTIVE[host] == "causal_lm"
    objective: Any = {"causal_lm": {"block_size": 32}} if language else {"classification": {"max_length": 32}}
    training = {"learning_rate": 2e-2, "per_device_train_batch_size": 4}
    learner = perdure.Learner(model, tokenizer, method=method, objective=objective, training=training)
    for number, domain in enumerate(DOMAINS):
        rows: list[dict[str, str]] = trainers.texts(domain, 8)
        if not language:
            rows = [{"text": row["prompt"], "label": f"{domain}{n % 2}"} for n, row in enumerate(rows)]
        learner.learn(Experience(number, domain, rows))
    return learner


def outputs(model: Any) -> torch.Tensor:
    batch = trainers.collate(trainers.tokens(trainers.texts("ab", 3)))
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]


def close(found: Any, learner: perdure.Learner, host: str) -> None:
    """Equal to 1e-5, and not to the model that learnt nothing."""
    expected = outputs(learner.model)
    torch.testing.assert_close(outputs(found), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, outputs(cases.build_host(host)[0]), atol=1e-2)


MERGED = {
    "lora-fused": ({"lora": {"rank": 2, "targets": "all"}}, "gpt2"),
    "olora": ({"olora": {"rank": 2, "targets": ["query", "value"]}}, "gpt2"),
    "codyra": ({"codyra": {"rank": 3, "threshold": 0.0}}, "llama"),
    "finetune+ewc": (["finetune", {"ewc": {"rows": 4}}], "llama"),
    "lora-head": ({"lora": {"rank": 2, "grow": True}}, "bert"),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_weights_are_a_plain_model_with_the_same_outputs(name: str, tmp_path: Path) -> None:
    method, host = MERGED[name]
    learner = learnt(method, host)
    facts = learner.export(tmp_path / "out", "merged")
    plain = type(learner.model).from_pretrained(
        tmp_path / "out", **({"add_pooling_layer": False} if host == "bert" else {})
    )
    assert list(plain.state_dict()) == list(cases.build_host(host)[0].state_dict())
    close(plain, learner, host)
    assert facts == json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["form"] == "merged" and facts["experiences"] == list(DOMAINS)
    assert any("forget" in lost for lost in facts["loses"])
    assert any("cosine with its 4 classes" in lost for lost in facts["loses"]) == (host == "bert")
    assert any("rounded once" in lost for lost in facts["loses"]) == (name in ("lora-fused", "olora", "lora-head"))
    with pytest.raises(BadInput, match="there already and not empty"):
        learner.export(tmp_path / "out", "merged")


PEFT = {
    "lora": ({"lora": {"rank": 2, "targets": "all"}}, "gpt2"),
    "lora-grow": ({"lora": {"rank": 2, "grow": True}}, "llama"),
    "sd_lora-fused": ({"sd_lora": {"rank": 2, "targets": ["query", "value"]}}, "gpt2"),
    "merge_lora": ({"merge_lora": {"rank": 2}}, "llama"),
    "codyra-ranks": ({"codyra": {"rank": 4, "threshold": 0.6, "dense": 0.0}}, "llama"),
}


@pytest.mark.parametrize("name", PEFT)
def test_a_peft_adapter_read_back_by_peft_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    method, host = PEFT[name]
    learner = learnt(method, host)
    facts = learner.export(tmp_path / "out", "peft")
    found = PeftModel.from_pretrained(cases.build_host(host)[0], str(tmp_path / "out"))
    close(found, learner, host)
    if name == "codyra-ranks":  # maps of several ranks, which one rank for all would get wrong
        assert len(set(facts["ranks"].values())) > 1
    if name == "lora-grow":
        assert set(facts["ranks"].values()) == {4}


def test_stacked_atoms_give_the_layers_output_by_the_formula(tmp_path: Path) -> None:
    learner = learnt({"moram": {"rank": 2, "top_k": 2, "threshold": 0.1, "scale": 2.0}}, "gpt2")
    facts = learner.export(tmp_path, "stacked")
    tensors = load_file(tmp_path / "stacked.safetensors")
    moram: Any = learner.methods[0]
    places = {place["name"]: place for place in facts["places"]}
    assert places.keys() == moram.memories.keys() and places["1.key"]["out_slice"] == [16, 32]
    assert places["1.key"]["path"] == places["1.value"]["path"] == "transformer.h.1.attn.c_attn"
    settings, moved = facts["method"][0]["settings"], 0.0
    for name, memory in moram.memories.items():
        keys, values, owners = (tensors[f"0/{name}/{key}"] for key in ("keys", "values", "owners"))
        assert len(keys) == len(values) == len(owners) and set(owners.tolist()) <= {0, 1}
        x = torch.randn(5, keys.shape[1], generator=torch.Generator().manual_seed(1))
        expected, _ = reference.rank_one(
            x, keys, values, k=settings["top_k"], tau=settings["temperature"], delta=settings["threshold"]
        )
        with torch.no_grad():
            torch.testing.assert_close(memory.eval()(x), expected, rtol=1e-5, atol=1e-6)
        moved += float(expected.abs().max())
    assert moved > 0.01


def test_stacked_patches_and_experts(tmp_path: Path) -> None:
    learner = learnt({"apn": {"patches": 5, "top_k": 2, "rank": 3}})
    facts = learner.export(tmp_path / "apn", "stacked")
    tensors, method = load_file(tmp_path / "apn" / "stacked.safetensors"), learner.methods[0]
    names = ("prototypes", "code", "gate_scale", "gate_bias", "decoders")
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    for place in facts["places"]:
        parts = [tensors[f"0/{place['name']}/{name}"] for name in names]
        settings = facts["method"][0]["settings"]
        expected, _ = reference.patches(x, *parts, k=settings["top_k"], tau=settings["temperature"])
        with torch.no_grad():
            torch.testing.assert_close(method.modules[place["name"]].eval()(x), expected, rtol=1e-5, atol=1e-6)
        assert expected.abs().max() > 0 and learner.model.get_submodule(place["exit"]) is not None
    learner = learnt({"seta": {"density": 0.1, "gate_layer": 1, "prompt_tokens": 4, "draws": 8, "smallest": 4}})
    facts = learner.export(tmp_path / "seta", "stacked")
    tensors, bank = load_file(tmp_path / "seta" / "stacked.safetensors"), learner.methods[0].banks["1.query"]
    dense = torch.zeros(bank.out_features, bank.in_features)
    at = tensors["0/1.query/row"].long(), tensors["0/1.query/column"].long()
    dense.index_put_(at, tensors["0/1.query/values"], accumulate=True)
    support = bank.support()
    assert torch.equal(dense.flatten().nonzero()[:, 0], support.index[support.values != 0].long().unique())
    assert tensors["0/gate/weight"].shape == (len(learner.methods[0].values["experts"]), 16)


REFUSED = {
    "routed": ({"moram": {"rank": 2}}, "peft", "moram cannot be written as peft: .*--to stacked writes its items"),
    "routed-merged": ({"moram": {"rank": 2}}, "merged", "moram cannot be written as merged"),
    "prompts": ({"static_prompts": {"length": 2}}, "merged", "static_prompts cannot .*`save_pretrained` keeps it"),
    "whole": ("finetune", "peft", "finetune trained weights of the model itself.*export it merged"),
    "flat": ({"lora": {"rank": 2}}, "stacked", "lora keeps no routed items"),
    "frozen": ("frozen", "merged", "frozen left the model as it was"),
    "form": ({"lora": {"rank": 2}}, "gguf", "there is no form 'gguf'; choose merged, peft, stacked"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_such_form_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    method, form, message = REFUSED[case]
    with pytest.raises(BadInput, match=message):
        learnt(method).export(tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_the_middle_of_an_experience_is_refused(tmp_path: Path) -> None:
    learner = perdure.Learner(
        *cases.build_host("llama"), method="lora", objective={"causal_lm": {"block_size": 32}},
        training={"per_device_train_batch_size": 2},
    )  # fmt: skip
    with pytest.raises(BadInput, match="has learnt nothing yet"):
        learner.export(tmp_path / "out")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.learn(Experience(0, "ab", trainers.texts("ab", 8)), on_step=stop)
    with pytest.raises(BadInput, match="stands in the middle of an experience"):
        learner.export(tmp_path / "out")


def test_the_command_reads_a_run_and_says_what_is_lost(tmp_path: Path) -> None:
    from perdure.run import run_recipe
    from tests.e2e import tiny

    recipe = perdure.load_recipe(tiny.write_recipe(tmp_path, {"lora": {"rank": 2}}), [f"output_dir={tmp_path / 'run'}"])
    run_recipe(recipe, progress=False)
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "peft"])
    assert done.exit_code == 0, done.output
    assert "peft, of lora" in done.output and "not kept: the head cosine with its 6 classes" in done.output
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    with pytest.raises(BadInput, match="holds neither perdure.json of `save_pretrained` nor recipe.yaml"):
        CliRunner().invoke(app, ["export", str(tmp_path / "out"), str(tmp_path / "more")], catch_exceptions=False)
