"""Early stopping: validation rows decide how much of an experience is learnt.

Every n steps the training loss is measured on the experience's own validation rows; when it has not fallen for some
looks, training of the experience ends, and what trains by gradient goes back to where the loss was lowest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .bookkeeping import quiet
from .errors import BadInput, ProtocolRefused
from .streams.guarded import Withheld, refuse_test_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from .config import ProtocolConfig, TrainingConfig
    from .methods import Method
    from .stepping import Stepping
    from .streams.experience import Experience


def check_early_stopping(methods: Sequence[Method], training: TrainingConfig, protocol: ProtocolConfig) -> None:
    """Raises BadInput where there is no experience of its own to stop."""
    if training.early_stopping is None:
        return
    if protocol.tuning == "none":
        raise ProtocolRefused(
            "protocol.tuning: is none, but training.early_stopping decides on validation rows when to end; set it to "
            "validation, or remove early_stopping"
        )
    if protocol.boundaries == "none":
        raise BadInput(
            "training.early_stopping: the stream has no boundaries, so no experience can be ended; remove it"
        )
    late = [method.name for method in methods if "all_data" in method.needs]
    if late:
        raise BadInput(
            f"training.early_stopping: {late[0]} trains on all experiences together, and one experience's validation "
            "rows say nothing of that; remove it"
        )


class EarlyStopping:
    """The lowest validation loss of one experience and the parameters that had it.

    Args:
        every: steps between looks. patience: looks without a lower loss after which training ends.
    """

    def __init__(self, every: int, patience: int):
        self.every, self.patience = every, patience
        self.loss = math.inf
        self.step = 0
        self.waited = 0
        self.values: dict[str, Tensor] = {}

    @classmethod
    def of(cls, training: TrainingConfig, experience: Experience) -> EarlyStopping | None:
        """One for this experience, or None where the settings ask for none.

        Pretraining, which all arms share, is not stopped: the loop does not ask then.

        Raises:
            BadInput: there are no validation rows.
            ProtocolRefused: some of them are test rows.
        """
        if training.early_stopping is None:
            return None
        if not len(experience.valid):
            raise BadInput(
                f"training.early_stopping: experience {experience.name!r} has no validation rows; set "
                "stream.validation or give them, or remove early_stopping"
            )
        if not isinstance(experience.test, Withheld):  # else whoever withheld them has looked
            refuse_test_rows(experience)
        return cls(training.early_stopping.every, training.early_stopping.patience)

    @property
    def over(self) -> bool:
        return self.waited >= self.patience

    def after_step(self, loop: Stepping, step: int) -> None:
        """Looks at the validation rows where it is time to; `step` steps are taken, the last one included."""
        if step % self.every and step != loop.steps_planned:
            return
        assert loop.optimization is not None and loop.current is not None
        loss = validation_loss(loop, loop.current)
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, step, 0
            self.values = {name: p.detach().clone() for name, p in loop.optimization.named}
        else:
            self.waited += 1

    def restore(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Puts the best values back; where no loss was finite, all stays."""
        with torch.no_grad():
            for name, parameter in named:
                if name in self.values:
                    parameter.copy_(self.values[name])

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self.values), {"loss": self.loss if self.values else None, "step": self.step, "waited": self.waited}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.values = {name: tensor.clone() for name, tensor in tensors.items()}
        self.loss = math.inf if values["loss"] is None else values["loss"]
        self.step, self.waited = values["step"], values["waited"]


def validation_loss(loop: Stepping, experience: Experience) -> float:
    """Mean training loss on the validation rows, of the head that trains, under the mask of training."""
    total, count = 0.0, 0.0
    with quiet(loop.model), torch.no_grad():
        for batch in loop.scored_batches(experience, "valid", experience.valid):
            batch = loop.with_task(batch, experience.task if loop.protocol.task_id != "none" else None)
            with loop.autocast():
                output = loop.system(batch, True)
                allowed = loop.allowed(batch, output.logits) if output.logits is not None else None
                summed, rows = loop.objective.loss(batch, output, allowed)
            total, count = total + float(summed), count + float(rows)
    return total / count if count else math.inf
