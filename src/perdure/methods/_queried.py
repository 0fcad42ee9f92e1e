"""What methods share whose prompts are chosen by a query: a pass of the frozen host in front of each forward pass.

Where a causal host learns to predict tokens, a query of the whole text would let a token see what it is to predict.
There the query is that of the first `prompt_tokens` real tokens, and the prompts are seen from the last of these on;
the tokens before see none. With a KV cache the choice made on the prompt stands. A text with fewer tokens takes its
query from all it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import MethodConfig
from ..errors import BadInput
from ._method import Method
from ._refusals import predicts_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn

    from ..data import Batch, Output
    from ..hosts import Block, Handle, Host
    from ..layers import PromptQuery


class QueryConfig(MethodConfig):
    """Settings of every method of this kind."""

    prompt_tokens: int = Field(16, ge=1)
    """Language models: the query is that of a text's first tokens, so many, and later tokens see the prompts. Ours."""


class PrefixMethod(Method):
    """Puts prefixes in front of keys and values of some blocks."""

    adapts = True
    keeps_output = False
    _handles: list[Handle]

    @property
    def _generator(self) -> torch.Generator | None:
        loop = getattr(self, "loop", None)  # absent under the public `attach`
        return None if loop is None else loop.generator

    def chosen_blocks(self, host: Host, field: str, default: Sequence[int]) -> list[Block]:
        """The blocks that a setting names; of the default ones those that are there. BadInput where none is."""
        layers = getattr(self.config, field)
        blocks = host.blocks(layers=layers) if layers is not None else []
        if layers is None:
            blocks = [block for block in host.blocks() if block.layer in default]
        if not blocks and layers is None:
            depth = max(block.layer for block in host.blocks()) + 1
            raise BadInput(
                f"method.{self.name}.{field}: the default {list(default)} names no block of "
                f"{type(host.model).__name__}, which has {depth}, counted from 0; name blocks"
            )
        return blocks

    def width(self, host: Host, block: Block) -> int:
        """How wide the block's keys and values are."""
        found = {s.out_features for s in host.sites(["key", "value"], layers=[block.layer], tower=block.tower or None)}
        if len(found) != 1:
            raise BadInput(
                f"method.{self.name}: keys and values of block {block.name} differ in width: {sorted(found)}"
            )
        return found.pop()

    def put(self, block: Block, maker: nn.Module, part: str) -> None:
        """Puts a maker in front of a block's keys and values, on the block's device, and keeps it as state."""
        from ..hosts import PrefixAdapter

        self.modules[f"{block.name}.{part}"] = on_device(maker, block.module)
        self._handles.append(PrefixAdapter(block, maker, f"{self.name}_{part}"))

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self.modules = {}


def on_device(made: nn.Module, beside: nn.Module) -> nn.Module:
    some = next(beside.parameters(), None)
    return made if some is None else made.to(some.device)


class QueriedMethod(PrefixMethod):
    """Prompts that depend on a query. State `values["asked"]`: the write whose first batch was checked."""

    adapts_alone = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.values = {"asked": -1}
        self._queries: list[PromptQuery] = []
        self._limit: int | None = None

    def ask(self, host: Host, tower: str, query: PromptQuery) -> PromptQuery:
        """Puts the query pass in front of a tower; its choice is kept beside a KV cache by the tower's first block."""
        from ..hosts import QueryPass
        from ..layers import Keep

        first = host.blocks(tower=tower or None)[0]
        if first.causal and predicts_tokens(self, host):
            self._limit = self.config.prompt_tokens
        on_device(query, first.module)
        self._handles.append(QueryPass(host, tower, query, self.name, self._limit))
        self._handles.append(first.add(f"{self.name}_keep", Keep(query.choice)))
        self.modules[f"{tower}.query" if tower else "query"] = query
        self._queries.append(query)
        self._host = host
        return query

    def detach(self, host: Host) -> None:
        super().detach(host)
        self._queries = []

    # ---- the step
    def before_step(self, batch: Batch) -> Batch:
        write = self.loop.write_id if self.loop.knows_boundaries else 0
        if self.values["asked"] != write:
            self._check(batch)
            self.values = {**self.values, "asked": write}
        self.loop.count_in_step(len(batch))
        return batch

    def _check(self, batch: Batch) -> None:
        """What only shows once training begins, at its first batch."""
        model = self._host.model
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second is the older one
        asked = next((name for name in names if hasattr(type(model), name)), "")
        if asked and getattr(model, asked):
            raise BadInput(
                f"model: gradient checkpointing computes blocks again without the query, which method {self.name} "
                "cannot honour; switch it off (gradient_checkpointing_disable)"
            )
        mine = {id(p) for module in self.modules.values() for p in module.parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in mine:
                raise BadInput(
                    f"method.{self.name}: its query is that of the frozen host, but {name} trains too; list it without "
                    "another method that adapts the host"
                )
        mask = batch.inputs.get("attention_mask")
        if self._limit is not None and mask is not None and int(mask.sum(1).max()) <= self._limit:
            raise BadInput(
                f"method.{self.name}.prompt_tokens: is {self._limit}, and no text of the first batch has more than "
                f"{int(mask.sum(1).max())} tokens, so that nothing would be predicted with a prompt; lower it"
            )

    def pulls(self) -> Tensor | None:
        """Σ over the chosen keys of 1 − cos(q, key), mean over the rows, summed over towers; None where none pull."""
        found = None
        for query in self._queries:
            cosines = query.choice.cosines
            if cosines is None:
                continue
            pull = (1 - cosines).sum(1).mean()
            found = pull if found is None else found + pull
            query.choice.cosines = None  # its graph ends with this step
        return found

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        weight, pulled = getattr(self.config, "key_weight", 0.0), self.pulls()
        return {"keys": weight * pulled} if weight and pulled is not None else {}
