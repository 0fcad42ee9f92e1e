"""What methods share that put tokens into early blocks, each for that block alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import MethodConfig
from ..errors import BadInput
from ._method import Method

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..hosts import Block, Handle, Host

EARLY = 3
"""Blocks that are taken where none are named."""


class PromptConfig(MethodConfig):
    """Settings of every method of this kind."""

    length: int = Field(10, ge=0)
    """Tokens L that are inserted into each block; 0 leaves the model as it is."""
    layers: list[int] | None = None
    """Indices of the blocks, negative from the end; the first three when absent. An empty list takes none."""


class BlockPrompts(Method):
    """L tokens after the first token of some blocks, removed behind each; what makes them is the subclass's `make`."""

    adapts = True
    keeps_output = False

    def make(self, width: int, generator: torch.Generator | None) -> nn.Module:
        """The module that makes [B, L, D] of a block's tokens [B, N, D] and their mask; its `trained()` trains."""
        raise NotImplementedError

    def check(self, host: Host, blocks: list[Block]) -> None:
        """Raises BadInput where the blocks cannot take such tokens."""

    def attach(self, host: Host) -> None:
        from ..hosts import Inserting

        layers, config = self.config.layers, self.config
        blocks = [b for b in host.blocks(layers=layers) if layers is not None or b.layer < EARLY]
        blocks = blocks if config.length else []
        loop = getattr(self, "loop", None)  # absent under the public `attach`
        if not blocks and loop is not None and not loop.needs_head:
            field = "layers" if config.length else "length"
            raise BadInput(
                f"method.{self.name}.{field}: is {getattr(config, field)}, so no token is inserted and nothing would "
                "be learnt; name a block and a length above 0"
            )
        self.check(host, blocks)
        self._handles: list[Handle] = []
        for block in blocks:
            made = self.make(host.towers[block.tower].width, None if loop is None else loop.generator)
            some = next(block.module.parameters(), None)
            self.modules[block.name] = made if some is None else made.to(some.device)
            self._handles.append(block.add(self.name, Inserting(made)))

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self.modules = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        modules: dict[str, Any] = self.modules
        return [{"params": [(f"{name}.{part}", p) for name, made in modules.items() for part, p in made.trained()]}]
