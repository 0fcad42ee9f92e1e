"""PCR and HPCR: proxy-based contrastive replay, where the classes of a batch alone compete.

Lin, Zhang, Feng, Li, Ye 2023, "PCR: Proxy-based Contrastive Replay for Online Class-Incremental Continual Learning"
(arXiv 2304.04408), and its later form "HPCR: Holistic Proxy-based Contrastive Replay for Online Continual Learning"
(arXiv 2309.15038). Formulas from the authors' released code; the papers were not at hand, so equations have no numbers.
Over the rows of a step, current and rehearsed, each in `views` augmented views, with n_c the rows of class c among them
and z the scores of the head, cosines over τ in the published one:

    L_i = −log exp(z_i,y_i) / Σ_c n_c exp(z_i,c)                     PCR: mean over i

Classes that are not in the batch have n_c = 0 and get no gradient. `holistic: {}` is HPCR, over rehearsed rows i, j,
with z' and f' scores and features stored when the row was seen, known[i, c] where class c was known then:

    τ_s · PCR + α · PCD + β · SCD
    τ_s = low + (high − low) (1 − cos(2π s / period)) / 2            s: step of the experience
    PCD = Σ_i,c n_c known[i, c] (z_i,c − z'_i,c)² / Σ_i,c n_c known[i, c]
    SCD = −mean_i Σ_j≠i softmax_j≠i(f̂'_i · f̂'_j / t) log softmax_j≠i(f̂_i · f̂_j / t)

PCD and SCD from the second experience on, as released; without boundaries from the first rehearsed row on (ours).

| symbol | attribute |
|---|---|
| 1/τ | the scale of the head `cosine`: 11.11, not learnt, is the published τ = 0.09 |
| n_c | counted over the micro-batch, those of all processes together |
| z', f' | fields `logits`, `features` of a stored row |
| low, high, period, α, β, t | `holistic`: the same names, `alpha`, `beta`, `temperature` |

Stored: `budget` rows; with `holistic` 4 (C + D) bytes more a row. Cost per token: that of the adapter, times
views · (b + per_step) / b for b current rows. Removal: rollback.

Deviations: the temperature is the head's own scale, which perdure's `cosine` learns unless told not to; with any other
head the contrast is the same over its scores (ours). The release takes no step while the memory is empty, here current
rows are contrasted among themselves. Its two views are the plain row and an augmented one, here both are augmented as
the objective says (for text they differ by dropout alone: `views: 1` then costs half). Scores of classes that came
after a row have no target; the release's head has all classes from the start. Its reservoir does not shift features
with the rows that no longer fit (not copied). Anchor-to-sample pairs, which the HPCR paper is said to admit for large
batches (second-hand; not the released default), are left out. `protocol.mask` is not used: the batch decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ..config import MethodConfig
from ._method import Method, register
from ._refusals import refuse_captions, refuse_token_scores
from ._rows_with_vectors import vectors_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Batch, Output
    from ..hosts import Host
    from ..streams import Experience


class HolisticConfig(MethodConfig):
    """What makes PCR HPCR; defaults are the released ones."""

    low: float = Field(0.5625, gt=0)
    """Smallest factor on the contrast, 0.09 / 0.16."""
    high: float = Field(1.8, gt=0)
    """Largest factor on the contrast, 0.09 / 0.05."""
    period: int = Field(500, ge=1)
    """Steps from one smallest factor to the next."""
    alpha: float = Field(0.1, ge=0)
    """Weight of the squared error on stored scores (PCD). Released: 0.1, and 0.01 for CIFAR-10."""
    beta: float = Field(0.5, ge=0)
    """Weight of the distilled similarities between rehearsed rows (SCD)."""
    temperature: float = Field(0.09, gt=0)
    """Temperature of these similarities."""

    @model_validator(mode="after")
    def _ordered(self) -> HolisticConfig:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is more than high {self.high}; exchange them")
        return self


@register("pcr")
class ProxyContrastiveReplay(Method):
    """PCR: replay in which only the classes of a batch compete; HPCR with the setting holistic."""

    class Config(MethodConfig):
        budget: int = Field(1000, ge=1)
        """Rows stored at the most; the protocol's `rehearsal` must grant them. Released: 1000 (CIFAR-100)."""
        per_step: int = Field(10, ge=1)
        """Rehearsed rows added to every batch. Released: 10, beside 10 current ones."""
        views: Literal[1, 2] = 2
        """How often each row of a step is taken, each time augmented anew. Released: 2."""
        holistic: HolisticConfig | None = None
        """HPCR; `{}` for its released settings."""

    needs = frozenset({"rehearsal"})
    status = "unverified"
    citation = "arXiv 2304.04408, arXiv 2309.15038"

    def requires_rehearsal(self) -> int:
        return self.config.budget

    def attach(self, host: Host) -> None:
        refuse_token_scores(self, "contrasts rows with the vectors of their classes", "there is no class vector")

    def before_experience(self, experience: Experience) -> None:
        refuse_captions(self, experience, "class scores of each row are needed; give rows with a `label`, or use er")

    def before_step(self, batch: Batch) -> Batch:
        config, loop = self.config, self.loop
        rows = loop.replay.sample(config.per_step, loop.generator)
        if config.holistic is None:
            loop.remember(batch)
        if config.views == 2:
            batch = loop.repeat(batch)
        own = len(batch)
        batch = loop.extend(batch, [row for row in rows for _ in range(config.views)])
        # Of several processes one may have no rehearsed row and must still take part in the exchange.
        return replace(batch, extra={**batch.extra, "pcr": {"own": own, "any": bool(rows)}})

    def criterion(self, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        from torch.nn.functional import cross_entropy

        from ..data import wide

        assert output.logits is not None and batch.labels is not None
        logits, labels = wide(output.logits), batch.labels
        counted = labels != -100
        log_count = self._counts(batch, logits).log()  # log 0 for a class that is not in the batch
        # The row's own proxy stands once above the fraction bar, n times below it.
        summed = cross_entropy(logits + log_count, labels, ignore_index=-100, reduction="sum")
        return self._factor() * (summed + log_count[labels[counted]].sum()), counted.sum()

    def _counts(self, batch: Batch, logits: Tensor) -> Tensor:
        """Rows of each class in the batch, those of all processes together, [C]."""
        import torch

        from ..gathering import gather_rows

        assert batch.labels is not None
        every = gather_rows(batch.labels, fill=-100)
        return torch.bincount(every[every >= 0], minlength=logits.shape[1]).to(logits)

    def _factor(self) -> float:
        import math

        how, loop = self.config.holistic, self.loop
        if how is None:
            return 1.0
        step = loop.experience_step if loop.knows_boundaries else loop.step
        return how.low + (how.high - how.low) * (1 - math.cos(2 * math.pi * step / how.period)) / 2

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        from ..data import wide

        how, loop = self.config.holistic, self.loop
        if how is None:
            return {}
        assert output.logits is not None and output.features is not None
        logits, features, found = wide(output.logits), wide(output.features), {}
        begun = loop.experiences_learnt > 0 or not loop.knows_boundaries
        if begun and batch.extra["pcr"]["any"]:
            own = batch.extra["pcr"]["own"]
            rows = batch.rows[own:]
            if how.alpha:
                stored, known = vectors_of(rows, "logits", logits)
                counts = self._counts(batch, logits)
                found["pcd"] = how.alpha * self._proxy_error(logits[own:], stored, known, counts)
            if how.beta:
                stored, _ = vectors_of(rows, "features", features)
                found["scd"] = how.beta * self._similarity_loss(features[own:], stored.reshape(features[own:].shape))
        loop.remember(batch, logits=logits[:, : len(loop.labels)], features=features)
        return found

    def _proxy_error(self, logits: Tensor, stored: Tensor, known: Tensor, counts: Tensor) -> Tensor:
        """PCD, over the rows of all processes."""
        width = stored.shape[1]
        weight = known * counts[:width]
        error = (weight * (logits[:, :width] - stored).square()).sum()
        return self.loop.mean(error, weight.sum())

    def _similarity_loss(self, features: Tensor, stored: Tensor) -> Tensor:
        """SCD, among the rows of all processes."""
        import torch
        from torch.nn.functional import normalize

        from ..gathering import gather_rows

        real = gather_rows(features.new_ones(len(features))) > 0  # else a row that fills a process up
        now, then = (normalize(gather_rows(each)[real], dim=1) for each in (features, stored))
        if len(now) < 2:  # nothing to be similar to
            return features.sum() * 0.0
        itself = torch.eye(len(now), dtype=torch.bool, device=now.device)

        def scores(each: Tensor) -> Tensor:
            return (each @ each.T / self.config.holistic.temperature).masked_fill(itself, float("-inf"))

        log_now = scores(now).log_softmax(1).masked_fill(itself, 0.0)
        return -(scores(then).softmax(1) * log_now).sum(1).mean()
