"""Input that cannot be honoured, through the command line: exit 64, a message that helps, and nothing written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure import yamltext
from perdure.cli import main

from . import tiny


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--no-progress"])
    return int(end.value.code or 0), capsys.readouterr().err


def refused(folder: Path, capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], *words: str) -> None:
    path = folder / "tiny.yaml"
    path.write_text(yamltext.dump(recipe), encoding="utf-8")
    before = tiny.contents(folder)
    code, err = ends(capsys, "run", str(path), f"output_dir={folder / 'runs' / 'deep'}")
    assert code == 64, err
    assert err.startswith("perdure: ") and "Traceback" not in err
    missing = [word for word in words if word not in err]
    assert not missing, f"{missing} not in: {err}"
    assert tiny.contents(folder) == before and not (folder / "runs").exists()


# ---- settings: (dotted key, value, words of the message)
SETTINGS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("method", "morram", ("method", "'morram'", "did you mean moram")),
    ("method", {"moram": {"rnk": 4}}, ("method.moram.rnk", "did you mean 'rank'")),
    ("method", {"moram": {"rank": "many"}}, ("method.moram.rank", "'many'")),
    ("method", {"moram": {"rank": 0}}, ("method.moram.rank", "found 0")),
    ("method", {"moram": {"targets": "atention"}}, ("atention",)),
    ("method", {"moram": {"layers": [7]}}, ("7",)),
    ("method", ["lora", "lora"], ("method", "lora", "2 times")),
    ("method", {"finetune": {"parameters": "nothing_is_named_so"}}, ("method.finetune.parameters",)),
    ("method", {"finetune": {"parameters": "("}}, ("method.finetune.parameters", "regular expression", "'('")),
    ("method", {"lora": {"targets": "re:("}}, ("'re:('", "regular expression")),
    ("method", {"lora": {"first_only": True, "grow": True}}, ("method.lora", "first_only", "grow", "keep one")),
    ("method", [], ("method", "empty")),
    ("head", "cosin", ("head", "cosine")),
    ("head", {"ridge": {"features": -1}}, ("head.ridge.features", "-1")),
    ("objective", "clasification", ("objective", "classification")),
    ("objective", {"classification": {"max_length": 64}}, ("objective.max_length", "64", "32")),
    ("objective", "causal_lm", ("bert",)),
    ("training.learning_rate", -1, ("training.learning_rate", "-1")),
    ("training.learning_rate", "fast", ("training.learning_rate", "'fast'")),
    ("training.learning_rte", 1, ("training.learning_rte", "did you mean 'learning_rate'")),
    ("training.epochs", [1, 1], ("training.epochs", "lists 2", "3 experiences", "one for all")),
    ("training.epochs", [1, 1, 1, 2], ("training.epochs", "lists 4", "3 experiences", "one for all")),
    ("protocol.mask", "some", ("protocol.mask", "'some'")),
    ("seed", -1, ("seed", "-1")),
    ("model", "no/such/folder", ("model", "no/such/folder")),
    ("model", {"scratch": {"family": "bort"}}, ("family", "'bort'")),
    ("model", {"scratch": {"family": "bert", "width": 15, "heads": 2}}, ("15", "heads 2")),
    ("stream.source", "nothing.jsonl", ("source", "nothing.jsonl")),
    ("stream.experiences", 7, ("experiences", "7", "6")),
    ("stream.classes", ["kind0", "kind1"], ("'kind2'", "outside the declared")),
    ("stream.scenario", "classes", ("stream.scenario", "'classes'")),
    ("stream.fields", {"label": "intent"}, ("intent",)),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), SETTINGS, ids=[f"{k}={json.dumps(v)}" for k, v, _ in SETTINGS])
def test_settings_that_cannot_be_honoured(tmp_path, capsys, key, value, words):
    recipe = tiny.settings(tmp_path, "lora")
    block = recipe
    *above, name = key.split(".")
    for part in above:
        block = block[part]
    block[name] = value
    refused(tmp_path, capsys, recipe, *words)


def test_options_that_the_method_cannot_honour_on_this_stream(tmp_path, capsys):
    free: dict[str, Any] = {"protocol": {"boundaries": "none"}, "training": {"lr_scheduler": "constant"}}
    recipe = tiny.settings(tmp_path, {"moram": tiny.MORAM}, **free)
    refused(tmp_path, capsys, recipe, "method.moram.grow_every", "boundaries")
    recipe["method"] = {"moram": {**tiny.MORAM, "grow_every": 2, "protect": {"inputs": 0.5}}}
    refused(tmp_path, capsys, recipe, "method.moram.protect", "boundaries")
    for option in ({"first_only": True}, {"grow": True}, {"protect": {"inputs": 0.5}}):
        recipe["method"] = {"lora": {"rank": 2, **option}}
        refused(tmp_path, capsys, recipe, f"method.lora.{next(iter(option))}", "boundaries")


# ---- files
def _cut(path: Path) -> None:
    data = gzip.compress(path.read_bytes())
    path.with_suffix(".jsonl.gz").write_bytes(data[: len(data) // 2])


def _line(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        lines = path.read_text().splitlines()
        lines[3] = text
        path.write_text("\n".join(lines) + "\n")

    return change


FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing label": (_line('{"text": "oak"}'), ("train.jsonl", "4", "label")),
    "missing text": (_line('{"label": "kind0", "txt": "oak"}'), ("train.jsonl, line 4", "text")),
    "text is a number": (_line('{"label": "kind0", "text": 5}'), ("text", "5")),
    "blank label": (_line('{"text": "oak", "label": " "}'), ("train.jsonl, line 4", "'label'", "leave the row out")),
    "label is no number": (_line('{"text": "oak", "label": NaN}'), ("train.jsonl, line 4", "'label' is nan")),
    "half a character": (
        _line('{"text": "oak \\ud83d", "label": "kind0"}'),
        ("train.jsonl, line 4", "'text'", "ud83d"),
    ),
    "too many digits": (_line('{"text": "oak", "label": ' + "1" * 5000 + "}"), ("train.jsonl, line 4", "digits")),
    "nested without end": (_line('{"text": ' + "[" * 99_999), ("train.jsonl, line 4", "nested too deeply")),
    "half a line": (_line('{"label": "kind0", "te'), ("train.jsonl", "4")),
    "no UTF-8": (lambda path: path.write_bytes(b'{"label": "\xff", "text": "oak"}\n'), ("train.jsonl", "UTF-8")),
    "empty file": (lambda path: path.write_bytes(b""), ("train.jsonl",)),
    "gone": (lambda path: path.unlink(), ("train.jsonl", "no such file")),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_cannot_be_read(tmp_path, capsys, what):
    recipe = tiny.settings(tmp_path, "lora")
    change, words = FILES[what]
    change(tmp_path / "train.jsonl")
    refused(tmp_path, capsys, recipe, *words)


def test_a_truncated_archive(tmp_path, capsys):
    recipe = tiny.settings(tmp_path, "lora")
    _cut(tmp_path / "train.jsonl")
    recipe["stream"]["source"]["path"] = str(tmp_path / "train.jsonl.gz")
    refused(tmp_path, capsys, recipe, "train.jsonl.gz", "truncated")


def test_a_wrong_row_of_the_last_experience_is_found_before_the_first_is_learnt(tmp_path, capsys):
    recipe = tiny.settings(tmp_path, "lora")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[-1]["prompt"] = rows[-1].pop("text")  # a row that a reader may take, and classification cannot
    tiny.write_rows(tmp_path / "train.jsonl", rows)
    refused(tmp_path, capsys, recipe, "experience 2", "train row 19", "'text'")


def test_an_experience_of_an_unknown_class(tmp_path, capsys):
    recipe = tiny.settings(tmp_path, "lora")
    recipe["stream"] |= {"experiences": [["kind0", "kind1"], ["kind9"]], "classes": [*(f"kind{n}" for n in range(10))]}
    refused(tmp_path, capsys, recipe, "kind9")


def test_an_experience_without_classes(tmp_path, capsys):
    recipe = tiny.settings(tmp_path, "lora")
    recipe["stream"]["experiences"] = [["kind0", "kind1"], []]
    refused(tmp_path, capsys, recipe, "experiences.1", "is empty", "name at least one label")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_experience_without_rows(tmp_path, capsys, split):
    recipe = tiny.settings(tmp_path, "moram", **tiny.language(tmp_path))
    (tmp_path / f"{split}1.jsonl").write_text("\n\n")
    refused(tmp_path, capsys, recipe, f"{split}1.jsonl", "is empty", "at least one row")


# ---- model folders
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from perdure.models import load_model

    folder = tmp_path_factory.mktemp("model")
    model, tokenizer, _ = load_model(tiny.MODEL)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _copy(saved: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, folder / "model"))


def _other_tokenizer(model: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for path in model.glob("*token*"):
        path.unlink()
    plain = Tokenizer(
        models.WordLevel({f"w{n}": n for n in range(999)} | {"[UNK]": 999, "[PAD]": 1000}, unk_token="[UNK]")
    )
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(model)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


MODELS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("no weights", "model.safetensors")),
    "half the weights": (lambda m: _half(m / "model.safetensors"), ("weights",)),
    "no configuration": (lambda m: (m / "config.json").unlink(), ("config.json",)),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("*token*")], ("tokenizer",)),
    "tokenizer of another model": (_other_tokenizer, ("tokenizer", "does not fit", "1001")),
}


@pytest.mark.parametrize("what", MODELS)
def test_model_folders_that_cannot_be_used(tmp_path, capsys, saved, what):
    change, words = MODELS[what]
    model = _copy(saved, tmp_path)
    change(model)
    refused(tmp_path, capsys, {**tiny.settings(tmp_path, "lora"), "model": str(model)}, "model", *words)


def test_the_untouched_model_folder_is_taken(tmp_path, capsys, saved):
    """The table above refuses because of what was changed, not because of the folder."""
    recipe = {**tiny.settings(tmp_path, "linear_probe", "ridge"), "model": str(_copy(saved, tmp_path))}
    (tmp_path / "tiny.yaml").write_text(yamltext.dump(recipe), encoding="utf-8")
    main_code, err = ends(capsys, "run", str(tmp_path / "tiny.yaml"), f"output_dir={tmp_path / 'run'}")
    assert main_code == 0, err
    assert tiny.report(tmp_path / "run")["details"]["model"]["source"] == "folder"
