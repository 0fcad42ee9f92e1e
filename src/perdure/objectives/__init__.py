"""Objectives: what a batch is, what loss it gives, how it is scored."""

from ._objective import Objective, register, right

__all__ = ["Objective", "register", "right"]
