"""DER and DER++: dark experience replay, rehearsed rows that keep the logits of their time.

Buzzega, Boschini, Porrello, Abati, Calderara 2020, "Dark Experience for General Continual Learning: a Strong, Simple
Baseline" (citation from memory; no equation numbers at hand). Loss and order of the draws are those of the authors'
framework Mammoth, whose code was read. With two independent draws of `per_step` rows from the reservoir:

    L = CE(current rows) + α · MSE(z', z(x')) + β · CE(y'', z(x''))

z' the logits stored beside x' when the stream showed that row: those of the training forward pass, dropout and
augmentation on, of the row's first pass. β = 0 is DER, without the second draw.

| symbol | attribute |
|---|---|
| α, β | `alpha`, `beta` |
| x', z'; x'', y'' | the first and the second draw; z' is the field `logits` of a stored row |

The number of classes grows. A row stored when w classes were known has w logits; the error is taken over these alone
and the mean over all pairs (row, class) that have a target. Scores of classes that came later have no target and are
free. (Mammoth's head has all classes from the start, and there the scores of classes not seen yet are targets too.)

Stored: `budget` rows and 4 bytes a class and row (8 on a float64 host), which the byte budget counts. Cost per token:
that of the adapter, times (b + 2 per_step) / b for b current rows. Removal: rollback.

Deviations: rows are offered in the first pass over an experience alone (Mammoth offers them in every epoch, so that one
row may stand in the buffer with several logits). One forward pass over the current rows and both draws, not three; no
batch statistics stand in a transformer. α counts per class known then, as Mammoth's MSE counts per class of its head.
Current rows compete as `protocol.mask` says, the second draw among all classes seen. Spec: α 0.3 (0.1 to 0.5), β 0.5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from ..config import MethodConfig
from ._method import Method, register
from ._refusals import refuse_captions, refuse_token_scores
from ._rows_with_vectors import vectors_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Batch, Output, Rows
    from ..hosts import Host
    from ..streams import Experience


@register("derpp")
class DarkExperienceReplay(Method):
    """DER++: replay with stored logits, beside any adapter or full fine-tuning; DER with beta 0."""

    class Config(MethodConfig):
        budget: int = Field(500, ge=1)
        """Rows stored at the most; the protocol's `rehearsal` must grant them. Published runs: 500 and 2000."""
        per_step: int = Field(16, ge=1)
        """Rows of each of the two draws of a batch. Ours, as `er`."""
        alpha: float = Field(0.3, ge=0)
        """Weight α of the squared error on stored logits. Published: 0.1 to 0.5."""
        beta: float = Field(0.5, ge=0)
        """Weight β of the cross-entropy on the second draw; 0 is DER. Published: 0.5."""

    needs = frozenset({"rehearsal"})
    status = "unverified"
    citation = "Buzzega et al. 2020, Dark Experience for General Continual Learning"

    def requires_rehearsal(self) -> int:
        return self.config.budget

    def attach(self, host: Host) -> None:
        refuse_token_scores(
            self, "keeps the logits of each row", "a row would take tokens x vocabulary numbers, many megabytes"
        )

    def before_experience(self, experience: Experience) -> None:
        refuse_captions(self, experience, "class scores of each row are needed; give rows with a `label`, or use er")

    def before_step(self, batch: Batch) -> Batch:
        """Appends both draws. Their labels are put aside: they are no part of the loss on the current rows."""
        config, loop = self.config, self.loop
        first = loop.replay.sample(config.per_step, loop.generator)
        second = loop.replay.sample(config.per_step, loop.generator) if config.beta else []
        start = len(batch)
        batch = loop.extend(batch, first)
        middle = len(batch)
        batch = loop.extend(batch, second)
        assert batch.labels is not None
        labels, without = batch.labels, batch.labels.clone()
        without[start:] = -100
        # Of several processes one may have no row of a draw and must still take part in the exchange.
        drawn = {"start": start, "middle": middle, "any": bool(first)}
        return replace(batch, labels=without, extra={**batch.extra, "derpp": drawn, "derpp_labels": labels})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        from ..data import Batch, Output, wide

        assert output.logits is not None
        logits = wide(output.logits)
        drawn, found = batch.extra["derpp"], {}
        start, middle = drawn["start"], drawn["middle"]
        if drawn["any"]:
            found["logits"] = self.config.alpha * self._error(logits[start:middle], batch.rows[start:middle])
            if self.config.beta:
                part = slice(middle, len(batch.rows))
                rehearsed = Batch({}, batch.extra["derpp_labels"][part], batch.rows[part])
                scored = Output(logits[part], None if output.features is None else output.features[part])
                found["rehearsed"] = self.config.beta * self.loop.loss_among(rehearsed, scored)
        self.loop.remember(batch, logits=logits[:, : len(self.loop.labels)])
        return found

    def _error(self, logits: Tensor, rows: Rows) -> Tensor:
        """Mean squared error to the stored logits, over the classes that each row knew; of all processes together."""
        stored, known = vectors_of(rows, "logits", logits)
        error = (logits[:, : stored.shape[1]] - stored)[known].square().sum()
        return self.loop.mean(error, known.sum())
