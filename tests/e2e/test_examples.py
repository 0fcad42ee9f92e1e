"""The examples run as a user would run them: on a tiny model and a few rows, and again after they have ended."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = ["good", "bad", "book", "film", "the", "a", "was", "is", "ask", ":", "answer", "yes", "no"]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[EOS]", *WORDS]
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    ).save_pretrained(folder)


def save_model(folder: Path, language: bool) -> None:
    import torch
    import transformers as t

    torch.manual_seed(0)
    size = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    if language:
        t.LlamaForCausalLM(t.LlamaConfig(**size, eos_token_id=2, bos_token_id=None)).save_pretrained(folder)
    else:
        t.BertForSequenceClassification(t.BertConfig(**size, num_labels=2)).save_pretrained(folder)
    save_tokenizer(folder)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(script: str, folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(EXAMPLES / script), "--model", str(folder / "model"), "--data", str(folder / "data")]
    command += ["--output", str(folder / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check(folder: Path, printed: str, names: list[str]) -> None:
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["status"] == "complete" and report["method"] == "moram"
    assert report["details"]["stream"]["experiences"] == names
    assert all(cell is not None for i, row in enumerate(report["matrix"]) for cell in row[: i + 1])
    assert report["cost"]["steps"] > 0
    assert f"{report['matrix'][1][1]:.3f}" in printed.splitlines()[-2]
    assert (folder / "out" / "kept" / "perdure.json").is_file()


def test_hf_trainer(tmp_path: Path) -> None:
    save_model(tmp_path / "model", language=False)
    (tmp_path / "data").mkdir()
    for domain in ("book", "film"):
        for split, number in (("train", 20), ("test", 6)):
            labelled = [(n % 2, f"the {domain} was {'good' if n % 2 else 'bad'}") for n in range(number)]
            rows = [{"text": text, "label": label} for label, text in labelled]
            write(tmp_path / "data" / f"{domain}.{split}.jsonl", rows)
    arguments = ["--domains", "book", "film", "--learning-rate", "1e-2"]
    printed = run("hf_trainer.py", tmp_path, *arguments)
    check(tmp_path, printed, ["book", "film"])
    assert run("hf_trainer.py", tmp_path, *arguments).splitlines()[-3:] == printed.splitlines()[-3:]  # all was learnt


def test_sft_trainer(tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        end = pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip
        end("NO TRL: pip install 'perdure[sft]'; this test checked nothing")
    save_model(tmp_path / "model", language=True)
    (tmp_path / "data").mkdir()
    for task in ("book", "film"):
        for split, number in (("train", 12), ("test", 4)):
            rows = [
                {"prompt": f"ask : is the {task} {('good', 'bad')[n % 2]} ?", "completion": f" {('yes', 'no')[n % 2]}"}
                for n in range(number)
            ]
            write(tmp_path / "data" / f"{task}.{split}.jsonl", rows)
    printed = run("sft_trainer.py", tmp_path, "--tasks", "book", "film", "--learning-rate", "1e-2")
    check(tmp_path, printed, ["book", "film"])
