"""Sensitivity of frozen weights and the masks taken from it: which weights a new experience would move.

INFERRED: a squared gradient is the diagonal of the empirical Fisher information with one gradient a row, and a cheap
stand-in for it with one a batch; |weight times gradient| is SNIP's criterion (Lee et al. 2019, from memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from ..errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..data import Rows
    from ..hosts import Site
    from ._method import Method

Score = Literal["fisher", "snip", "random"]


class Sensitivity:
    """Gradients of the weights at `sites`, asked for through the loop's service.

    The service gives gradients of what trains: `owner.parameter_groups` must return `[self.group]` while that is set.

    Raises:
        BadInput: a weight is quantised, shared with another module, or not in memory.
    """

    def __init__(self, owner: Method, sites: list[Site], score: Score):
        self.owner, self.sites, self.score = owner, sites, score
        self._weights = {site.path: site.parameter("a sparse weight delta") for site in sites}
        self.group: dict[str, list[tuple[str, nn.Parameter]]] | None = None

    def measure(self, rows: Rows, *, most: int, per_sample: bool, after: Callable[[], None]) -> dict[str, Tensor]:
        """S [d_out, d_in] by site: mean over batches (or rows) of (dL/dW)² or |W dL/dW|. One counted pass.

        Args:
            rows: of which `most`, evenly spaced, are taken at the most.
            after: called after each forward and backward pass.
        """
        from ..loading import evenly

        sums: dict[str, Tensor] = {}
        passes = 0
        self.group = {"params": [(f"probe/{path}", weight) for path, weight in self._weights.items()]}
        try:
            for found in self.owner.loop.gradients(evenly(rows, most), per_sample=per_sample):
                after()
                passes += 1
                mine = {name.split("/", 2)[-1]: gradient for name, gradient in found.items()}
                for path, weight in self._weights.items():
                    gradient = mine[f"probe/{path}"].float()
                    score = (weight.detach() * gradient).abs() if self.score == "snip" else gradient.square()
                    sums[path] = sums[path] + score if path in sums else score
        finally:
            self.group = None
        return {site.name: site.part(sums[site.path]) / passes for site in self.sites}

    def masks(
        self, scores: dict[str, Tensor], density: float, spread: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Positions of the weights to take, by site, in rising order; at random for the score `random`.

        Args:
            density: share of all weights. spread: how far a map's own share may lie from it, as a factor.
        """
        import torch

        from ..memory.routing import allocate, select

        random = self.score == "random"
        if not random and not any(bool(score.any()) for score in scores.values()):
            raise BadInput(
                f"method.{self.owner.name}.score: no adapted weight has a gradient on these rows, so {self.score} "
                "cannot rank them; use random, or give other rows"
            )
        sums, sizes = [float(s.sum()) for s in scores.values()], [s.numel() for s in scores.values()]
        counts = allocate(sums, sizes, density, 1.0 if random else spread)
        masks = {}
        for (name, score), count in zip(scores.items(), counts, strict=True):
            drawn = torch.rand(score.numel(), generator=generator).to(score.device) if random else score.flatten()
            masks[name] = select(drawn, count).sort().values if count else drawn[:0].long()
        return masks
