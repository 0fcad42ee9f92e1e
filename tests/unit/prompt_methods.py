"""What the tests of prompt methods share: rows, learners, larger prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from perdure.learner import Learner
from perdure.processors import ByteTokenizer
from perdure.streams import Experience


def texts(index: int, last: bool = False) -> Experience:
    rows = [
        {"text": w * n + " " + w, "label": w}
        for w in ("abcd"[2 * index], "abcd"[2 * index + 1])
        for n in (2, 3, 5, 7, 9, 11)
    ]
    return Experience(index, f"e{index}", train=rows, test=rows, last=last)


def prose(index: int) -> Experience:
    rows = [{"text": "abcd"[index] * n + " some words " + "abcd"[index] * n} for n in (3, 4, 5, 6)]
    return Experience(index, f"e{index}", train=rows, test=rows)


def learner(model: nn.Module, method: Any, objective: Any = None, protocol: Any = None, **more: Any) -> Learner:
    training = {"learning_rate": 1e-2, "head_learning_rate": 1e-2, "per_device_train_batch_size": 4, **more}
    return Learner(
        model, ByteTokenizer(), method=method, objective=objective or {"classification": {"max_length": 32}},
        training=training, protocol={"mask": "seen", **(protocol or {})}, seed=1,
    )  # fmt: skip


def strong(made: Any, scale: float = 300.0) -> Any:
    """Larger prompts than new ones, so that they matter visibly."""
    with torch.no_grad():
        for name, tensor in (*made.model.named_parameters(), *made.model.named_buffers()):
            if name.rsplit(".", 1)[-1] in ("prompts", "P", "new_P", "old_P"):
                tensor.mul_(scale)
    return made


def clones(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
