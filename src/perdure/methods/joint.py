"""Joint training on all experiences together: the upper bound, which breaks the continual protocol on purpose.

Rows of every experience are kept; nothing is learnt before the last one, where all are learnt in one training from the
initial state (`training.epochs` passes over all rows). Combine it with an adapter: `[lora, joint]`; alone it trains the
whole host. Stored: all rows. Removal: only by rollback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import MethodConfig
from ._method import Method, register

if TYPE_CHECKING:
    from ..data import Rows
    from ..streams import Experience


@register("joint")
class Joint(Method):
    """Joint training on everything at the end, the upper bound."""

    class Config(MethodConfig):
        pass

    needs = frozenset({"all_data", "boundaries"})
    status = "upper bound"

    def before_experience(self, experience: Experience) -> None:
        self.loop.replay.add(experience.train)

    def sampler(self, experience: Experience) -> Rows | None:
        return self.loop.replay.rows if experience.last else []
