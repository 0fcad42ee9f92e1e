"""Experience replay: rows of past experiences from a reservoir are mixed into every batch.

Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (citation from memory, not re-read). Every
training row is offered to the reservoir once (Vitter's algorithm R), so the buffer is a uniform sample of the stream
without knowledge of boundaries. Each batch of b current rows gets `per_step` rehearsed rows; the loss is the mean over
all of them.
With the mask `current`, current rows compete among current classes and rehearsed rows among all classes seen.

Stored: `budget` rows. Cost per token: that of the adapter, times (b + per_step) / b. Removal: rollback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..config import MethodConfig
from ._method import Method, register

if TYPE_CHECKING:
    from ..data import Batch


@register("er")
class ExperienceReplay(Method):
    """Experience replay from a reservoir, beside any adapter or full fine-tuning."""

    class Config(MethodConfig):
        budget: int = Field(200, ge=1)
        """Rows stored at the most; the protocol's `rehearsal` must grant them."""
        per_step: int = Field(16, ge=1)
        """Rehearsed rows added to every batch."""

    needs = frozenset({"rehearsal"})
    status = "verified"

    def requires_rehearsal(self) -> int:
        return self.config.budget

    def before_step(self, batch: Batch) -> Batch:
        buffer = self.loop.replay
        rehearsed = buffer.sample(self.config.per_step, self.loop.generator)
        self.loop.remember(batch)
        return self.loop.extend(batch, rehearsed)
