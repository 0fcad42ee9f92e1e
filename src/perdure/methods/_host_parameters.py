"""A host's own parameters where a method trains them: their originals, their state, and pretraining.

With `pretrain` the first experience trains the whole model, and what the method trains otherwise waits for the second:
a model from scratch is made ready by the same run that adapts it. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import PretrainConfig

Named = Sequence[tuple[str, "nn.Parameter"]]


class HostParameters:
    """Parameters of the host that a method overwrites.

    Args:
        named: names in the host and parameters.
    """

    def __init__(self, named: Named):
        self.named = list(named)
        # The user's weights are overwritten: the originals are kept so that detach gives them back.
        self._original = [p.detach().clone() for _, p in self.named]

    def restore(self) -> None:
        """The values from before the method came."""
        import torch

        with torch.no_grad():
            for (_, parameter), original in zip(self.named, self._original, strict=True):
                parameter.copy_(original)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"host/{name}": p.detach() for name, p in self.named}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(tensors[f"host/{name}"])


def pretraining_groups(config: PretrainConfig, named: Named) -> list[dict[str, Any]]:
    """Groups of what pretrains: matrices decay, vectors (norms and biases) do not."""
    rate = {} if config.learning_rate is None else {"lr": config.learning_rate}
    flat, decayed = ([pair for pair in named if (pair[1].ndim > 1) is many] for many in (False, True))
    return [
        {"params": decayed, "weight_decay": config.weight_decay, **rate},
        {"params": flat, "weight_decay": 0.0, **rate},
    ]
