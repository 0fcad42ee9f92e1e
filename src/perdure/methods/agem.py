"""A-GEM: averaged gradient episodic memory, a gradient that does not point against the past.

Chaudhry, Ranzato, Rohrbach, Elhoseiny 2019, "Efficient Lifelong Learning with A-GEM" (citation from memory; no equation
numbers at hand). The projection was checked against the code of Mammoth. With g the gradient of the current batch and
g_ref that of the mean loss on `per_step` rows drawn from memory, all trained parameters as one vector:

    g ← g − (g · g_ref / ‖g_ref‖²) g_ref      if g · g_ref < 0,   else g

so that g · g_ref ≥ 0: to first order an SGD step along −g does not raise the loss on the drawn rows.

| symbol | attribute |
|---|---|
| g | the gradients when the step's backward passes are complete, before clipping |
| g_ref | the loop's `gradients` on the draw: one extra pass a step, counted |

The memory holds past experiences alone: where boundaries are known its rows come at the end of an experience, from a
reservoir over all rows of the stream, so that the first experience is not constrained. Without boundaries rows come as
they are seen, and recent ones take part.

What it does not do: g · g_ref ≥ 0 holds for the gradient. Momentum, Adam and weight decay make other steps of it, which
may point against the past. Its guarantee is that of plain SGD (`training.optimizer: sgd`, no weight decay).

Stored: `budget` rows; one gradient, as large as what trains, during a step. Cost: a forward and backward pass over
`per_step` rows a step (not a micro-batch). Removal: rollback.

Deviations: g_ref is taken in evaluation mode (no dropout, no augmentation), Mammoth's in training mode; all classes
seen compete in it. Mammoth keeps one batch of each task; here the memory is a uniform sample of all past rows. How the
paper fills its memory was not at hand. Budget and draw are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..config import MethodConfig
from ._method import Method, register

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Batch, Output
    from ..streams import Experience


@register("agem")
class AGEM(Method):
    """A-GEM: the gradient is projected where it points against that of remembered rows."""

    class Config(MethodConfig):
        budget: int = Field(200, ge=1)
        """Rows stored at the most; the protocol's `rehearsal` must grant them. Ours, as `er`."""
        per_step: int = Field(16, ge=1)
        """Rows drawn for the reference gradient of every step. Ours, as `er`."""

    needs = frozenset({"rehearsal", "gradients"})
    status = "unverified"
    citation = "Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM"

    def requires_rehearsal(self) -> int:
        return self.config.budget

    def before_step(self, batch: Batch) -> Batch:
        if not self.loop.knows_boundaries:
            self.loop.remember(batch)
        return batch

    def after_experience(self, experience: Experience) -> None:
        if self.loop.knows_boundaries:
            self.loop.replay.add(experience.train)

    def after_backward(self) -> None:
        import torch

        rows = self.loop.replay.sample(self.config.per_step, self.loop.generator)
        self._projected = None
        if not rows:
            return
        reference = self._reference(rows)
        with torch.no_grad():
            trained = dict(self.loop.trained())
            held = [(p.grad, reference[name]) for name, p in trained.items() if p.grad is not None]
            dot = torch.stack([(g.double() * r.double()).sum() for g, r in held]).sum()
            norm = torch.stack([r.double().square().sum() for r in reference.values()]).sum()
            self._projected = bool(dot < 0)
            if not self._projected:
                return
            for name, parameter in trained.items():
                away = (dot / norm).to(parameter.dtype) * reference[name]
                parameter.grad = -away if parameter.grad is None else parameter.grad - away

    def _reference(self, rows: list) -> dict[str, Tensor]:
        """The gradient of the mean loss on all rows, whatever batches they come in."""
        counted: list[Tensor] = []

        def summed(batch: Batch, output: Output) -> Tensor:
            value, count = self.loop.loss_sum(batch, output)
            counted.append(count)
            return value

        total: dict[str, Tensor] = {}
        for gradients in self.loop.gradients(rows, summed):
            total = {name: total[name] + g if total else g for name, g in gradients.items()}
        count = sum(counted).clamp(min=1)  # type: ignore[union-attr]
        return {name: gradient / count for name, gradient in total.items()}

    def after_step(self) -> None:
        if self._projected is not None:
            told = self.values
            self.values = {
                "steps": told.get("steps", 0) + 1, "projected": told.get("projected", 0) + int(self._projected),
            }  # fmt: skip

    def plasticity(self) -> dict[str, float]:
        """`projected_steps`: share of the steps with a memory in which the gradient pointed against it."""
        steps = self.values.get("steps", 0)
        return {"projected_steps": self.values["projected"] / steps} if steps else {}
