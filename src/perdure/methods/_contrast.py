"""Contrast keys: new keys start along the directions in which the inputs of this experience differ from all before.

For each adapted layer the second moment of the inputs of all past experiences is kept (no example is), as they were
when each began. Ours; drawn keys of a bank's usual start answer every input alike, and a short experience does not turn
them towards its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..data import Rows
    from ..hosts import Site
    from ._method import Method


class InputContrast:
    """Second moments of one method's layers, kept in that method's `tensors`, and the keys that follow from them.

    Args:
        owner: the method whose state holds the statistics.
        most: rows that are looked at, evenly spaced.
    """

    def __init__(self, owner: Method, most: int):
        self.owner, self.most = owner, most

    def keys(self, sites: Sequence[Site], rows: Rows, count: int) -> dict[str, Tensor]:
        """Keys [count, d] by site name, with the norm that drawn keys have; rows then belong to the past. Where count
        is more than 2d they are 2d, since no layer has more directions.

        One counted extra pass over the rows. Empty in the first experience, which has nothing to differ from, and for
        layers that no input has reached.
        """
        from ..loading import evenly
        from ..memory import contrast_directions, paired

        tensors, made = self.owner.tensors, {}
        known: dict[int, tuple[str, Tensor | None]] = {}  # sites with the same input share moments and directions
        for name, moments in self.owner.loop.capture(sites, evenly(rows, self.most)).items():
            if id(moments) not in known:
                key, found = f"contrast/{name}", moments.moment.float()
                directions = None
                if key in tensors:
                    directions = contrast_directions(
                        found, tensors[key].to(found.device), min(-(-count // 2), len(found))
                    )
                    tensors[key] = tensors[key] + found.to(tensors[key].device)
                else:
                    tensors[key] = found
                known[id(moments)] = (key, directions)
            directions = known[id(moments)][1]
            if directions is not None:
                drawn_norm = 3**-0.5  # of a key of d numbers from U(-1/√d, 1/√d)
                made[name] = paired(directions, count) * drawn_norm
        return made
