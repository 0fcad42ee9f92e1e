"""Tiny models, rows and Trainers that the tests of the Hugging Face callback share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from perdure.processors import ByteTokenizer
from tests.conformance import cases

WORDS = ("ash", "birch", "cedar", "elm", "fir", "oak")


def texts(domain: str, number: int) -> list[dict[str, str]]:
    draw = random.Random(domain)
    return [
        {"prompt": f"{domain} {draw.choice(WORDS)}", "answer": " ".join(draw.choices(WORDS, k=2))}
        for _ in range(number)
    ]


def tokens(rows: list[dict[str, str]], size: int = 32) -> list[dict[str, list[int]]]:
    """Rows as a script would have tokenised them: the loss is on the answer."""
    from perdure.objectives.causal_lm import CausalLM

    encoded = CausalLM(CausalLM.Config(block_size=size)).encode(rows, ByteTokenizer())
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in encoded]


def classes(domain: str, number: int) -> list[dict[str, Any]]:
    """Rows of two classes that differ in their letters."""
    tokenizer, draw = ByteTokenizer(), random.Random(domain)
    rows = []
    for n in range(number):
        text = f"{domain} {'aaaa' if n % 2 else 'zzzz'} {draw.choice(WORDS)}"
        rows.append({"input_ids": list(tokenizer([text])["input_ids"][0]), "labels": n % 2})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    labels = [row["labels"] if isinstance(row["labels"], int) else padded(row["labels"], -100) for row in rows]
    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(labels),
    }


def classifier(dropout: float = 0.0) -> Any:
    import transformers as t

    torch.manual_seed(5)
    config = t.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return t.BertForSequenceClassification(config)


def arguments(folder: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 64, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "num_train_epochs": 1, "logging_steps": 1,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def trainer(folder: Path, model: Any, rows: Any, evals: Any = None, **changes: Any) -> Any:
    from transformers import Trainer

    class InOrder(Trainer):
        order: Any = None
        """Row numbers in the order in which they are taken; that of the rows where absent."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return self.order or list(range(len(self.train_dataset)))

    return InOrder(model, arguments(folder, **changes), train_dataset=rows, eval_dataset=evals, data_collator=collate)


def language_model(name: str = "llama") -> Any:
    return cases.build_host(name)[0]
