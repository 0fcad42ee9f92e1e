"""Custom autograd functions of the effects, in torch operations that every device has."""

from .atoms import Respond, dense_values, gather_values

__all__ = ["Respond", "dense_values", "gather_values"]
