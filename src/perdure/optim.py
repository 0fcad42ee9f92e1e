"""Optimizer, schedule and clipping over named parameters. The schedule is a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig
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


class Optimization:
    """The optimizer of one experience, fresh at its start.

    Args:
        training: rates, optimizer and clipping.
        groups: dicts with `params` as (name, Parameter) pairs and `lr`; `weight_decay` where it differs. With
            `rows` true a row without a gradient stands still (see `optim_rows`).
        keep: an earlier one whose moments are taken over for parameters that live on, and for the old rows of heads
            that grew. New atoms of a bank have the name of those before them and start fresh.
    """

    def __init__(self, training: TrainingConfig, groups: list[dict[str, Any]], keep: Optimization | None = None):
        self.training = training
        self.named: list[tuple[str, nn.Parameter]] = [pair for group in groups for pair in group["params"]]
        plain = [{**group, "params": [p for _, p in group["params"]], "base_lr": group["lr"]} for group in groups]
        by_rows = any(group.get("rows") for group in groups)
        if training.optimizer == "adamw":
            # One kernel for the whole step: a quarter of the time of a loop over the parameters for a whole MiniLM.
            fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for _, p in self.named)
            kind = RowAdamW if by_rows else torch.optim.AdamW
            self.optimizer: torch.optim.Optimizer = kind(
                plain, betas=(training.adam_beta1, training.adam_beta2), weight_decay=training.weight_decay, fused=fused
            )
        else:
            kind = RowSGD if by_rows else torch.optim.SGD
            self.optimizer = kind(plain, lr=training.learning_rate, weight_decay=training.weight_decay)
        if keep is not None:
            self._take_over(keep)

    def _take_over(self, keep: Optimization) -> None:
        old = dict(keep.named)
        for name, parameter in self.named:
            before = old.get(name)
            state = None if before is None else keep.optimizer.state.get(before)
            if before is None or not state:
                continue
            if before is parameter:
                self.optimizer.state[parameter] = state
            elif name.startswith("head/") and before.shape[1:] == parameter.shape[1:] and len(before) < len(parameter):
                self.optimizer.state[parameter] = {key: _longer(v, before, parameter) for key, v in state.items()}

    def clip(self) -> Tensor | None:
        """Clips the gradients; returns their norm before, or None where no limit is set."""
        if self.training.max_grad_norm is None:
            return None
        return nn.utils.clip_grad_norm_([p for _, p in self.named], self.training.max_grad_norm)

    def values(self) -> dict[str, Tensor]:
        """Copies of all trained parameters, for methods that compare before and after the step."""
        return {name: p.detach().clone() for name, p in self.named}

    def step(self, step: int, total: int) -> None:
        factor = rate_factor(self.training, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return optimizer_state(self.optimizer, self.named)

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, self.named, tensors, values)


def _longer(value: Any, before: Tensor, after: Tensor) -> Any:
    """Moments of a parameter that got more rows: those of the new rows are zero."""
    if not isinstance(value, Tensor) or value.shape != before.shape:
        return value
    return torch.cat([value, value.new_zeros(len(after) - len(before), *after.shape[1:])])
