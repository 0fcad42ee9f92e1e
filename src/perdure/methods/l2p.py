"""L2P: learning to prompt, a pool of prompts that a query of the frozen host chooses from.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022 (citation from memory; the paper was not at hand,
the formulas are those of the authors' code, google-research/l2p, models/prompt.py).

    q        = feature of the frozen host for x, from a pass without prompts      the class token in a ViT
    S(x)     = the N of M items with the largest cos(q, k_m)
    x_e'     = [p_s1; ...; p_sN; x_e] → frozen blocks                             N L_p tokens in front, in all blocks
    loss     + λ Σ_{s in S(x)} (1 − cos(q, k_s)), mean over the batch

| symbol | attribute |
|---|---|
| k [M, D], p [M, L_p, D] | `modules["query"].keys`, `.prompts` (by tower in a model of two) |
| M, L_p, N, λ | `size`, `length`, `top_n`, `key_weight` |

The authors' code gives all rows of a batch, at test too, the N prompts chosen most often in that batch. A row's
prediction then depends on the rows beside it, and where a batch holds one class or task it leaks that. So it is off;
`vote: true` has it.

Stored: M (D + L_p D) numbers, whatever the number of experiences. Cost: a second forward pass for the query, in
training and in use (counted in the report for training, `extra_rows`), and N L_p more tokens in every block. Removal:
rollback; prompts have no single owner. Prompts that are not chosen have no gradient, but Adam's momentum may move them
still, as in the authors' code; there is no weight decay.

Deviations: features go to the head as they do under every other method, where the authors' head reads the mean of the
prompts' outputs: heads are to be the same across methods. Prompts have no position embedding; under rotary positions
they stand where a row's first token does. Keys start as U(−1, 1) as in the PyTorch ports, prompts as U[0, 0.01) as in
the authors' code. M, L_p, N and λ are the ports' (10, 5, 5, 0.1); the authors' CIFAR-100 config has 10, 10, 4 and 1.0.
The rate of the authors' code is 0.03 B / 256 with Adam and clipping at 1.
INFERRED: everything on hosts other than ViT: the host's own pooled feature as the query (mean for BERT's kin, last
token for decoders), and in language models the query of the first `prompt_tokens` tokens, see `_queried.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..errors import ProtocolRefused
from ._method import register
from ._queried import QueriedMethod, QueryConfig

if TYPE_CHECKING:
    from ..config import ProtocolConfig
    from ..hosts import Host


@register("l2p")
class L2P(QueriedMethod):
    """L2P: prompts from a pool, chosen by the frozen host's own feature, inserted at the input."""

    class Config(QueryConfig):
        size: int = Field(10, ge=1)
        """M, items of the pool. Authors' configs and the ports: 10."""
        length: int = Field(5, ge=1)
        """L_p, tokens of a prompt. Ports (mammoth, PILOT): 5; authors' CIFAR-100 config: 10."""
        top_n: int = Field(5, ge=1)
        """N, prompts that a row takes. Ports: 5; authors' CIFAR-100 config: 4."""
        key_weight: float = Field(0.1, ge=0)
        """λ, pull of the chosen keys to the query. Ports: 0.1 (mammoth 0.5); authors' config: 1.0."""
        vote: bool = False
        """All rows of a batch take the prompts chosen most often in it, as the authors' code does; leaks the batch."""

        @model_validator(mode="after")
        def _enough(self) -> L2P.Config:
            if self.top_n > self.size:
                raise ValueError(f"top_n is {self.top_n}, more than the size {self.size} of the pool; lower it")
            return self

    status = "unverified"
    citation = "CVPR 2022"

    def check_protocol(self, protocol: ProtocolConfig) -> None:
        if self.config.vote and protocol.task_id != "test":
            raise ProtocolRefused(
                f"protocol.task_id: is {protocol.task_id}, but with method.l2p.vote the rows of a batch decide "
                "together, which tells the task wherever a batch holds one; set task_id to test, or vote to false"
            )

    def attach(self, host: Host) -> None:
        from ..layers import Carry, PromptPool

        config = self.config
        self._handles = []
        for tower in dict.fromkeys(block.tower for block in host.blocks()):
            pool = PromptPool(
                host.towers[tower].width, config.size, config.length, config.top_n, vote=config.vote,
                generator=self._generator,
            )  # fmt: skip
            self.ask(host, tower, pool)
            for block in host.blocks(tower=tower or None):
                self._handles.append(block.add(self.name, Carry(pool.choice)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        pools: dict[str, Any] = self.modules
        named = [(f"{name}.{part}", p) for name, pool in pools.items() for part, p in pool.named_parameters()]
        return [{"params": named, "weight_decay": 0.0}]
