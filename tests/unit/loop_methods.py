"""Small methods that the tests of the loop use, and what builds a learner for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from perdure.config import MethodConfig
from perdure.learner import Learner
from perdure.methods import Method
from perdure.streams import Experience
from tests.conformance import cases


class Notes:
    """What a recorder has written down; kept apart from it, since a method that keeps rows is refused."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.seen_rows: list[Any] = []
        self.seen: list[Experience] = []
        self.batches: list[Any] = []


NOTES: dict[int, Notes] = {}


class Recorder(Method):
    """Writes down every hook that the loop calls, and trains one vector."""

    name = "recorder"
    adapts = True
    needs_before_update = True

    def __init__(self, config: Any = None):
        super().__init__(config or MethodConfig())
        self._number = len(NOTES)
        NOTES[self._number] = Notes()
        self.modules["vector"] = nn.ParameterDict({"v": nn.Parameter(torch.zeros(16))})

    @property
    def calls(self) -> list[str]:
        return NOTES[self._number].calls

    @property
    def seen_rows(self) -> list[Any]:
        return NOTES[self._number].seen_rows

    @property
    def seen(self) -> list[Experience]:
        return NOTES[self._number].seen

    @property
    def batches(self) -> list[Any]:
        return NOTES[self._number].batches

    def attach(self, host: Any) -> None:
        self.calls.append("attach")

    def detach(self, host: Any) -> None:
        self.calls.append("detach")

    def parameter_groups(self) -> list[dict[str, Any]]:
        self.calls.append("parameter_groups")
        return [{"params": list(self.modules["vector"].named_parameters()), "lr": 0.1}]

    def before_experience(self, experience: Experience) -> None:
        self.calls.append("before_experience")
        self.seen.append(experience)

    def sampler(self, experience: Experience) -> Any:
        self.calls.append("sampler")
        return None

    def transform(self, sample: Any) -> Any:
        self.seen_rows.append(sample)
        return sample

    def before_step(self, batch: Any) -> Any:
        self.calls.append("before_step")
        self.batches.append(batch)
        return batch

    def criterion(self, batch: Any, output: Any) -> Any:  # type: ignore[override]
        self.calls.append("criterion")
        return self.loop_loss(batch, output)

    def loop_loss(self, batch: Any, output: Any) -> Any:
        logits = output.logits + (output.features @ self.modules["vector"]["v"])[:, None]
        return nn.functional.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=-100), len(batch)

    def losses(self, batch: Any, output: Any) -> dict[str, Any]:
        self.calls.append("losses")
        return {"pull": (self.modules["vector"]["v"] - 1).square().sum()}

    def after_backward(self) -> None:
        assert self.modules["vector"]["v"].grad is not None
        self.calls.append("after_backward")

    def after_update(self, before: dict[str, Any]) -> None:
        assert not torch.equal(before["method/0/v"], self.modules["vector"]["v"])
        self.calls.append("after_update")

    def after_step(self) -> None:
        self.calls.append("after_step")

    def after_experience(self, experience: Experience) -> None:
        self.calls.append("after_experience")

    def predict(self, batch: Any, forward: Callable[..., Any]) -> Any:  # type: ignore[override]
        self.calls.append("predict")
        self.batches.append(batch)
        return forward(batch)

    def on_request(self, kind: str, payload: Any) -> Any:
        self.calls.append("on_request")
        return payload


class Distilled(Method):
    """Learning without forgetting on the classes of the old model, full fine-tuning beside it."""

    name = "distilled"
    needs = frozenset({"old_model"})

    def losses(self, batch: Any, output: Any) -> dict[str, Any]:
        if not self.loop.has_previous_model:
            return {}
        old = self.loop.previous_model(batch).logits
        self.values["width"] = old.shape[-1]
        self.values["drawn"] = random.random()  # from Python's own generator, as a careless method might
        self.values["times"] = self.values.get("times", 0) + 1
        return {"distil": (output.logits[:, : old.shape[-1]] - old).square().mean()}


class Peeking(Method):
    """Gives its services to the test."""

    name = "peeking"
    adapts = False


def build(method: Any, host: str = "bert", *, protocol: Any = None, classes: Any = None, **options: Any) -> Learner:
    """A learner on a tiny host; `options` are of the training, but for dropout, dtype and head."""
    dropout, dtype, head = options.pop("dropout", 0.0), options.pop("dtype", torch.float32), options.pop("head", None)
    model, processor = cases.build_host(host, dtype, dropout)
    training = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1} | options
    limit = {"bert": {"max_length": 32}, "vit": {}}.get(host, {"block_size": 32})
    return Learner(
        model, processor, method=method, head=head, objective={cases.OBJECTIVE[host]: limit}, training=training,
        protocol=protocol, seed=3, classes=classes,
    )  # fmt: skip


def copied(state: Any) -> Any:
    import json

    values = json.loads(json.dumps(state[1]))
    values["counters"]["seconds"] = 0.0
    return {name: tensor.detach().clone() for name, tensor in state[0].items()}, values


def differences(found: Any, expected: Any) -> list[str]:
    names = set(found[0]) ^ set(expected[0])
    tensors = [n for n in expected[0] if n in found[0] and not torch.equal(found[0][n], expected[0][n])]
    return [*names, *tensors, *[n for n in expected[1] if found[1].get(n) != expected[1][n]]]
