"""Feature distillation: the features of new rows stay near those that the last model gives them.

FeatKD of a rehearsal-free comparison (second-hand; the paper was not at hand), which found that it
rarely helps. With z [B, D] the pooled features of a batch and z⁻ those of the model at the last boundary:

    L = L_now + λ · 1/B Σ_rows ‖z − z⁻‖²

| symbol | attribute |
|---|---|
| λ | `strength` |

z is what the head sees: pooled, in CLIP the image's embedding (and the caption's, where rows have one). The head is not
touched by it and stays free to move.

Stored: the learnt state of the last boundary, in memory a frozen copy of what trains. Cost: one more forward pass a
step. Removal: rollback. INFERRED: λ, for which our source gives no number. Deviation: the source speaks of features of
a layer l; inner layers are not offered.

Not for language modelling, whose rows have no pooled feature (`lwf` holds what it gives), nor beside methods that leave
the features frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..config import MethodConfig
from ..data import wide
from ..errors import BadInput
from ._method import Method, register
from ._refusals import refuse_joint

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Batch, Output
    from ..hosts import Host
    from ..streams import Experience


@register("feat_kd")
class FeatKD(Method):
    """Feature distillation: features of new rows stay near the last model's."""

    class Config(MethodConfig):
        strength: float = Field(1.0, ge=0)
        """λ. No published number is known to us."""

    needs = frozenset({"old_model", "features"})
    status = "verified"
    citation = "FeatKD of the rehearsal-free comparison, second-hand"

    def attach(self, host: Host) -> None:
        if not hasattr(self, "loop"):  # the public `attach`
            return
        refuse_joint(self)
        if self.loop.predicts_tokens:
            raise BadInput(
                "method.feat_kd: a language model is scored at every token and its rows have no pooled feature that a "
                "head sees, so there is none to hold; use lwf, which holds the scores"
            )
        frozen = [method.name for method in self.loop.methods if method.frozen_features]
        if frozen and not any(method.adapts for method in self.loop.methods):
            raise BadInput(
                f"method.feat_kd: {' and '.join(frozen)} never changes the features, so they are held already; remove "
                "feat_kd"
            )

    def after_experience(self, experience: Experience) -> None:
        self.values["learnt"] = True

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if "learnt" not in self.values or not self.loop.has_previous_model:
            return {}
        old, labels = self.loop.previous_model(batch), batch.labels
        pairs = ((output.features, old.features), (output.other_features, old.other_features))
        apart = sum((wide(z) - wide(kept)).square().sum(-1) for z, kept in pairs if z is not None and kept is not None)
        assert labels is not None and not isinstance(apart, int)
        counted = labels != -100  # not the rows that fill a process up
        return {"distance": self.config.strength * (apart * counted).sum() / counted.sum().clamp_min(1)}
