"""Optimizer, schedule and clipping over named parameters. The schedule is a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig
from .errors import BadInput
from .optim_rows import RowAdamW, RowSGD
from .state import load_optimizer_state, optimizer_state


def rate_factor(training: TrainingConfig, step: int, total: int) -> float:
    """Learning-rate factor in [0, 1] of 0-based `step` of `total`: linear warm-up, then constant, linear or cosine."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    if training.lr_scheduler == "constant":
        return 1.0
    progress = (step - training.warmup_steps) / max(1, total - training.warmup_steps)
    if training.lr_scheduler == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


OPTIONS = {
    "adamw": frozenset({"params", "lr", "weight_decay", "betas", "eps", "rows"}),
    "sgd": frozenset({"params", "lr", "weight_decay", "momentum", "dampening", "nesterov", "rows"}),
}
"""Optimizer -> what a group may say; the rest is the training's."""


class Optimization:
    """The optimizers of one experience, fresh at its start; one for each kind that the groups ask for.

    Args:
        training: rates, optimizer and clipping.
        groups: dicts with `params` as (name, Parameter) pairs and `lr`; `weight_decay`, `optimizer` ("adamw", "sgd")
            and that optimizer's own options where they differ from the training's. With `rows` true a row without a
            gradient stands still (see `optim_rows`).
        keep: an earlier one whose moments are taken over for parameters that live on, and for the old rows of heads
            that grew. New atoms of a bank have the name of those before them and start fresh.

    Raises:
        BadInput: a group asks for an optimizer or an option that does not exist.
    """

    def __init__(self, training: TrainingConfig, groups: list[dict[str, Any]], keep: Optimization | None = None):
        self.training = training
        self.named: list[tuple[str, nn.Parameter]] = [pair for group in groups for pair in group["params"]]
        self.kinds: dict[str, torch.optim.Optimizer] = {}
        kinds = [group.get("optimizer") or training.optimizer for group in groups]
        for kind in dict.fromkeys(kinds):
            own = [_plain(kind, group) for group, asked in zip(groups, kinds, strict=True) if asked == kind]
            self.kinds[kind] = self._build(kind, own)
        if keep is not None:
            self._take_over(keep)

    def _build(self, kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        training, by_rows = self.training, any(group.get("rows") for group in groups)
        if kind == "sgd":
            sgd = RowSGD if by_rows else torch.optim.SGD
            return sgd(groups, lr=training.learning_rate, weight_decay=training.weight_decay)
        # One kernel for the whole step: a quarter of the time of a loop over the parameters for a whole MiniLM.
        every = [parameter for group in groups for parameter in group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in every)
        adamw = RowAdamW if by_rows else torch.optim.AdamW
        return adamw(
            groups, betas=(training.adam_beta1, training.adam_beta2), weight_decay=training.weight_decay, fused=fused
        )

    def _take_over(self, keep: Optimization) -> None:
        old = dict(keep.named)
        for kind, optimizer in self.kinds.items():
            before_all = keep.kinds.get(kind)
            if before_all is None:
                continue
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for name, parameter in self.named:
                before = old.get(name)
                state = None if before is None else before_all.state.get(before)
                if id(parameter) not in own or before is None or not state:
                    continue
                if before is parameter:
                    optimizer.state[parameter] = state
                elif (
                    name.startswith("head/")
                    and before.shape[1:] == parameter.shape[1:]
                    and len(before) < len(parameter)
                ):
                    optimizer.state[parameter] = {key: _longer(v, before, parameter) for key, v in state.items()}

    def clip(self) -> Tensor | None:
        """Clips the gradients; returns their norm before, or None where no limit is set."""
        if self.training.max_grad_norm is None:
            return None
        return nn.utils.clip_grad_norm_([p for _, p in self.named], self.training.max_grad_norm)

    def rate(self, parameter: nn.Parameter) -> float | None:
        """Learning rate, schedule included, of the group that holds `parameter`; None where it does not train."""
        for optimizer in self.kinds.values():
            for group in optimizer.param_groups:
                if any(parameter is each for each in group["params"]):
                    return float(group["lr"])
        return None

    def values(self) -> dict[str, Tensor]:
        """Copies of all trained parameters, for methods that compare before and after the step."""
        return {name: p.detach().clone() for name, p in self.named}

    def step(self, step: int, total: int) -> None:
        factor = rate_factor(self.training, step, total)
        for optimizer in self.kinds.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            # The fused kernels do not, and evaluation keeps what it derived from a tensor as long as its version stays.
            torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])

    def zero_grad(self) -> None:
        for optimizer in self.kinds.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {"kinds": {}}
        for kind, optimizer in self.kinds.items():
            found, values["kinds"][kind] = optimizer_state(optimizer, self.named)
            tensors |= found
        return tensors, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        # A state from when there was one optimizer for all has its values bare.
        kinds = values.get("kinds", {self.training.optimizer: values})
        if set(kinds) != set(self.kinds):
            raise BadInput(
                f"training: the state is of the optimizers {', '.join(sorted(kinds))}, the run has "
                f"{', '.join(sorted(self.kinds))}; resume with the optimizers that the run was started with"
            )
        for kind, optimizer in self.kinds.items():
            load_optimizer_state(optimizer, self.named, tensors, kinds[kind])


def _plain(kind: str, group: dict[str, Any]) -> dict[str, Any]:
    """The group as torch takes it."""
    group = {key: value for key, value in group.items() if key != "optimizer"}
    if kind not in OPTIONS:
        raise BadInput(f"parameter group: there is no optimizer {kind!r}; choose {' or '.join(OPTIONS)}")
    unknown = sorted(set(group) - OPTIONS[kind])
    if unknown:
        raise BadInput(
            f"parameter group: {kind} has no option {', '.join(unknown)}; it has {', '.join(sorted(OPTIONS[kind]))}"
        )
    if group.get("rows") and group.get("momentum"):
        raise BadInput("parameter group: rows and momentum do not go together; use adamw, or leave one out")
    return {**group, "params": [parameter for _, parameter in group["params"]], "base_lr": group["lr"]}


def _longer(value: Any, before: Tensor, after: Tensor) -> Any:
    """Moments of a parameter that got more rows: those of the new rows are zero."""
    if not isinstance(value, Tensor) or value.shape != before.shape:
        return value
    return torch.cat([value, value.new_zeros(len(after) - len(before), *after.shape[1:])])
