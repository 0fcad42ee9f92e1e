"""The model as it is: nothing learns. The first row of any language-modelling table.

With a classification head nothing could be predicted without learning: `linear_probe` is the frozen baseline there.
With class texts (CLIP, objective `image_text`) it is the zero-shot model.
Stored: nothing. Cost per token: the host's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import MethodConfig
from ..errors import BadInput
from ._method import Method, register

if TYPE_CHECKING:
    from ..hosts import Host


@register("frozen")
class Frozen(Method):
    """The frozen model as it is, for objectives that use the model's own head or class texts."""

    class Config(MethodConfig):
        pass

    frozen_features = True
    learns = False
    status = "verified"

    def attach(self, host: Host) -> None:
        loop = getattr(self, "loop", None)  # absent under the public `attach`
        if loop is not None and loop.needs_head:
            raise BadInput("method: 'frozen' learns nothing, so a classification head would too; use linear_probe")
