"""Custom autograd functions of the effects, in torch operations that every device has."""

from .atoms import GradientOfNew, Respond, dense_values, gather_values

__all__ = ["GradientOfNew", "Respond", "dense_values", "gather_values"]
