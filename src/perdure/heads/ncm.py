"""Nearest class mean: a class is the mean of its features. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..data import wide
from ._fitted import ClassMeansHead, DriftConfig
from ._head import register

if TYPE_CHECKING:
    from torch import Tensor


@register("ncm")
class NearestClassMean(ClassMeansHead):
    """Nearest class mean, by cosine or by distance.

    μ_c = mean of the features of class c over the stream;  cosine: scores = (f/‖f‖) (μ_c/‖μ_c‖)ᵀ;  euclidean:
    scores = −‖f − μ_c‖².  With `cosine` and frozen features this is SimpleCIL (Zhou et al. 2023, arXiv 2303.07338:
    the mean of the features as they are is the weight of a cosine classifier).

    One pass, order of no matter. With `recentre` means of old classes move by the drift estimated after Semantic Drift
    Compensation (Yu et al. 2020, which uses `euclidean` on features of unit norm); with `refresh` they are means of the
    rows in the replay buffer, exact for a class of which the buffer holds all rows.

    State: means and counts in float64.
    """

    closed_form = True

    class Config(DriftConfig):
        metric: Literal["cosine", "euclidean"] = "cosine"
        """How near a mean is: SimpleCIL has the cosine, SDC the distance."""

    config: NearestClassMean.Config

    def _fit(self, seed: int) -> None:
        """The means are the weights."""

    def logits(self, features: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import normalize

        with torch.autocast(features.device.type, enabled=False):
            features = wide(features)
            means = self.means.to(features.dtype)
            if self.config.metric == "cosine":
                return self.among_known(normalize(features, dim=-1) @ normalize(means, dim=-1).T)
            squares = features.square().sum(1, keepdim=True) + means.square().sum(1)
            return self.among_known(2 * features @ means.T - squares)
