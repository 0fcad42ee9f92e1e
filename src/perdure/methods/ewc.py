"""EWC: elastic weight consolidation, a quadratic penalty where old experiences are sensitive.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks" (their eq. 3; cited from memory, not
re-read), and online EWC: Schwarz et al. 2018, "Progress & Compress" (from memory). After experience t with θ_t:

    F_t = 1/N Σ_rows (∇θ log p(y | x; θ_t))²            diagonal Fisher; log p of a row is a sum over its answer tokens
    L   = L_now + λ/2 Σ_{k<t} Σ_j F_k[j] (θ[j] − θ_k[j])²                   one quadratic for each experience
    L   = L_now + λ/2 Σ_j F̃[j] (θ[j] − θ_{t−1}[j])²,  F̃ ← γ F̃ + F_t         online: true

N counts what the loss is a mean over, rows or answer tokens, so that F has the loss's own scale (ours). y is drawn from
the model (`labels: model`, what Fisher information means) or is the row's label (`labels: data`, the empirical one,
which vanishes where the rows are fitted). Classes compete among all that were seen; old tokens are those of the row.

| symbol | where |
|---|---|
| Σ F_k, or F̃ | `tensors["fisher/…"]` |
| Σ F_k θ_k / Σ F_k, or θ_{t−1} | `tensors["anchor/…"]` |
| λ, γ | `strength`, `gamma` |

The sum of quadratics is one quadratic and a constant, Σ F_k (θ − θ_k)² = (Σ F_k)(θ − m)² + c, kept exactly: memory does
not grow. So after the third experience begins the plain form is not zero at its start; the online form is.

What is held: whatever trains in this experience and trained in the last, adapter or host, and the head's rows of
classes seen then (`head: true`). Parameters that stand still need no penalty and are forgotten; new ones have no anchor
yet (`_lasting.py`). Beside moram, codyra, coda_prompt, olora, inflora, sd_lora, merge_lora and lora
with `grow`, whose trained parameters are new each time, that is the head alone; without one (language models, class
texts) it is refused.

Stored: two numbers for each held one. Cost: once an experience a forward and backward pass for each of `rows` rows (the
last experience excepted); a step, one pass over what is held. Removal: rollback.

Deviations. mammoth's release: λ without ½; squared gradients of the data's labels weighted by p(y | x), neither Fisher.
TRACE's (½ · 400, read, not run): F is summed over all steps of training, from mean gradients of batches, with the
penalty's own gradient in them and dropout on; here it is taken afterwards at θ_t, row by row, of the likelihood alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..config import MethodConfig
from ..data import wide
from ._lasting import Lasting, old_rows
from ._method import Method, register
from ._refusals import refuse_captions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import Batch, Output, Rows
    from ..hosts import Host
    from ..streams import Experience


@register("ewc")
class EWC(Method):
    """EWC: a quadratic penalty weighted by the diagonal Fisher information, one per experience or online."""

    class Config(MethodConfig):
        strength: float = Field(400.0, ge=0)
        """λ, with the ½ of the formula. Released for TRACE: 400; mammoth on CIFAR-10: 10 without the ½, 20 here."""
        online: bool = False
        """One quadratic around the last experience, with F̃ ← γ F̃ + F, instead of the sum over experiences."""
        gamma: float = Field(1.0, ge=0, le=1)
        """γ: what is left of the older Fisher information at each boundary; online only. mammoth: 1."""
        labels: Literal["model", "data"] = "model"
        """Whether y is drawn from the model or is the row's own (the empirical Fisher information)."""
        rows: int | None = Field(512, ge=1)
        """Training rows from which F is taken, evenly spaced; all when absent. Ours; mammoth takes all."""
        head: bool = True
        """Hold the head's rows of old classes too. mammoth does."""

        @model_validator(mode="after")
        def _online_alone_decays(self) -> EWC.Config:
            if self.gamma != 1 and not self.online:
                raise ValueError("gamma is of the online form; set online: true, or remove gamma")
            return self

    needs = frozenset({"boundaries", "gradients"})
    status = "unverified"
    citation = "Kirkpatrick et al. 2017; Schwarz et al. 2018"

    def attach(self, host: Host) -> None:
        self._lasting = Lasting(self, lambda name, _: self.config.head or not name.startswith("head/"))
        if hasattr(self, "loop"):  # absent under the public `attach`
            self._lasting.check(self.config.head)

    def before_experience(self, experience: Experience) -> None:
        refuse_captions(self, experience, "one alone has no likelihood whose gradient could be taken; use lwf or er")

    def before_step(self, batch: Batch) -> Batch:
        self._lasting.begin()
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        found: list[Any] = []
        for name, parameter in self._lasting.now("fisher"):
            fisher, anchor = (self._lasting.tensor(kind, name, parameter) for kind in ("fisher", "anchor"))
            moved = wide(old_rows(parameter, anchor)) - anchor
            found.append((fisher * moved.square()).sum() + self.values["apart"].get(name, 0.0))
        return {"penalty": self.config.strength / 2 * sum(found)} if found else {}

    # ---- the boundary
    def after_experience(self, experience: Experience) -> None:
        named = self._lasting.trained()
        if experience.last or not named:
            return
        fisher = self._fisher([name for name, _ in named], experience.train)
        self.values.setdefault("apart", {})
        for name, parameter in named:
            if f"fisher/{name}" in self.tensors or bool(fisher[name].any()):  # else no output depends on it
                self._add(name, parameter, fisher[name])
        self.values["apart"] = {name: c for name, c in self.values["apart"].items() if f"fisher/{name}" in self.tensors}
        self._lasting.leave(named)

    def _add(self, name: str, parameter: nn.Parameter, fisher: Tensor) -> None:
        """Adds the quadratic F (θ − θ_t)² to what is kept of this parameter."""
        import torch

        now = wide(parameter.detach()).clone()
        if f"fisher/{name}" not in self.tensors:
            self.values["apart"].pop(name, None)
        else:
            old, anchor = torch.zeros_like(fisher), now.clone()
            for whole, kind in ((old, "fisher"), (anchor, "anchor")):
                part = self._lasting.tensor(kind, name, parameter)
                old_rows(whole, part).copy_(part)
            if self.config.online:
                fisher = self.config.gamma * old + fisher
            else:
                total = old + fisher
                share = torch.where(total > 0, fisher / total, 1.0)
                apart = float((old * share * (now - anchor).square()).double().sum())
                self.values["apart"][name] = self.values["apart"].get(name, 0.0) + apart
                fisher, now = total, anchor + share * (now - anchor)
        self.tensors |= {f"fisher/{name}": fisher, f"anchor/{name}": now}

    def _fisher(self, names: list[str], rows: Rows) -> dict[str, Tensor]:
        """Mean of squared gradients of the log-likelihood, row by row at the parameters as they are."""
        from ..loading import evenly

        counted = 0

        def loss(batch: Batch, output: Output) -> Tensor:
            nonlocal counted
            scores, labels = self._scores(batch, output)
            counted += len(labels)
            return _nll(scores, self._drawn(scores) if self.config.labels == "model" else labels)

        chosen = rows if self.config.rows is None else evenly(rows, self.config.rows)
        sums: dict[str, Tensor] = {}
        for found in self.loop.gradients(chosen, loss, per_sample=True):
            for name in names:
                square = wide(found[name]).square()
                sums[name] = sums[name].add_(square) if name in sums else square
        return {name: total / max(1, counted) for name, total in sums.items()}

    def _scores(self, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
        """Scores [N, C] and labels [N] of a row (N = 1), or of its answer tokens."""
        scores, labels = output.logits, batch.labels
        assert scores is not None and labels is not None
        if scores.dim() == 3:  # the score at a token is of the next one
            answer = labels[:, 1:] != -100
            return wide(scores[:, :-1][answer]), labels[:, 1:][answer]
        return wide(scores[:, : len(self.loop.labels)]), labels

    def _drawn(self, scores: Tensor) -> Tensor:
        import torch

        shares = scores.detach().float().softmax(-1).cpu()
        if not len(shares):
            return torch.zeros(0, dtype=torch.int64, device=scores.device)
        return torch.multinomial(shares, 1, generator=self.loop.generator)[:, 0].to(scores.device)

    def plasticity(self) -> dict[str, float]:
        """`held_share`: share of the trained numbers that were held in the last experience."""
        return {"held_share": self.values["held_share"]} if "held_share" in self.values else {}


def _nll(scores: Tensor, labels: Tensor) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(scores, labels, reduction="sum")
