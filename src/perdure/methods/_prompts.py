"""What methods share that put tokens into early blocks, each for that block alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..config import MethodConfig
from ..errors import BadInput
from ._method import Method
from ._refusals import predicts_tokens

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


class RetrievalConfig(PromptConfig):
    """Settings of those that retrieve from a block's own tokens."""

    heads: int = Field(1, ge=1)
    """Parts into which the width is split, each with retrieval of its own. Re-implementation: 1."""
    beta: float | None = Field(None, ge=0)
    """Inverse temperature β; 1/√(width / heads) when absent. 0 pools every token alike: a control."""
    train: list[Literal["P", "W_Q", "W_K", "W_V", "W_O"]] = Field(["P", "W_Q", "W_O"], min_length=1)
    """What trains; a bias goes with its matrix. W_V is the identity until it trains."""

    @model_validator(mode="after")
    def _something_moves(self) -> RetrievalConfig:
        if self.beta == 0 and not {"W_V", "W_O"} & set(self.train):
            raise ValueError(
                "beta 0 uses no query and no key, so nothing could learn; let the value or the output map train"
            )
        return self


def check_heads(method: Method, width: int) -> None:
    """Raises BadInput where the heads do not divide the width."""
    heads = method.config.heads
    if width % heads:
        raise BadInput(
            f"method.{method.name}.heads: is {heads}, which does not divide the width {width}; choose a divisor"
        )


def check_whole_text(method: Method, host: Host, blocks: list[Block]) -> None:
    """Raises BadInput where pooling over a text would show a token those that it is to predict."""
    causal = next((block for block in blocks if block.causal), None)
    if causal is not None and predicts_tokens(method, host):
        raise BadInput(
            f"method.{method.name}: retrieval pools over the whole text, so in block {causal.name} of "
            f"{type(host.model).__name__}, a causal language model, a token would see those that are to be "
            "predicted after it; use objective classification, where the whole text is given, or static_prompts, "
            "whose tokens do not depend on the text"
        )


class BlockPrompts(Method):
    """L tokens after the first token of some blocks, removed behind each; what makes them is the subclass's `make`."""

    adapts = True
    keeps_output = False

    def make(self, width: int, generator: torch.Generator | None) -> nn.Module:
        """The module that makes [B, L, D] of a block's tokens [B, N, D] and their mask; its `trained()` trains."""
        raise NotImplementedError

    def check(self, host: Host, blocks: list[Block]) -> None:
        """Raises BadInput where the blocks cannot take such tokens."""

    def around(self, made: nn.Module) -> nn.Module:
        """The block function that `made` becomes."""
        from ..hosts import Inserting

        return Inserting(made)

    def chosen(self, host: Host) -> list[Block]:
        """The blocks that are taken."""
        layers = self.config.layers
        return [b for b in host.blocks(layers=layers) if layers is not None or b.layer < EARLY]

    def attach(self, host: Host) -> None:
        config = self.config
        blocks = self.chosen(host) if config.length else []
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
            self._handles.append(block.add(self.name, self.around(made)))

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self.modules = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        modules: dict[str, Any] = self.modules
        return [{"params": [(f"{name}.{part}", p) for name, made in modules.items() for part, p in made.trained()]}]
