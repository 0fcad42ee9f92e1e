"""perdure's part of a Trainer's step: optimizer groups, losses, projections, updates; in the order of our own loop."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..data import Batch, Output
from ..errors import BadInput
from ..optim_rows import RowAdamW
from .loop import TrainerLoop


class Steps:
    """Takes the place of three methods of one Trainer, which are called inside.

    Args:
        trainer: whose `create_optimizer`, `compute_loss` and `training_step` are wrapped, whatever class they are of.
        loop: the learner that the methods belong to.
    """

    def __init__(self, trainer: Any, loop: TrainerLoop):
        self.trainer, self.loop = trainer, loop
        self.learning = False
        self._before: dict[str, Tensor] = {}
        self._compute_loss, self._training_step = trainer.compute_loss, trainer.training_step
        trainer.create_optimizer = self.create_optimizer
        trainer.compute_loss, trainer.training_step = self.compute_loss, self.training_step

    def remove(self) -> None:
        """Gives the Trainer its own methods back."""
        for name in ("create_optimizer", "compute_loss", "training_step"):
            vars(self.trainer).pop(name, None)

    # ---- the optimizer
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that `TrainingArguments.optim` asks for, over what trains in this experience.

        Raises:
            BadInput: that optimizer takes no parameter groups, or a method needs another one.
        """
        trainer = self.trainer
        if trainer.optimizer is not None:
            return trainer.optimizer
        kind, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
            trainer.args, trainer.model
        )
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or (
            {"params", "model", "optimizer_dict"} & set(settings)
        ):
            raise BadInput(
                f"TrainingArguments.optim: {trainer.args.optim} chooses its parameters itself; use adamw_torch, "
                "adamw_torch_fused, sgd or adafactor"
            )
        groups = self.loop._groups()
        for parameter in self.loop.model.parameters():  # what trained in an earlier experience may stand still now
            parameter.requires_grad_(False)
        for group in groups:
            for _, parameter in group["params"]:
                parameter.requires_grad_(True)
        if any(group.get("rows") for group in groups):
            if kind is not torch.optim.AdamW:
                raise BadInput(
                    f"TrainingArguments.optim: a method trains row by row, which {kind.__name__} cannot; use "
                    "adamw_torch, or the method's setting row_wise: false"
                )
            kind = RowAdamW
        trainer.optimizer = kind([self._plain(group) for group in groups], **settings)
        return trainer.optimizer

    def _plain(self, group: dict[str, Any]) -> dict[str, Any]:
        if group.get("optimizer"):
            raise BadInput(
                f"method: asks for the optimizer {group['optimizer']}, and the Trainer has one for all; train with "
                "perdure.Learner"
            )
        named = {key: value for key, value in group.items() if key != "optimizer"}
        decay = {"weight_decay": self.trainer.args.weight_decay}
        return {**decay, **named, "params": [parameter for _, parameter in group["params"]]}

    # ---- the loss
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self._training_step(*args, **kwargs)
        if self.learning and self.trainer.accelerator.sync_gradients:  # gradients are complete, and clipped next
            for method in self.loop.methods:
                method.after_backward()
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's own loss and, in training, what the methods add to it."""
        if not self.learning or not model.training:
            return self._compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loop = self.loop
        batch = loop.batch_of(inputs)  # before the Trainer takes `labels` out or puts its own keys in
        for method in loop.methods:
            batch = method.before_step(batch)
        with loop.observing(batch) if self._logged else nullcontext():
            loss, outputs = self._compute_loss(model, inputs, True, num_items_in_batch)
        output = Output(logits=outputs.get("logits") if hasattr(outputs, "get") else None, host=outputs)
        share, log = self._share(batch, num_items_in_batch), {"loss": loss}
        for method in loop.methods:
            for name, extra in method.losses(batch, output).items():
                log[f"{method.name}.{name}"] = extra * share
        loop.counters.samples += len(batch)
        loss = torch.stack([value.to(loss.device) for value in log.values()]).sum() if len(log) > 1 else loss
        loop._refuse_non_finite(loss, "loss", log)
        return (loss, outputs) if return_outputs else loss

    @property
    def _logged(self) -> bool:
        return self.loop.counters.steps % max(1, int(self.trainer.state.logging_steps or 1)) == 0

    def _share(self, batch: Batch, items: Any) -> Any:
        """A method's losses are means over a batch: what this batch counts for in the step, as the Trainer weighs it.

        Where the Trainer divides a mean by the number of batches itself, 1.
        """
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        if not scaled:
            return 1.0
        if items is None:
            return 1.0 / trainer.current_gradient_accumulation_steps
        assert batch.labels is not None
        labels = batch.labels[..., 1:] if getattr(trainer, "_loss_shifts_labels", False) else batch.labels
        return (labels != -100).sum() / torch.as_tensor(items).clamp(min=1).to(labels.device)

    # ---- around the optimizer's step
    def before_update(self) -> None:
        loop = self.loop
        loop._bookmark = None  # from here on the experience leaves a trace
        if any(method.needs_before_update for method in loop.methods):
            self._before = {name: p.detach().clone() for name, p in loop.named_trainable()}

    @torch.no_grad()
    def after_update(self) -> None:
        loop = self.loop
        # Fused kernels do not, and evaluation keeps what it derived from a tensor as long as its version stays.
        torch.autograd.graph.increment_version([p for _, p in loop.named_trainable()])
        for method in loop.methods:
            method.after_update(self._before)
        self._before = {}

    def after_step(self) -> None:
        loop = self.loop
        for method in loop.methods:
            method.after_step()
        loop.position.step += 1
        loop.counters.steps += 1
