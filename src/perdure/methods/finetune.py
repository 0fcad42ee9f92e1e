"""Sequential full fine-tuning: every parameter of the host learns from the current experience alone.

Stored: the trained parameters. Cost per token: forward and backward of the whole host. Removal: only by rollback.
The lower end of every comparison; with early stopping and a small rate it is a stronger rival than often shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ..config import MethodConfig
from ..errors import BadInput
from ._method import Method, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..hosts import Host


@register("finetune")
class FineTune(Method):
    """Sequential full fine-tuning, the baseline that forgets."""

    class Config(MethodConfig):
        parameters: str = Field("")
        """Regular expression; only host parameters whose name it finds are trained. All when empty."""

        @field_validator("parameters")
        @classmethod
        def _compiles(cls, pattern: str) -> str:
            import re

            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"is not a regular expression ({error})") from None
            return pattern

    adapts = True
    status = "verified"

    def attach(self, host: Host) -> None:
        import re

        pattern = re.compile(self.config.parameters)
        self._named: list[tuple[str, nn.Parameter]] = [
            (name, p) for name, p in host.named_parameters() if pattern.search(name)
        ]
        if not self._named:
            raise BadInput(f"method.finetune.parameters: {self.config.parameters!r} matches no parameter of the model")
        # Full fine-tuning overwrites the user's weights: the originals are kept so that detach gives them back.
        self._original = [p.detach().clone() for _, p in self._named]

    def detach(self, host: Host) -> None:
        import torch

        with torch.no_grad():
            for (_, parameter), original in zip(self._named, self._original, strict=True):
                parameter.copy_(original)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self._named)}]

    def touched(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._named)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"host/{name}": p.detach() for name, p in self._named}, {"values": self.values}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self._named:
                parameter.copy_(tensors[f"host/{name}"])
        self.values = dict(values["values"])
