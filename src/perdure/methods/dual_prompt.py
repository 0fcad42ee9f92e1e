"""DualPrompt: general prompts in the first blocks, one expert prompt per experience in the next, by prefix tuning.

Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022 (citation from
memory; the paper was not at hand, formulas follow the authors' code, google-research/l2p, and its PyTorch ports).

    h^l      = softmax(q [P_K; K]ᵀ / √d) [P_V; V]        P = g^l in the general blocks, e_t^l in the expert blocks
    training t = the current experience
    test     t = argmax_t cos(q(x), k_t)                  q(x): the frozen host's feature, from a pass without prompts
    loss     + λ (1 − cos(q(x), k_t)), mean over the batch

| symbol | attribute |
|---|---|
| g^l [2, n_g, W] | `modules["<block>.general"].P` |
| e_t^l [2, n_e, W], t in turn | `modules["<block>.expert"]`: `old_P` (stand still), `new_P` (trains) |
| k_t [D] | `modules["query"].pool`: `old_keys`, `new_keys` |

Old experts and keys are buffers: no momentum moves them. The general prompts train in every experience and are what can
forget. A new expert starts as the one before (`start: previous`; `shared_prompt_pool` of the authors' config), its key
anew. Rows in training take the current expert without asking the key, so rehearsed rows of older experiences would be
learnt with the wrong expert: refused.

Stored: 2 n_g W a general block; an experience adds 2 n_e W an expert block and D. Cost: a second forward pass for the
query, in training and in use (counted for training, `extra_rows`), n more keys in the chosen blocks. Needs boundaries
in training, no task id at test. Removal: rollback; general prompts have no single owner.

Deviations: choice by row, where the authors' config votes over the batch (see `l2p`). Each half of a prompt has n rows
("length 5" in the authors' code is 5 keys and 5 values; CODA-Prompt's port halves it). Keys start as U(−1, 1), prompts
as U[0, 0.01). Prefix keys take no rotary position and no norm, see `hosts/prefix.py`. One key per experience for all
blocks, as in the authors' code.
Defaults: general 5 rows in blocks 0, 1; expert 5 rows in blocks 2 to 4 (the paper has 20, from memory); λ 1.0 (authors'
config and mammoth; PILOT 0.1). INFERRED: everything on hosts other than ViT, see `_queried.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..errors import BadInput
from ._method import register
from ._queried import QueriedMethod, QueryConfig

if TYPE_CHECKING:
    from ..hosts import Host
    from ..streams import Experience


@register("dual_prompt")
class DualPrompt(QueriedMethod):
    """DualPrompt: general and per-experience prefixes on keys and values, the expert found by a key at test."""

    class Config(QueryConfig):
        general_length: int = Field(5, ge=1)
        """n_g, keys and values of a general prompt. Authors' config: 5."""
        general_layers: list[int] | None = None
        """Blocks of the general prompts; 0 and 1 when absent (authors' config). An empty list takes none."""
        expert_length: int = Field(5, ge=1)
        """n_e, keys and values of an expert prompt. Authors' CIFAR-100 config: 5; paper: 20, from memory."""
        expert_layers: list[int] | None = Field(None, min_length=1)
        """Blocks of the expert prompts; 2, 3 and 4 when absent (authors' config)."""
        key_weight: float = Field(1.0, ge=0)
        """λ, pull of the current key to the query. Authors' config: 1.0; PILOT: 0.1."""
        start: Literal["previous", "fresh"] = "previous"
        """Where a new expert starts: as the one before, or at random."""

    needs = frozenset({"boundaries"})
    status = "unverified"
    citation = "ECCV 2022"

    def attach(self, host: Host) -> None:
        from ..layers import ExpertKeys, ExpertPrefix, StaticPrefix
        from ..layers.prompts import fresh

        config, loop = self.config, getattr(self, "loop", None)  # absent under the public `attach`
        if loop is not None and loop.replay.samples:
            raise BadInput(
                "method.dual_prompt: rows of older experiences would be learnt with the current experience's expert; "
                "list it without a method that rehearses or joins experiences, or take l2p or coda_prompt"
            )
        self._handles = []
        general = self.chosen_blocks(host, "general_layers", (0, 1))
        expert = self.chosen_blocks(host, "expert_layers", (2, 3, 4))
        keys = {}
        for tower in dict.fromkeys(block.tower for block in expert):
            keys[tower] = self.ask(host, tower, ExpertKeys(host.towers[tower].width))
        for block in general:
            start = fresh(2, config.general_length, self.width(host, block), generator=self._generator)
            choice = keys[block.tower].choice if block.tower in keys else None
            self.put(block, StaticPrefix(start, choice), "general")
        for block in expert:
            made = ExpertPrefix(config.expert_length, self.width(host, block), keys[block.tower].choice)
            self.put(block, made, "expert")

    def parameter_groups(self) -> list[dict[str, Any]]:
        named = [
            (f"{name}.{part}", parameter)
            for name, module in self.modules.items()
            for part, parameter in module.named_parameters()
            if parameter.numel()
        ]
        return [{"params": named, "weight_decay": 0.0}]

    # ---- one expert an experience
    def before_experience(self, experience: Experience) -> None:
        from ..layers import ExpertKeys, ExpertPrefix
        from ..layers.prompts import fresh

        generator = self._generator
        for module in self.modules.values():
            if isinstance(module, ExpertKeys):
                module.add(generator)
            elif isinstance(module, ExpertPrefix):
                old = module.get_buffer("old_P")
                drawn = fresh(1, *module.shapes["P"], generator=generator)  # drawn in either case
                module.grow(P=old[-1:].clone() if len(old) and self.config.start == "previous" else drawn)

    def after_experience(self, experience: Experience) -> None:
        from ..layers import ExpertKeys, ExpertPrefix

        for module in self.modules.values():
            if isinstance(module, ExpertKeys):
                module.pool.freeze()
            elif isinstance(module, ExpertPrefix):
                module.freeze()
