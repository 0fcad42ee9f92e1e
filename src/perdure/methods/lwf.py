"""LwF: learning without forgetting, the old model's outputs on new rows are distilled into the new one.

Li & Hoiem 2016, "Learning without Forgetting" (cited from memory, not re-read); called PredKD in rehearsal-free
comparisons. With z the model's scores, z⁻ those of the model at the last boundary, both for the rows of this batch:

    L = L_now + α · mean KL( softmax(z⁻ / T) ‖ softmax(z / T) )

over the classes learnt before this experience (one softmax over all of them, as class-incremental streams have no task
at test), or, for language models, over the vocabulary at each answer token. KL and cross-entropy with z⁻ have the same
gradient; KL is zero where nothing has changed. No factor T²: multiply α by it where a source has one.

| symbol | setting |
|---|---|
| α, T | `strength`, `temperature` |

Stored: the learnt state of the last boundary (adapter and head, not the frozen base), in memory a frozen copy of what
trains. Cost: one more forward pass a step. Removal: rollback.

The head: the old head gives the targets for its classes; rows of new classes get no target. With `protocol.mask:
current` the loss of new rows leaves old scores alone and distillation keeps them; with `seen` the two work against each
other on the same scores. Behind a closed-form head the auxiliary head's scores are distilled. Rehearsed rows are
distilled as well. Class texts (CLIP): scores of images against texts of old classes, which stand still in an
experience.

Deviations: no warm-up of the new head before the rest trains (the paper and mammoth have one). TRACE's release (read,
not run) passes the two distributions in the reverse order, so that it takes KL(new ‖ old); sums over prompt and padding
tokens; and stores the old scores by number of the step rather than by row. None of that here. PredKD's binary form
(sigmoid scores) is left out: the objectives here have softmax losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..config import MethodConfig
from ..data import wide
from ._method import Method, register
from ._refusals import refuse_captions, refuse_joint

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Batch, Output
    from ..hosts import Host
    from ..streams import Experience


@register("lwf")
class LwF(Method):
    """LwF: the last model's outputs for old classes are distilled on new rows."""

    class Config(MethodConfig):
        strength: float = Field(0.5, ge=0)
        """α. mammoth: .5."""
        temperature: float = Field(2.0, gt=0)
        """T. Published: 2."""

    needs = frozenset({"old_model"})
    status = "unverified"
    citation = "Li & Hoiem 2016"

    def attach(self, host: Host) -> None:
        if hasattr(self, "loop"):  # absent under the public `attach`
            refuse_joint(self)

    def before_experience(self, experience: Experience) -> None:
        refuse_captions(self, experience, "they have no class whose score could be kept; use feat_kd")

    def after_experience(self, experience: Experience) -> None:
        self.values["classes"] = len(self.loop.labels)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        from torch.nn.functional import kl_div

        if "classes" not in self.values or not self.loop.has_previous_model:
            return {}
        old, new, labels = self.loop.previous_model(batch).logits, output.logits, batch.labels
        assert old is not None and new is not None and labels is not None
        if new.dim() == 3:  # the score at a token is of the next one
            counted = labels[:, 1:] != -100
            old, new = old[:, :-1][counted], new[:, :-1][counted]
        else:
            classes, counted = self.values["classes"], labels != -100
            old, new = old[counted][:, :classes], new[counted][:, :classes]
        shares = [(wide(scores) / self.config.temperature).log_softmax(-1) for scores in (new, old)]
        apart = kl_div(*shares, reduction="sum", log_target=True) / max(1, len(new))
        return {"distillation": self.config.strength * apart}
