"""Sequential full fine-tuning: every parameter of the host learns from the current experience alone.

Stored: the trained parameters. Cost per token: forward and backward of the whole host. Removal: only by rollback.
The lower end of every comparison; with early stopping and a small rate it is a stronger rival than often shown.
With `pretrain` the first experience trains the whole model at a rate of its own, whatever `parameters` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ..config import MethodConfig, PretrainConfig
from ..errors import BadInput
from ._host_parameters import HostParameters, pretraining_groups
from ._method import Method, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..hosts import Host
    from ._updates import Update


@register("finetune")
class FineTune(Method):
    """Sequential full fine-tuning, the baseline that forgets."""

    class Config(MethodConfig):
        parameters: str = Field("")
        """Regular expression; only host parameters whose name it finds are trained. All when empty."""
        pretrain: PretrainConfig | None = None
        """Pretrain the whole model on the first experience."""

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
    uses_host_weights = True
    status = "verified"

    def attach(self, host: Host) -> None:
        import re

        pattern = re.compile(self.config.parameters)
        every = host.named_parameters()
        self._named: list[tuple[str, nn.Parameter]] = [pair for pair in every if pattern.search(pair[0])]
        if not self._named:
            raise BadInput(f"method.finetune.parameters: {self.config.parameters!r} matches no parameter of the model")
        self._host = HostParameters(self._named if self.config.pretrain is None else every)

    def updates(self) -> list[Update]:
        return []  # all is in the weights

    def detach(self, host: Host) -> None:
        self._host.restore()

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.pretrains:
            return pretraining_groups(self.config.pretrain, self._host.named)
        return [{"params": list(self._named)}]

    def touched(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._host.named)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._host.state_dict(), {"values": self.values}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self._host.load_state_dict(tensors)
        self.values = dict(values["values"])
