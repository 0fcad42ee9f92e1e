"""Frozen features and a head: the strongest simple rival of every adapter on a good backbone.

Nothing of the host trains; its features are computed once per experience and cached. With the `ridge` head nothing
trains by gradient at all. Stored: the head. Cost per token: one forward pass of the host. Removal: rollback.
"""

from __future__ import annotations

from ..config import MethodConfig
from ._method import Method, register


@register("linear_probe")
class LinearProbe(Method):
    """Frozen features, cached once, under a trained or closed-form head."""

    class Config(MethodConfig):
        pass

    frozen_features = True
    status = "verified"
